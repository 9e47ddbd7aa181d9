"""The paper's own table: reported, for other hardware; never a column beside measured values."""

from dataclasses import dataclass
from typing import Literal

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import figures, times
from expertlane.results.schema import Results
from expertlane.spec.paper import LAYOUTS, is_papers_model


@dataclass(frozen=True)
class ReportedRow:
    """One deployment as the paper reports it."""

    name: str
    tps: float
    tpot_ms: float
    source: Literal["reported"] = "reported"


HARDWARE = "16 NVIDIA H100 in two nodes of 8, FP16, 1024 sequences of 10,000 tokens"

ROWS = (
    ReportedRow("baseline: TP=8, PP=2", 120_000, 8.3),
    ReportedRow("proposed: EP=16", 450_000, 2.2),
)


def paper_sections(results: Results) -> tuple[Section, ...]:
    """The reported values beside results of the paper's two layouts; nothing beside others."""
    layouts = {each.layout.layout for each in results.deployments}
    return (paper_section(),) if set(LAYOUTS) <= layouts else ()


def is_papers_experiment(results: Results) -> bool:
    """Whether a projection is of the paper's model and layouts, so that its numbers compare."""
    if results.projection is None:
        return False
    layouts = {each.layout.layout for each in results.projection.deployments}
    return set(LAYOUTS) <= layouts and is_papers_model(results.experiment.get("model", {}))


def paper_section() -> Section:
    """The reported values, labelled as such."""
    return Section(
        "The paper's table (reported, other hardware)",
        (
            f"Reported by the paper for {HARDWARE}; nothing here was measured or checked, and "
            "none of it compares with the numbers above.",
            reported_table(),
        ),
        leads=True,
    )


def reported_table() -> Table:
    """Both rows, and what the second gains."""
    first = ROWS[0]
    return Table(
        "",
        (
            text("deployment"),
            text("source"),
            number("TPS"),
            number("TPOT ms"),
            number("throughput"),
            number("latency"),
        ),
        tuple(
            (
                row.name,
                row.source,
                figures(row.tps),
                f"{row.tpot_ms:.1f}",
                times(row.tps / first.tps),
                times(first.tpot_ms / row.tpot_ms),
            )
            for row in ROWS
        ),
    )
