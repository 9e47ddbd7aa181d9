"""Work and traffic of deployments: bytes, fan-out of tokens, hot spots and stragglers."""

from collections.abc import Sequence

from expertlane.report.compared import Comparison, Row, step_of
from expertlane.report.document import Column, Section, Table, number, text
from expertlane.report.numbers import (
    bytes_si,
    figures,
    milliseconds,
    percent,
    times,
)
from expertlane.report.speed import NAMED, UTILISATION
from expertlane.report.verdict import error_in_words
from expertlane.results.record import (
    CriticalPath,
    DeploymentRecord,
    RebalanceRecord,
    StepsRecord,
)
from expertlane.results.traffic import FanOut, HottestRank, TrafficRecord
from expertlane.spec.names import Link, Traffic

_CRITICAL_PATH = (
    "Critical path: the largest CPU time among ranks in each stage, chained through the "
    "pipeline; transfers and other threads excluded. "
)


def work_and_traffic(comparison: Comparison) -> Section:
    """CPU time, utilisation, balance and bytes."""
    path: tuple[Column[CriticalPath], ...] = (
        number("critical-path TPS", lambda path: path.tps, figures, "wall"),
        number("critical-path ms per step", lambda path: path.step_s, milliseconds, "wall"),
    )
    work: tuple[Column[Row], ...] = (
        *NAMED,
        number("CPU ms per token", lambda row: row.step.cpu_s_per_token, milliseconds),
        *(each.of(lambda row: row.step.critical_path) for each in path),
        *(each.of(step_of) for each in UTILISATION),
        number("load max/mean", _expert_load, figures),
    )
    sent: tuple[Column[Row], ...] = (
        *NAMED,
        *(
            _sent(f"{link.label} {heading}", link, kind).of(step_of)
            for link in Link
            for kind, heading in ((Traffic.PAYLOAD, ""), (Traffic.METADATA, "meta"))
        ),
        number("collectives per rank, step", _collectives, figures),
    )
    return Section(
        f"Work and traffic of {comparison.phase}",
        (
            Table.of("", work, comparison.rows, comparison.source),
            Table.of("Sent to other ranks, per token", sent, comparison.rows),
            (_CRITICAL_PATH if comparison.source == "measured" else "")
            + "Load: token-expert pairs of the most loaded expert over the mean, prefill and "
            "decode together, in the least balanced layer.",
        ),
    )


def _expert_load(row: Row) -> float | None:
    return max(row.record.expert_max_over_mean, default=None)


def _sent(heading: str, link: Link, kind: Traffic) -> Column[StepsRecord]:
    def per_token(step: StepsRecord) -> float | None:
        if step.traffic is None or link.label not in step.traffic.by_link:
            return None
        num_runs = max(1, len(step.tps_of_runs))
        num_bytes = float(getattr(step.traffic.by_link[link.label], kind.label))
        return num_bytes * num_runs / step.num_tokens

    return number(heading, per_token, bytes_si)


def _collectives(row: Row) -> float:
    num_rounds = row.step.num_rounds or row.step.num_steps
    return sum(row.step.num_collectives.values()) / row.record.num_ranks / num_rounds


def seen(row: Row) -> TrafficRecord:
    """A row's traffic.

    Raises:
        ValueError: there is none.
    """
    if row.step.traffic is None:
        raise ValueError(f"{row.name} has no traffic")
    return row.step.traffic


def _copies(fan_out: FanOut, num: int | None) -> float | None:
    return None if num is None else num / sum(fan_out.tokens_by_ranks_reached)


_SPREAD: tuple[Column[FanOut], ...] = (
    number("ranks per token", lambda each: each.ranks_per_token, figures),
    number("nodes per token", lambda each: each.nodes_per_token, figures),
    number(
        "copies between nodes, per token",
        lambda each: _copies(each, each.num_remote_rank_copies),
        figures,
    ),
    number("with one per node", lambda each: _copies(each, each.num_remote_node_copies), figures),
)
_HOTTEST: tuple[Column[TrafficRecord], ...] = (
    number("receives most", lambda each: _hot(each.receiver)),
    number("computes most", lambda each: _hot(each.busiest)),
    number(
        "hottest expert",
        lambda each: (hot := each.expert) and f"{hot.layer}/{hot.expert} ({percent(hot.share)})",
    ),
    number(
        "least balanced layer",
        lambda each: (hot := each.layer) and f"{hot.layer} ({times(hot.max_over_mean)})",
    ),
    number("straggler", lambda each: _straggler(each)),
)


def hot_spots(comparison: Comparison) -> Section:
    """Hot spots: one line a deployment and table."""
    errors = tuple(
        f"#{row.number} sends hidden states as {row.record.known_options.payload}: they change by "
        f"{error_in_words(error)}."
        for row in comparison.rows
        if (error := seen(row).payload_error) is not None
    )
    spreads: tuple[Column[Row], ...] = (
        *NAMED,
        *(each.of(lambda row: seen(row).fan_out) for each in _SPREAD),
        number("padding", lambda row: _padding(seen(row)), percent),
    )
    hottest = (*NAMED, *(each.of(seen) for each in _HOTTEST))
    return Section(
        f"Spread and hot spots of {comparison.phase}",
        (
            Table.of("", spreads, comparison.rows),
            Table.of("", hottest, comparison.rows),
            "All steps of one repetition; a token counts once per layer. Ranks per token: "
            "expert-parallel ranks; where an expert is sharded, all ranks with a shard. Copies "
            "between nodes: one copy per rank reached; with one per node: what hierarchical "
            "dispatch would send. Padding: share of bytes that only fill static shapes. Receives, "
            "computes: the rank, and its bytes or token-expert pairs over the mean. Hottest "
            "expert: layer/expert, and its share of the layer's pairs. Least balanced layer: its "
            f"most loaded expert over the mean, {comparison.phase} only; load max/mean, above, "
            "counts both phases. Straggler: the rank that most often arrives last, and at which "
            "share of its stage's dispatches and combines.",
            *errors,
        ),
    )


def _padding(traffic: TrafficRecord) -> float | None:
    of_link = traffic.by_link.values()
    padding = sum(each.padding for each in of_link)
    total = padding + sum(each.payload + each.metadata for each in of_link)
    return padding / total if padding else None


def _hot(rank: HottestRank | None) -> str | None:
    return f"{rank.rank} ({times(rank.over_mean)})" if rank else None


def _straggler(traffic: TrafficRecord) -> str | None:
    last = traffic.straggler
    return None if last is None else f"{last} ({percent(traffic.last_share(last))})"


def experts_and_traffic(
    record: DeploymentRecord, steps: Sequence[tuple[str, StepsRecord]]
) -> Section:
    """Section of a simulation: bytes per token, and balance of the load."""
    facts: list[Column[StepsRecord]] = [
        number(
            "token-expert pairs, max/mean of ranks",
            lambda step: step.traffic and step.traffic.busiest_over_mean,
            figures,
        ),
        *(
            _sent(f"{link.label} {kind.label} per token", link, kind)
            for link in Link
            for kind in Traffic
        ),
    ]
    loads = [load for load in record.expert_max_over_mean if load]
    sentence = (
        f"Most loaded expert over the mean, all steps: {figures(max(loads))} in the least "
        f"balanced layer, {figures(sum(loads) / len(loads))} on average."
        if loads
        else "No token was routed to an expert."
    )
    return Section("Experts and traffic", (Table.across("", facts, steps), sentence))


_Decision = tuple[int, RebalanceRecord]  # with the number of its deployment


def rebalancing(comparison: Comparison) -> Section:
    """All decisions to move experts; empty where no deployment rebalances."""
    taken = [(row.number or 0, each) for row in comparison.rows for each in row.record.rebalances]
    if not taken:
        return Section("Rebalancing", ())
    named: tuple[Column[_Decision], ...] = (
        text("#", lambda one: one[0]),
        number("step", lambda one: one[1].step),
    )
    decisions: tuple[Column[_Decision], ...] = (
        *named,
        number("saves ms", lambda one: one[1].gain_s, milliseconds),
        number("costs ms", lambda one: one[1].cost_s, milliseconds),
        number("to move", lambda one: one[1].num_bytes, bytes_si),
        text("done", lambda one: _done(one[1])),
        number("in use", lambda one: one[1].switched),
    )
    effects: tuple[Column[_Decision], ...] = (
        *named,
        number("load before", lambda one: one[1].load_before, times),
        number("load after", lambda one: one[1].load_after, times),
        number("load predicted", lambda one: one[1].predicted_after, times),
        number("experts ms before", lambda one: one[1].experts_s_before, milliseconds),
        number("experts ms after", lambda one: one[1].experts_s_after, milliseconds),
        number("paid ms", lambda one: one[1].paid_s, milliseconds),
    )
    return Section(
        f"Rebalancing ({comparison.clock})",
        (
            Table.of("Decisions", decisions, taken),
            Table.of("Effects", effects, taken),
            "The last repetition. Saves, costs: predicted, over as many steps as the decision "
            "looked at. In use: from that step on; too late: the run ended before the experts "
            "had moved. Load: the most loaded rank over the mean, all layers, over as many steps "
            "before the decision and after the switch; predicted: after, if tokens came evenly "
            "from all ranks. Experts: CPU time per step of the rank that spends most on experts. "
            "Paid: time by which the moves delayed steps.",
        ),
    )


def _done(each: RebalanceRecord) -> str:
    if each.switched is not None:
        return "moved"
    return "too late" if each.gain_s > each.cost_s else "not worth it"
