"""The paper's four design goals, each with evidence computed for every deployment."""

from expertlane.report.comparison import Comparison, Row
from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import (
    NONE,
    bytes_si,
    counted,
    figures,
    milliseconds,
    percent,
    span,
    times,
)
from expertlane.results.schema import HiddenCommunication, Machine, Results, ScalingPoint
from expertlane.spec.deployment import OverlapChoice
from expertlane.spec.names import Cause

_COMMUNICATION = (
    Cause.DISPATCH_COMBINE,
    Cause.TP_COLLECTIVES,
    Cause.HAND_OVER,
    Cause.WAITING,
    Cause.PIPELINE_BUBBLE,
)
_OVERLAP: dict[OverlapChoice, str] = {False: "off", True: "on", "auto": "auto"}


def goals(results: Results, comparison: Comparison, machine: Machine) -> tuple[Section, ...]:
    """One section a goal."""
    return (
        _parallelism(comparison),
        _no_contention(comparison),
        _overlap(results, comparison),
        _scaling(results, comparison, machine),
    )


def experts_at_once(row: Row) -> int:
    """Experts of one layer that compute at the same time: `ep` in each replica."""
    layout = row.deployment.layout
    return layout.ep_size * layout.replicas


def layers_at_once(row: Row) -> int:
    """Pipeline stages with work at the same time: no more than micro-batches to fill them."""
    return min(row.deployment.layout.pp_size, row.deployment.options.num_micro_batches)


def experts_per_rank(row: Row) -> set[int]:
    """How many experts of a layer a rank holds all or a part of; several where `ep` is uneven."""
    return {
        num_experts
        for rank in row.deployment.per_rank
        for num_experts in rank.num_experts_per_layer
        if num_experts
    }


def _parallelism(comparison: Comparison) -> Section:
    most = max(experts_at_once(row) for row in comparison.rows)
    leaders = _numbers([row for row in comparison.rows if experts_at_once(row) == most])
    return Section(
        "Goal 1: most expert-level parallelism",
        (
            f"By its layout, most experts of a layer computing at once: {most}, with {leaders}.",
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    number("at once, of a layer"),
                    number("at once, of the model"),
                    number("experts with tokens"),
                ),
                tuple(
                    (
                        str(row.number),
                        row.deployment.name,
                        str(experts_at_once(row)),
                        str(experts_at_once(row) * layers_at_once(row)),
                        percent(row.phase.active_expert_share),
                    )
                    for row in comparison.rows
                ),
            ),
            "By layout, if every rank has a core of its own. Of a layer: ep × replicas; of the "
            "model: × pipeline stages that the micro-batches can fill; with tokens: share of a "
            f"layer's experts, mean over {comparison.phase} steps.",
        ),
    )


def _no_contention(comparison: Comparison) -> Section:
    alone = [row for row in comparison.rows if experts_per_rank(row) == {1}]
    return Section(
        "Goal 2: no contention inside a rank",
        (
            f"One expert of a layer to a rank: {_numbers(alone) if alone else 'no deployment'}.",
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    number("experts of a layer per rank"),
                    number("part of each"),
                    number(f"weights read per rank, {comparison.phase} round"),
                ),
                tuple(
                    (
                        str(row.number),
                        row.deployment.name,
                        span(experts_per_rank(row)),
                        part_of_expert(row),
                        bytes_si(_weight_bytes_per_rank(row)),
                    )
                    for row in comparison.rows
                ),
            ),
        ),
    )


def part_of_expert(row: Row) -> str:
    """`all`, or the share of each expert that a rank holds."""
    etp = row.deployment.layout.layout.etp
    return "all" if etp == 1 else f"1/{etp}"


def _weight_bytes_per_rank(row: Row) -> float:
    """Weights read by a rank while every sequence goes one token on; mean over ranks."""
    total = sum(row.phase.weight_bytes.values())
    return total / row.deployment.num_ranks / row.phase.num_rounds


def _overlap(results: Results, comparison: Comparison) -> Section:
    by_name = {pair.on: pair for pair in results.hidden_communication}
    parts: list[str | Table] = [_hidden_sentence(pair) for pair in results.hidden_communication]
    if not parts:
        parts.append("No two deployments differ in overlap alone: nothing shows what it hides.")
    rows = []
    for row in comparison.rows:
        shares = row.deployment.cause_shares(comparison.phase)
        pair = by_name.get(row.deployment.name)
        hidden = pair.hidden if pair else None
        rows.append(
            (
                str(row.number),
                row.deployment.name,
                _OVERLAP[row.deployment.options.overlap],
                milliseconds(row.phase.exposed_s),
                percent(sum(shares[cause] for cause in _COMMUNICATION)),
                NONE if hidden is None else percent(hidden),
            )
        )
    parts.append(
        Table(
            "",
            (
                text("#"),
                text("deployment"),
                text("overlap"),
                number("blocked in dispatch, combine: ms"),
                number("all transfers and waiting"),
                number("hidden by overlap"),
            ),
            tuple(rows),
        )
    )
    return Section("Goal 3: communication overlapped with computation", tuple(parts))


def _hidden_sentence(pair: HiddenCommunication) -> str:
    steps = (
        f"a decode step takes {milliseconds(pair.step_off_s)} ms without overlap, "
        f"{milliseconds(pair.step_on_s)} ms with it ({pair.on}); without it "
        f"{milliseconds(pair.exposed_s)} ms of a step are blocked in dispatch and combine, waiting "
        "for other ranks included"
    )
    if pair.hidden is None:
        return f"Nothing to hide: {steps}."
    if pair.hidden < 0:
        more = milliseconds(pair.step_on_s - pair.step_off_s)
        return f"Overlap hides nothing here and costs {more} ms a step: {steps}."
    return f"Overlap hides {percent(pair.hidden)}: {steps}."


def _scaling(results: Results, comparison: Comparison, machine: Machine) -> Section:
    parts: list[str | Table] = []
    if results.scaling:
        parts += [_scaling_sentence(results.scaling), _scaling_table(results.scaling)]
    else:
        parts.append("This experiment runs no layouts of growing ep.")
    if machine.is_oversubscribed:
        parts.append(
            f"TPS per rank must fall where {machine.num_ranks} ranks share "
            f"{counted(machine.num_cores, 'core')}: read the critical path instead."
        )
    parts.append(
        Table(
            f"Per rank, {comparison.phase}",
            (
                text("#"),
                text("deployment"),
                number("ranks"),
                number("TPS per rank"),
                number("critical-path TPS per rank"),
            ),
            tuple(
                (
                    str(row.number),
                    row.deployment.name,
                    str(row.deployment.num_ranks),
                    figures(row.phase.tps / row.deployment.num_ranks),
                    figures(row.phase.critical_path.tps / row.deployment.num_ranks),
                )
                for row in comparison.rows
            ),
        )
    )
    return Section("Goal 4: scaling", tuple(parts))


def _scaling_sentence(points: tuple[ScalingPoint, ...]) -> str:
    first, last = points[0], points[-1]
    return (
        f"From {counted(first.num_ranks, 'rank')} (ep={first.ep_size}) to "
        f"{counted(last.num_ranks, 'rank')} (ep={last.ep_size}), the same workload: critical-path "
        f"TPS per rank goes to {times(last.relative_critical_path_tps_per_rank)}, TPS per rank to "
        f"{times(last.relative_tps_per_rank)}; linear would be 1.00×."
    )


def _scaling_table(points: tuple[ScalingPoint, ...]) -> Table:
    return Table(
        "Growing ep",
        (
            number("ep"),
            number("ranks"),
            number("TPS"),
            number("TPS per rank"),
            number("to the first"),
            number("critical-path TPS per rank"),
            number("to the first"),
        ),
        tuple(
            (
                str(point.ep_size),
                str(point.num_ranks),
                figures(point.tps),
                figures(point.tps_per_rank),
                times(point.relative_tps_per_rank),
                figures(point.critical_path_tps_per_rank),
                times(point.relative_critical_path_tps_per_rank),
            )
            for point in points
        ),
    )


def _numbers(rows: list[Row]) -> str:
    return ", ".join(f"#{row.number}" for row in rows)
