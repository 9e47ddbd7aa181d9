"""The files of a report: `report.md` and `report.html`."""

from pathlib import Path

from expertlane.errors import UserError
from expertlane.report.document import Report
from expertlane.spec.files import write_text


def write_reports(report: "Report", folder: Path) -> tuple[Path, ...]:
    """Write report.md and report.html; return their paths.

    Raises:
        UserError: the folder can't be written to.
    """
    from expertlane.report import html, markdown  # not for commands that only print

    texts = {"report.md": markdown.render(report), "report.html": html.render(report)}
    for name in texts:
        if (folder / name).is_dir():
            raise UserError(f"cannot write {folder / name}: it is a folder")
    return tuple(write_text(folder / name, text) for name, text in texts.items())
