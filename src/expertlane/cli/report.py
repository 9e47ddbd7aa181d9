"""`expertlane report`: show a results.json again, and write its pages."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from expertlane.cli.options import OutputOptions, out_option, takes_groups
from expertlane.cli.output import check_folder, print_message, show, write_reports
from expertlane.errors import ExpertlaneError, UserError


@dataclass(frozen=True, kw_only=True)
class _Output(OutputOptions):
    out: Path | None = out_option("beside results.json")


@takes_groups
def report(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS",
            help="A results.json of compare, plan, simulate or bench, or its folder.",
        ),
    ],
    output_options: _Output,
) -> None:
    """Show a results.json again, and write report.html and report.md; runs nothing.

    report.html is one file that opens offline: the verdict, where the time goes, every rank's
    time in a step, experts and traffic, and all tables. Send it to whoever should see it.

    \b
    Examples:
      expertlane report results/paper-small
      expertlane report results/paper-small --full
      expertlane report results/paper-small/results.json --out shared
    """
    from expertlane.report.sections import report_of
    from expertlane.results.file import read as read_results
    from expertlane.results.file import to_json

    kept = read_results(results)
    folder = output_options.out or (results if results.is_dir() else results.parent)
    check_folder(folder)
    try:
        made = report_of(kept)
        written = write_reports(made, folder)
    except ExpertlaneError:
        raise
    except Exception as error:  # a file that is well-formed and yet makes no sense
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{results} cannot be shown: its numbers do not fit together ({reason})"
        ) from error
    show(made, output_options, partial(to_json, kept), f"--full, or {folder / 'report.html'}")
    print_message(f"written: {', '.join(map(str, written))}")
