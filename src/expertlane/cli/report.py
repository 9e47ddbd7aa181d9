"""`expertlane report`: make the reports again from a results.json."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from expertlane.cli.options import export_option
from expertlane.cli.output import Found, check_folder, making_sense, print_json, write_beside
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
    export: Literal["csv", "parquet"] | None = export_option("results"),
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
    from expertlane.results.table import check_format

    check_format(export)
    kept = read_results(results)
    folder = out or (results if results.is_dir() else results.parent)
    check_folder(folder)
    found = Found(kept, folder)
    with making_sense(results):
        written = [str(each) for each in write_beside(found, report_of(kept), export)]
    if as_json:
        print_json(strict_json({"written": written}) + "\n")
    else:
        print("\n".join(map(printable, written)))
