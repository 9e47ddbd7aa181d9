"""How far tokens spread, where traffic and load are hottest, and who keeps the others waiting."""

from collections.abc import Callable

from expertlane.report.comparison import Comparison, Row
from expertlane.report.document import Section, Table, number, text
from expertlane.report.matrix import matrix
from expertlane.report.numbers import NONE, bytes_si, figures, milliseconds, percent, times
from expertlane.report.rounding import error_in_words
from expertlane.results.schema import HiddenCommunication, Machine, Results
from expertlane.results.traffic import FanOutResult, HottestRankResult, TrafficResult
from expertlane.spec.names import Link, Phase, Traffic

_NUM_LAST_NAMED = 3


def hot_spots(comparison: Comparison) -> Section:
    """The short form: one line a deployment and table."""
    errors = tuple(
        f"#{row.number} sends hidden states as {row.deployment.options.payload}: they change by "
        f"{error_in_words(error)}."
        for row in comparison.rows
        if (error := row.deployment.traffic[comparison.phase].payload_error) is not None
    )
    return Section(
        f"Spread and hot spots of {comparison.phase}",
        (
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    number("ranks per token"),
                    number("nodes per token"),
                    number("copies between nodes, per token"),
                    number("with one a node"),
                    number("padding"),
                ),
                tuple(_spread(row, comparison.phase) for row in comparison.rows),
            ),
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    number("receives most"),
                    number("computes most"),
                    number("hottest expert"),
                    number("least even layer"),
                    number("comes last"),
                ),
                tuple(_hottest(row, comparison.phase) for row in comparison.rows),
            ),
            "Over all steps of all repetitions. A token counts once a layer. Ranks per token: "
            "expert-parallel ones; where an expert is cut over ranks, it goes to all of them. "
            "Copies between nodes: with one copy to each such rank reached; with one a node, what "
            "a hierarchical dispatch would send; the rest is saved. Padding: share of bytes that "
            "only fill static shapes. Receives, computes: rank, its bytes or token-expert pairs "
            "over the mean. Expert: layer/expert, share of its layer's pairs. Least even layer: "
            f"its fullest expert over the mean, {comparison.phase} alone; load max/mean, above, "
            "counts both phases. Comes last: the rank, at which share of the dispatches and "
            "combines of its pipeline stage.",
            *errors,
        ),
    )


def _spread(row: Row, phase: Phase) -> tuple[str, ...]:
    seen = row.deployment.traffic[phase]
    of_link = row.deployment.traffic_bytes[phase].values()
    total = sum(each.payload + each.metadata + each.padding for each in of_link)
    padding = sum(each.padding for each in of_link)
    fan_out = seen.fan_out
    spread = (NONE,) * 4
    if fan_out is not None:
        num_tokens = sum(fan_out.tokens_by_ranks_reached)
        spread = (
            figures(fan_out.ranks_per_token),
            figures(fan_out.nodes_per_token),
            figures(fan_out.num_remote_rank_copies / num_tokens),
            figures(fan_out.num_remote_node_copies / num_tokens),
        )
    share = percent(padding / total) if padding else NONE
    return (str(row.number), row.deployment.name, *spread, share)


def _hottest(row: Row, phase: Phase) -> tuple[str, ...]:
    seen = row.deployment.traffic[phase]
    expert, layer, last = seen.expert, seen.layer, seen.straggler
    return (
        str(row.number),
        row.deployment.name,
        *(f"{hot.rank} ({times(hot.over_mean)})" if hot else NONE
          for hot in (seen.receiver, seen.busiest)),
        f"{expert.layer}/{expert.expert} ({percent(expert.share)})" if expert else NONE,
        f"{layer.layer} ({times(layer.max_over_mean)})" if layer else NONE,
        NONE if last is None else f"{last} ({percent(seen.last_share(last))})",
    )  # fmt: skip


def details(results: Results, comparison: Comparison, machine: Machine) -> tuple[Section, ...]:
    """The long form: a section a deployment, with the matrix of who sent how much to whom."""
    pairs = {pair.on: pair for pair in results.hidden_communication}
    return tuple(
        Section(
            f"Traffic of #{row.number} {row.deployment.name}, {comparison.phase}",
            (
                matrix(
                    row.deployment.traffic[comparison.phase].sent_bytes[Traffic.PAYLOAD.label],
                    machine.ranks_per_node,
                ),
                _bytes(row, comparison.phase),
                _facts(row, comparison.phase, pairs.get(row.deployment.name)),
            ),
        )
        for row in comparison.rows
    )


def _bytes(row: Row, phase: Phase) -> Table:
    seen = row.deployment.traffic[phase]
    return Table(
        "Sent by stage, all repetitions",
        (
            text("stage"),
            text("link"),
            *(number(kind.label) for kind in Traffic),
        ),
        tuple(
            (
                stage,
                link.label,
                *(bytes_si(getattr(of_link[link.label], kind.label)) for kind in Traffic),
            )
            for stage, of_link in seen.by_stage.items()
            for link in Link
            if any(getattr(of_link[link.label], kind.label) for kind in Traffic)
        )
        or (("all", "any", *("0 B" for _ in Traffic)),),
    )


def _facts(row: Row, phase: Phase, pair: HiddenCommunication | None) -> Table:
    seen = row.deployment.traffic[phase]
    expert, layer, error = seen.expert, seen.layer, seen.payload_error
    rows = [
        *((f"payload of a step, {link.label}", _of_steps(seen, link)) for link in Link),
        *(_fan_out_rows(seen.fan_out) if seen.fan_out else ()),
        *((("payload rounded", error_in_words(error)),) if error is not None else ()),
        ("receives most", _rank(seen.receiver, bytes_si)),
        ("computes most", _rank(seen.busiest, lambda amount: f"{amount:,} token-expert pairs")),
        (
            "hottest expert",
            f"layer {expert.layer}, expert {expert.expert}: {percent(expert.share)} of its "
            "layer's pairs"
            if expert
            else NONE,
        ),
        (
            "least even layer",
            f"layer {layer.layer}: fullest expert {times(layer.max_over_mean)} the mean"
            if layer
            else NONE,
        ),
        (
            "exposed communication",
            f"{milliseconds(row.phase.exposed_s)} ms a round blocked in dispatch and combine",
        ),
        ("hidden communication", _hidden(row, pair)),
        ("come last", _last(seen)),
    ]
    return Table("All repetitions", (text("what"), text("value")), tuple(rows))


def _of_steps(seen: TrafficResult, link: Link) -> str:
    of_step = seen.payload_bytes_of_step[link.label]
    least, most = min(of_step), max(of_step)
    if least == most:
        return bytes_si(most)
    mean = sum(of_step) / len(of_step)
    return f"{bytes_si(mean)} in the mean, {bytes_si(least)} to {bytes_si(most)}"


def _fan_out_rows(fan_out: FanOutResult) -> tuple[tuple[str, str], ...]:
    copies, least = fan_out.num_remote_rank_copies, fan_out.num_remote_node_copies
    saved = f": a copy a node saves {percent(fan_out.num_saved_copies / copies)}" if copies else ""
    return (
        (
            "per token",
            f"{figures(fan_out.experts_per_token)} experts, "
            f"{figures(fan_out.ranks_per_token)} ranks, {figures(fan_out.nodes_per_token)} nodes",
        ),
        ("tokens by ranks reached", _histogram(fan_out.tokens_by_ranks_reached)),
        ("tokens by nodes reached", _histogram(fan_out.tokens_by_nodes_reached)),
        (
            "copies between nodes",
            f"{copies:,} with one a rank, {least:,} with one a node{saved}",
        ),
    )


def _histogram(tokens: tuple[int, ...]) -> str:
    """`1: 25%, 2: 75%`."""
    total = sum(tokens)
    return ", ".join(
        f"{reached}: {percent(num / total)}" for reached, num in enumerate(tokens) if num
    )


def _rank(hot: HottestRankResult | None, amount: Callable[[int], str]) -> str:
    if hot is None:
        return NONE
    return f"rank {hot.rank}: {amount(hot.amount)}, {times(hot.over_mean)} the mean"


def _hidden(row: Row, pair: HiddenCommunication | None) -> str:
    if not row.deployment.options.overlap:
        return f"{NONE} (overlap is off)"
    if row.deployment.options.overlap == "auto":
        return f"{NONE} (overlap is chosen by the number of tokens)"
    if pair is None:
        return f"{NONE} (no deployment differs from this one in overlap alone)"
    if pair.hidden is None:
        return f"{NONE} ({pair.off} exposes none)"
    if pair.hidden < 0:
        more = milliseconds(pair.step_on_s - pair.step_off_s)
        return f"none: with overlap a step takes {more} ms longer than {pair.off}"
    return f"{percent(pair.hidden)} of what {pair.off} exposes"


def _last(seen: TrafficResult) -> str:
    """The ranks that come last most often."""
    ranks = [rank for rank, num in enumerate(seen.num_last_arrivals) if num]
    ranks.sort(key=seen.last_share, reverse=True)
    named = [
        f"rank {rank} at {percent(seen.last_share(rank))} of {seen.num_meetings[rank]:,}"
        for rank in ranks[:_NUM_LAST_NAMED]
    ]
    return (", ".join(named) + " dispatches and combines") if named else NONE
