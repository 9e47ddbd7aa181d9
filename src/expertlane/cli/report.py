"""`expertlane report`: show a results.json again, and write its pages."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from expertlane.cli.option_groups import takes_groups
from expertlane.cli.output import (
    Found,
    OutputOptions,
    check_folder,
    print_report,
    print_written,
    write_beside,
)


@dataclass(frozen=True, kw_only=True)
class _Output(OutputOptions):
    changes: ClassVar = {"out": {"show_default": "beside results.json"}}


@takes_groups
def report(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS",
            help="A results.json of compare, plan, simulate, bench or drill, or its folder.",
        ),
    ],
    output_options: _Output,
) -> None:
    """Show a results.json again, and write report.html and report.md; runs nothing.

    report.html is one file that opens offline: the verdict, where the time goes, every rank's
    time in a step, experts and traffic, and all tables. You can send it to others.

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
    made = report_of(kept)
    written = write_beside(Found(kept, folder), made, output_options.export)
    print_report(made, output_options, folder / "report.html", partial(to_json, kept))
    print_written(written)
