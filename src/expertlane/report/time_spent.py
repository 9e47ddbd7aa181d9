"""Time of steps by cause, against its floor, and the evidence behind it."""

from collections.abc import Sequence

from expertlane.report.compared import COMMUNICATION, Comparison, Row
from expertlane.report.document import Column, Section, Table, number, text
from expertlane.report.numbers import figures, low_high_ms, milliseconds, percent
from expertlane.report.speed import NAMED
from expertlane.results.record import StepsRecord
from expertlane.results.results import Results

_SIDE_BY_SIDE = 9  # columns of one table that fits 80 characters
_LEAST_SHARE = 5e-4  # of the step; a cause below it everywhere has no row
_SURE = 0.5


def _on_basis(basis: str) -> Column[StepsRecord]:
    return number(f"time {basis}", lambda step: step.basis_shares.get(basis), percent)


def _due_to(cause: str) -> Column[StepsRecord]:
    return number(cause, lambda step: step.shares.get(cause) or None, percent)


IN_ALL: Column[StepsRecord] = number("total, ms", lambda step: step.round_s, milliseconds)
UTILISATION: tuple[Column[StepsRecord], ...] = (
    number("peak FLOP/s used", lambda step: step.flops_utilisation, percent),
    number("peak bytes/s used", lambda step: step.read_utilisation, percent),
)
FACTS: tuple[Column[StepsRecord], ...] = (
    number("low–high", lambda step: step.round_s, low_high_ms),
    number("p95", lambda step: step.step_s and step.step_s.p95, milliseconds),
    number("floor, ms", lambda step: step.floor_s, milliseconds),
    *UTILISATION,
    *map(_on_basis, ("measured", "fitted", "bound")),
    number("time extrapolated", lambda step: step.extrapolated_share, percent),
)
HOW_TO_READ_FACTS = (
    "Floor (roofline): weights and KV over the memory bandwidth, or FLOPs over the peak, of the "
    "busiest rank, whichever takes longer. Fitted: to published measurements; bound: by a "
    "datasheet's limit or an assumption; extrapolated: outside the sizes that were measured."
)


def causes(
    title: str,
    steps: Sequence[tuple[str, StepsRecord]],
    more: Sequence[Column[StepsRecord]] = (),
) -> tuple[Table, ...]:
    """Shares of the time by cause, steps side by side under their names, with further columns."""
    named = dict.fromkeys(cause for _, step in steps for cause in step.breakdown_s)
    facts = [
        _due_to(cause)
        for cause in named
        if any(step.shares.get(cause, 0.0) > _LEAST_SHARE for _, step in steps)
    ]
    chunks = [steps[at : at + _SIDE_BY_SIDE] for at in range(0, len(steps), _SIDE_BY_SIDE)]
    return tuple(Table.across(title, (*facts, IN_ALL, *more), chunk) for chunk in chunks)


def bottlenecks(comparison: Comparison, heading: str = "Bottlenecks") -> Section:
    """Measured: the largest part of each deployment's time, then all parts."""
    largest: tuple[Column[Row], ...] = (
        *NAMED,
        text("largest part", lambda row: row.record.bottleneck and row.record.bottleneck.sentence),
    )
    waits: tuple[Column[StepsRecord], ...] = (
        number("transfers and waiting", communication_share, percent),
        number("in dispatch and combine, ms", lambda step: step.exposed_s, milliseconds),
    )
    return Section(
        heading,
        (
            Table.of("", largest, comparison.rows),
            *causes(
                f"Where the time of {comparison.phase} goes, {comparison.clock}",
                _numbered(comparison),
                waits,
            ),
            "Mean over ranks. Total: one decode step of all sequences. Waiting: blocked until the "
            "last rank arrives; what that rank itself waits for is the transfer. Straggler: waits "
            "less than the other ranks of its pipeline stage, by over 5% of the time. Pipeline "
            "bubble: blocked in PP send/recv, its transfer included, or idle while another stage "
            "computes. Scheduler overhead: no rank has work. In dispatch and combine: blocked, "
            "waiting included; summed over pipeline stages.",
        ),
    )


def communication_share(step: StepsRecord) -> float:
    """The share of the time that goes to transfers and waiting."""
    return sum(step.shares.get(cause, 0.0) for cause in COMMUNICATION)


def _numbered(comparison: Comparison) -> list[tuple[str, StepsRecord]]:
    return [(f"#{row.number}", row.step) for row in comparison.rows]


def projected_time(comparison: Comparison) -> Section:
    """`Row.step` of each deployment by cause."""
    return Section(
        f"Projected: where a decode step's time goes, {comparison.context:,} tokens of context",
        (
            *causes("", _numbered(comparison)),
            "Mean over ranks; total: one decode step of all sequences. Reads: operations bound by "
            "memory bandwidth. Transfers count where a rank waits for them.",
        ),
    )


def rests_on(results: Results, comparison: Comparison) -> Section:
    """Projected: the floor, utilisation, and the evidence behind the numbers."""
    first, last = comparison.context, comparison.contexts[-1]
    columns: tuple[Column[Row], ...] = (
        NAMED[0],
        number(f"floor ms at {first:,}", lambda row: row.step.floor_s, milliseconds),
        number("step / floor", lambda row: over_floor(row.step), figures),
        number(f"floor ms at {last:,}", lambda row: comparison.at(row, last).floor_s, milliseconds),
        number("memory bandwidth used", lambda row: row.step.read_utilisation, percent),
        number("FLOPs used", lambda row: row.step.flops_utilisation, percent),
        number(
            "FLOPs used, prefill",
            lambda row: row.record.prefill and row.record.prefill.flops_utilisation,
            percent,
        ),
        number("bound", lambda row: row.step.basis_shares.get("bound", 0), percent),
        number("extrapolated", lambda row: row.step.extrapolated_share, percent),
    )
    cluster = results.projected_for
    return Section(
        "Projected: roofline and sources",
        (
            Table.of("", columns, comparison.rows),
            f"{HOW_TO_READ_FACTS} A device has {figures(cluster.memory_bytes_per_s / 1e12)} TB/s "
            f"and {figures(cluster.flops_per_s / 1e12)} TFLOP/s.",
        ),
    )


def over_floor(step: StepsRecord) -> float | None:
    """A step's time over its floor."""
    return step.round_s.value / step.floor_s if step.floor_s else None


def firmness(steps: Sequence[StepsRecord]) -> str:
    """The extrapolated share of steps' time, in a sentence."""
    shares = [step.extrapolated_share or 0.0 for step in steps]
    low, high = percent(min(shares)), percent(max(shares))
    if max(shares) == 0:
        return "All of it lies within the sizes that the profile's laws were fitted to."
    return (
        f"{'Most' if min(shares) > _SURE else 'Part'} of it is extrapolated: "
        f"{low if low == high else f'{low} to {high}'} of these steps' time lies outside the sizes "
        "that were ever measured (see the assumptions): rankings are reliable, absolute values "
        "are not."
    )
