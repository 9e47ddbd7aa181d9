"""How every command shows and keeps its results: tables or JSON, and three files."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expertlane.errors import UserError

if TYPE_CHECKING:
    from expertlane.report.document import Report
    from expertlane.results.results import Results

JSON_HELP = "Print results.json instead of tables."
FILES = "results.json, report.md and report.html"


def slug(*names: object) -> str:
    """Names with hyphens between, as a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(map(str, names)))


def results_folder(out: Path | None, name: str) -> Path:
    """Where results go: `out` if given, else `results/NAME`.

    Raises:
        UserError: nothing can be written there.
    """
    from expertlane.cli.output import check_folder

    folder = out or Path("results", name)
    check_folder(folder)
    return folder


def publish(
    results: "Results",
    folder: Path,
    *,
    as_json: bool,
    also: Callable[[], Sequence[Path]] = tuple,
) -> None:
    """Print results, write them and their reports, and say on stderr what was written.

    Args:
        also: writes files of the command's own, after the results.
    """
    from expertlane.cli.output import print_json, print_message, stdout_console
    from expertlane.report import terminal
    from expertlane.report.sections import report_of
    from expertlane.results.file import to_json, write

    written = [write(results, folder)]  # first: what was found is kept whatever comes
    report = report_of(results)
    try:
        if as_json:
            print_json(to_json(results))
        else:
            terminal.show(report, stdout_console())
    finally:  # also where standard output takes nothing
        written += [*write_reports(report, folder), *also()]
    print_message(f"written: {', '.join(map(str, written))}")


def write_reports(report: "Report", folder: Path) -> tuple[Path, ...]:
    """Write report.md and report.html; return their paths.

    Raises:
        UserError: the folder can't be written to.
    """
    from expertlane.report import html, markdown
    from expertlane.spec.files import write_text

    texts = {"report.md": markdown.render(report), "report.html": html.render(report)}
    for name in texts:
        if (folder / name).is_dir():
            raise UserError(f"cannot write {folder / name}: it is a folder")
    return tuple(write_text(folder / name, text) for name, text in texts.items())
