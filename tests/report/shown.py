"""What tests ask of a report."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from expertlane.report import html, terminal
from expertlane.report.document import Chart, Multiples, Report, Section, Table, Timelines
from expertlane.report.sections import report_of
from expertlane.results.record import DeploymentRecord
from expertlane.results.results import Results


def in_terminal(results: Results, width: int) -> str:
    """As it is printed."""
    stream = io.StringIO()
    terminal.show(report_of(results), Console(file=stream, width=width))
    return stream.getvalue()


def answer_lines(report: Report) -> list[str]:
    """The answer's lines on a terminal of 80 columns."""
    stream = io.StringIO()
    page = Path("results/example/report.html")
    terminal.show_answer(report, Console(file=stream, width=80), page)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@cache
def made_by(make: Callable[[], Results]) -> tuple[Results, str]:
    """Results of a kind and their page, drawn once for all tests."""
    results = make()
    return results, html.render(report_of(results))


def section(report: Report, beginning: str) -> Section:
    """The first whose heading begins so, plots aside."""
    sections = report.of_place("top", "tables")
    found = [each for each in sections if each.heading.startswith(beginning)]
    assert found, beginning
    return found[0]


def with_traffic(record: DeploymentRecord, **changes: Any) -> DeploymentRecord:
    """The same with other traffic in all of its steps."""
    steps = (
        replace(each, traffic=replace(each.traffic, **changes)) if each.traffic else each
        for each in record.steps
    )
    return replace(record, steps=tuple(steps))


def charts(part: Section) -> list[Chart]:
    """Every plot by itself."""
    found: list[Chart] = []
    for each in part.parts:
        if isinstance(each, Chart):
            found.append(each)
        elif isinstance(each, Multiples):
            found += each.charts
        elif isinstance(each, Timelines):
            found += [chart for _, chart in each.charts]
    return found


def charts_of(results: Results) -> list[Chart]:
    """Every plot of a report."""
    return [chart for each in report_of(results).sections for chart in charts(each)]


def values(chart: Chart) -> list[dict[str, Any]]:
    """What is plotted."""
    assert isinstance(chart.spec, dict)
    found: list[dict[str, Any]] = chart.spec["data"]["values"]
    return found


def tables(part: Section) -> list[Table]:
    """In order."""
    return [each for each in part.parts if isinstance(each, Table)]


def words(part: Section) -> str:
    """All sentences."""
    return " ".join(each for each in part.parts if isinstance(each, str))
