"""`expertlane report`: make the reports again from a results.json."""

from pathlib import Path
from typing import Annotated

import typer

from expertlane.cli.output import check_folder, print_json, write_reports
from expertlane.errors import ExpertlaneError, UserError
from expertlane.spec.files import strict_json
from expertlane.spec.printable import printable


def report(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS",
            help="A results.json of compare, plan, simulate or bench, or the folder it is in.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for report.md and report.html. Default: beside it."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the paths of what was written.")
    ] = False,
) -> None:
    """Make report.html and report.md again from a results.json; runs nothing.

    report.html is one file that opens offline: the verdict, where the time goes, every rank's
    time in a step, experts and traffic, and all tables. Send it to whoever should see it.

    \b
    Examples:
      expertlane report results/paper-small
      expertlane report results/paper-small/results.json --out shared
    """
    from expertlane.report.sections import report_of
    from expertlane.results.file import read as read_results

    kept = read_results(results)
    folder = out or (results if results.is_dir() else results.parent)
    check_folder(folder)
    try:
        written = [str(each) for each in write_reports(report_of(kept), folder)]
    except ExpertlaneError:
        raise
    except Exception as error:  # a file that is well-formed and yet makes no sense
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{results} cannot be shown: its numbers do not fit together ({reason})"
        ) from error
    if as_json:
        print_json(strict_json({"written": written}) + "\n")
    else:
        print("\n".join(map(printable, written)))
