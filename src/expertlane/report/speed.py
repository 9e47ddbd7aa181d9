"""Speed of deployments: against each other, by context and conditions, by size."""

from collections.abc import Callable, Sequence
from functools import partial

from expertlane.report.compared import (
    COMMUNICATION,
    Comparison,
    Row,
    experts_per_rank,
    part_of_expert,
    projected,
)
from expertlane.report.document import Column, Section, Table, Words, number, text
from expertlane.report.numbers import (
    bytes_si,
    figures,
    low_high,
    low_high_ms,
    low_high_thousands,
    milliseconds,
    percent,
    span,
    times,
    whole,
)
from expertlane.results.estimate import Estimate
from expertlane.results.hardware import LinkSpeed, VirtualTime
from expertlane.results.record import RUN, Conditions, Source, StepsRecord
from expertlane.results.results import Results
from expertlane.spec.names import Phase

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


NAMED: tuple[Column[Row], ...] = (
    text("#", lambda row: row.number),
    text("deployment", lambda row: row.name),
)
BEYOND = "*"  # marks a step whose sequences do not all fit
_EVEN = 0.05  # less is no difference
LOWER_OF_TWO = (
    "Each computation takes the lower of its times in two runs, since other programs only add time."
)


def unit_of(source: Source) -> str:
    """The unit that a deployment runs on, in words."""
    return "rank" if source in RUN else "GPU"


def deployments(comparison: Comparison, wall: Comparison | None = None) -> Section:
    """The deployments, and their speed.

    Args:
        wall: the same comparison in wall time, where `comparison` is in virtual time.
    """
    columns: tuple[Column[Row], ...] = (
        *NAMED,
        text("layout", lambda row: row.record.layout),
        number("ranks", lambda row: row.record.num_ranks),
        text("weights per rank", _holds),
    )
    return Section(
        "Deployments (virtual time)" if wall else f"Deployments ({comparison.source})",
        (
            Table.of("", columns, comparison.rows),
            _speed(comparison),
            _spread(comparison, wall),
            f"Factors are of {comparison.phase} TPS. 90 %: the interval of TPS, with five runs or "
            "more. TTFT and TPOT are medians. × best base: against the best baseline. "
            f"{LOWER_OF_TWO if wall else 'TPS: the median of runs.'}",
            *(
                f"#{row.number} dispatches by {table}: tokens per rank in a micro-batch, timed at "
                "startup."
                for row in comparison.rows
                if (table := row.record.dispatch_table) is not None
            ),
        ),
        place="top",
    )


def _speed(comparison: Comparison) -> Table:
    """Throughput and latency, and factors of TPS."""
    best = comparison.best_baseline
    columns: tuple[Column[Row], ...] = (
        *NAMED,
        number("prefill TPS", _prefill, figures),
        number("TTFT ms", lambda row: _median(row.record.prefill), milliseconds),
        number("decode TPS", _decode_tps, figures),
        number("TPOT ms", lambda row: _median(row.record.decode), milliseconds),
        number("p95", lambda row: _p95(row.record.decode), milliseconds),
        number("× first", lambda row: comparison.factor(row, comparison.first), figures),
        number("× best base", lambda row: comparison.factor(row, best) if best else None, figures),
    )
    return Table.of("", columns, comparison.rows)


def _spread(comparison: Comparison, wall: Comparison | None) -> Table:
    """Spread of runs, and the same comparison in wall time."""
    in_wall_time = {row.number: row for row in wall.rows} if wall else {}
    columns: tuple[Column[Row], ...] = (
        *NAMED,
        number("runs", lambda row: len(row.step.tps_of_runs)),
        number("90 %", lambda row: row.step.tps, low_high),
    )
    if wall:
        columns += (number("wall TPS", lambda row: in_wall_time[row.number].tps, figures),)
    title = f"{str(comparison.phase).capitalize()} TPS over the runs"
    return Table.of(title, columns, comparison.rows)


def _decode_tps(row: Row) -> Estimate | None:
    step = row.step if row.step.phase is Phase.DECODE else row.record.decode
    return step.tps if step else None


def _median(steps: StepsRecord | None) -> Estimate | None:
    return steps.token_s.median if steps and steps.token_s else None


def _p95(steps: StepsRecord | None) -> Estimate | None:
    return steps.token_s.p95 if steps and steps.token_s else None


def _holds(row: Row) -> str:
    held = row.record.held
    layers = {sum(1 for num in rank.num_experts_per_layer if num) for rank in held}
    num_experts = experts_per_rank(row.record)
    memory = max((rank.weight_bytes for rank in held), default=0)
    if not num_experts:
        return f"no experts; up to {bytes_si(memory)}"
    return (
        f"{span(layers)} layer{'' if layers == {1} else 's'} × {span(num_experts)} "
        f"expert{'' if num_experts == {1} else 's'}, {part_of_expert(row.record)} of each; "
        f"up to {bytes_si(memory)}"
    )


def speed_of_links(virtual: VirtualTime, speed: LinkSpeed) -> float | None:
    """Factor on the assumed speed of links; None where transfers take no time."""
    return virtual.scale / speed.scale if speed.scale else None


def by_link_speed(results: Results, comparison: Comparison) -> Section:
    """Virtual time only: decode TPS on faster and slower links, and the best proposal's factor."""
    virtual = results.virtual_time
    heading = "Link speed (virtual time)"
    if virtual is None or comparison.source != "virtual" or not virtual.speeds:
        return Section(heading, ())

    def at(place: int) -> Column[Row]:
        speed = virtual.speeds[place]
        factor = speed_of_links(virtual, speed)
        name = "no links" if factor is None else times(factor)
        return number(name, lambda row: speed.tps[(row.number or 1) - 1], figures)

    columns: tuple[Column[Row], ...] = (*NAMED, *map(at, range(len(virtual.speeds))))
    return Section(
        heading,
        (
            Table.of(f"{comparison.phase} TPS by link speed", columns, comparison.rows),
            "1.00× is the assumed link speed.",
        ),
    )


def in_words(conditions: Conditions | None) -> str:
    """Conditions in words: `top-2, graph, balanced`."""
    if conditions is None:
        return ""
    return f"top-{conditions.top_k}, {how_run(conditions)}"


def how_run(conditions: Conditions | None) -> str:
    """Execution and routing in words: `graph, balanced`."""
    return "" if conditions is None else f"{conditions.execution}, {conditions.routing}"


def by_context(comparison: Comparison) -> Section:
    """Projected: TPOT and TPS at every context, and prefill."""
    rows, longest = comparison.rows, comparison.contexts[-1]
    factor: Column[Row] = number(
        f"× first at {comparison.context:,}", lambda row: row.tps / comparison.first.tps, figures
    )
    bounds = _steps(comparison, "TPOT", lambda step: low_high_ms(step.round_s), as_fits=False)
    parts: list[Words] = [
        Table.of(
            "Prefill TPS, and TPOT in ms by context",
            (*NAMED, number("prefill TPS", _prefill, figures), *_steps(comparison, "TPOT", tpot)),
            rows,
        ),
        Table.of("Decode TPS by context", (*NAMED, *_steps(comparison, "TPS", tps), factor), rows),
        Table.of(
            "Bounds: prefill TPS in thousands, and TPOT in ms by context",
            (NAMED[0], number("prefill, 1000 TPS", _prefill, low_high_thousands), *bounds),
            rows,
        ),
    ]
    if any(not comparison.at(row, longest).fits for row in rows):
        parts.append(
            f"{BEYOND} {comparison.num_seqs:,} sequences of this length do not fit into memory; "
            "shown ignoring the memory limit. Next to it: as many as fit (see memory)."
        )
    return Section(f"Projected: speed ({in_words(comparison.conditions)})", tuple(parts))


def _steps(
    comparison: Comparison, what: str, show: Callable[[StepsRecord], str], *, as_fits: bool = True
) -> list[Column[Row]]:
    """A column for each context, and one for what fits at the longest, if not all does."""
    made: list[Column[Row]] = [
        number(f"{what} at {context:,}", partial(comparison.at, context=context), show)
        for context in comparison.contexts
    ]
    if as_fits and any(map(comparison.fitting, comparison.rows)):
        made.append(number(f"at {comparison.contexts[-1]:,}, as fits", comparison.fitting, show))
    return made


def _prefill(row: Row) -> Estimate | None:
    return row.record.prefill.tps if row.record.prefill else None


def tpot(step: StepsRecord) -> str:
    """TPOT in milliseconds; marked where the sequences do not fit."""
    return milliseconds(step.round_s) + ("" if step.fits else BEYOND)


def tps(step: StepsRecord) -> str:
    """Tokens a second; marked where the sequences do not fit."""
    return figures(step.tps) + ("" if step.fits else BEYOND)


def by_conditions(results: Results, usual: Comparison) -> Section:
    """Projected: the step that is spoken of, and prefill, under all conditions."""
    of_all = [found for each in results.conditions if (found := projected(results, each))]
    context = f"{usual.context:,} tokens of context"
    parts: list[Words] = [
        _conditions(f"TPOT in ms at {context}", of_all, _round, milliseconds),
        _conditions(f"TPOT in ms at {context}, bounds", of_all, _round, low_high_ms),
        _conditions("Prefill TPS", of_all, _prefill, figures),
        _conditions("Prefill TPS in thousands, bounds", of_all, _prefill, low_high_thousands),
        *_graph_against_eager(of_all),
    ]
    if skew := results.question.get("skew"):
        parts.append(
            f"Skewed: expert popularity follows Zipf's law, exponent {skew:g}. Layouts with ep=1 "
            "shard every expert over all ranks of a stage, so skew causes no straggler."
        )
    return Section("Projected: routing and execution", tuple(parts))


def _round(row: Row) -> Estimate:
    return row.step.round_s


def _conditions(
    title: str,
    of_all: Sequence[Comparison],
    get: Callable[[Row], Estimate | None],
    show: Callable[[Estimate], str],
) -> Table:
    def under(comparison: Comparison) -> Column[Row]:
        rows = {row.number: row for row in comparison.rows}
        return number(how_run(comparison.conditions), lambda row: get(rows[row.number]), show)

    named = NAMED if show is milliseconds or show is figures else NAMED[:1]
    return Table.of(title, (*named, *map(under, of_all)), of_all[0].rows)


def _graph_against_eager(of_all: Sequence[Comparison]) -> list[str]:
    """Difference of steps with and without CUDA graphs, where both are projected."""
    by_case = {
        (each.conditions.routing, each.conditions.execution): each
        for each in of_all
        if each.conditions
    }
    differences = [
        abs(other.round_s.value / step.round_s.value - 1)
        for (routing, execution), graph in by_case.items()
        if execution == "graph" and (eager := by_case.get((routing, "eager")))
        for row, late in zip(graph.rows, eager.rows, strict=True)
        for context in graph.contexts
        for step, other in ((graph.at(row, context), eager.at(late, context)),)
    ]
    if not differences:
        return []
    most = percent(max(differences))
    if max(differences) >= _EVEN:
        return [f"Without CUDA graphs a decode step takes up to {most} longer."]
    return [
        f"CUDA graphs change a decode step by {most} at most: launches of fused kernels run "
        "ahead of a device that is this busy."
    ]


def memory(results: Results, comparison: Comparison) -> Section:
    """Projected: what a GPU holds, and how many sequences of full length there is room for."""
    wanted = comparison.num_seqs
    pools = [row.record.pools[0] for row in comparison.rows]
    num_fitting = [pool.num_resident or 0 for pool in pools]
    columns: tuple[Column[Row], ...] = (
        *NAMED,
        number("weights", lambda row: row.record.pools[0].weight_bytes, bytes_si),
        number("activations", lambda row: row.record.pools[0].activation_bytes, bytes_si),
        number("KV cache of all", lambda row: _kv_bytes(row, wanted), bytes_si),
        number(
            "sequences that fit",
            lambda row: min(row.record.pools[0].num_resident or 0, wanted),
            whole,
        ),
    )
    num_short = sum(num < wanted for num in num_fitting)
    if not num_short:
        sentence = f"All {wanted:,} sequences fit at full length everywhere."
    elif num_short == len(pools):
        sentence = f"No deployment holds all {wanted:,} sequences at full length."
    else:
        sentence = f"{num_short} of {len(pools)} do not hold all {wanted:,} sequences."
    return Section(
        "Projected: memory per GPU (the fullest)",
        (
            Table.of("", columns, comparison.rows),
            f"{sentence} A GPU has {bytes_si(results.projected_for.memory_bytes)}, of which "
            f"{bytes_si(pools[0].allowed_bytes or 0)} may be used. Sequences at full length, "
            "prompt and output.",
        ),
    )


def _kv_bytes(row: Row, num_seqs: int) -> float:
    """Bytes of the cache on a GPU; data-parallel ranks have sequences of their own."""
    num_caches = row.record.known_layout.dp * row.record.known_layout.replicas
    return (row.record.pools[0].sequence_bytes or 0) * num_seqs / num_caches
