"""What tests ask of a report."""

import io

from rich.console import Console

from expertlane.report import terminal
from expertlane.report.document import Report, Section, Table
from expertlane.report.sections import report_of
from expertlane.results.results import Results


def in_terminal(results: Results, width: int, *, traffic: bool = False) -> str:
    """As it is printed."""
    stream = io.StringIO()
    terminal.show(report_of(results, traffic=traffic), Console(file=stream, width=width))
    return stream.getvalue()


def section(report: Report, beginning: str) -> Section:
    """The first whose heading begins so, plots aside."""
    found = [each for each in report.of_place("top", "tables") if each.heading.startswith(beginning)]
    assert found, beginning
    return found[0]


def tables(part: Section) -> list[Table]:
    """In order."""
    return [each for each in part.parts if isinstance(each, Table)]


def words(part: Section) -> str:
    """All sentences."""
    return " ".join(each for each in part.parts if isinstance(each, str))
