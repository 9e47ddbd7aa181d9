"""One snapshot for each kind of results: the answer, all tables, and what every plot says.

After a deliberate change, from the folder `tests`, and read the difference:

    python -m report.test_snapshots
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import example_pages
import example_results as example
from expertlane.report import markdown
from expertlane.report.document import Chart, Report, Section
from expertlane.report.sections import report_of
from expertlane.results.estimate import Estimate
from expertlane.results.hardware import LinkSpeed, VirtualTime
from expertlane.results.record import RebalanceRecord
from expertlane.results.results import Results, with_costs
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause
from report.shown import answer_lines, charts

FOLDER = Path(__file__).with_name("snapshots")
_MOST_ROWS = 6  # of a plot's table


def virtual() -> Results:
    """A pair on both clocks, with intervals and link speeds."""
    causes_s = {
        Cause.PIPELINE_BUBBLE: Estimate(-0.057, -0.060, -0.054),
        Cause.DISPATCH_COMBINE: Estimate(0.022, 0.020, 0.024),
        Cause.ROUTER: Estimate(0.001, -0.001, 0.003),  # no more than noise
    }
    speeds = tuple(
        LinkSpeed(scale, (10.0, 99.0, 98.0, 20.0 / (1 + scale))) for scale in (0.0, 1.0, 2.0)
    )
    given = example.with_pair(example.usual(), Estimate(1.5, 1.4, 1.6), causes_s)
    return example.in_virtual_time(given, VirtualTime("h100", 1.0, 1.0, speeds))


def rebalanced() -> Results:
    """Experts that were moved, that stayed, and whose move came too late."""
    moved = RebalanceRecord(
        replica=0,
        step=8,
        switched=11,
        gain_s=0.5,
        cost_s=0.25,
        num_bytes=6_000_000,
        predicted_before=1.7,
        predicted_after=1.2,
        load_before=1.75,
        load_after=1.25,
        experts_s_before=0.02,
        experts_s_after=0.01,
        paid_s=0.125,
    )
    late = replace(moved, switched=None, load_after=None, experts_s_after=None, paid_s=None)
    given = example.usual()
    taken = moved, late, replace(late, step=19, gain_s=0.1)
    return replace(given, deployments=(replace(given.deployments[0], rebalances=taken),))


def uneven() -> Results:
    """One deployment whose ranks hold different numbers of experts; prompts alone."""
    return example.results([(Deployment("EP 3", Layout(dp=3, ep=3)), 0.1)], output_len=1)


EXAMPLES = {
    **{name: make for name, make in example_pages.KINDS.items() if name != "both"},
    "virtual": virtual,
    "rebalanced": rebalanced,
    "uneven": uneven,
    "one": lambda: example.results([(example.EXPERT, 0.2)]),
    "priced": lambda: with_costs(example_pages.KINDS["bench"](), 12.34),
}


def shown(report: Report) -> str:
    """The answer on a terminal, the report without plots, and the words and tables of plots."""
    parts = ["\n".join(answer_lines(report)), markdown.render(report)]
    parts += [each for section in report.sections for each in _of_plots(section)]
    return "\n\n".join(parts) + "\n"


def _of_plots(section: Section) -> Iterator[str]:
    found = charts(section)
    if found:
        yield f"# Plots: {section.chapter}: {section.heading}"
    yield from map(_plot, found)


def _plot(chart: Chart) -> str:
    table = replace(chart.table, rows=chart.table.rows[:_MOST_ROWS])
    legend = ", ".join(each.label for each in chart.legend)
    said = (f"## {chart.title}", chart.words, chart.note, legend and f"Legend: {legend}")
    return "\n".join(filter(None, (*said, markdown.table(table))))


def snapshot(name: str) -> str:
    """The text of an example, without the time and the versions of this run."""
    results = EXAMPLES[name]()
    versions = replace(results.versions, expertlane="1", torch="2", python="3")
    return shown(
        report_of(replace(results, created="2026-01-01T00:00:00+00:00", versions=versions))
    )


def path_of(name: str) -> Path:
    """The file of an example's snapshot."""
    return FOLDER / f"{name.replace(' ', '_')}.txt"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_report_is_as_it_was(name: str) -> None:
    assert snapshot(name) == path_of(name).read_text("utf-8"), (
        "after a deliberate change: cd tests && python -m report.test_snapshots"
    )


if __name__ == "__main__":
    for each in EXAMPLES:
        path_of(each).write_text(snapshot(each), "utf-8")
