"""Deployments set against each other: of one source, under one set of conditions, in one phase."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from expertlane.results.estimate import Estimate
from expertlane.results.hardware import VirtualTime
from expertlane.results.record import (
    EXPERIMENT,
    FASTEST,
    RUN,
    SCALING,
    Conditions,
    DeploymentRecord,
    PairRecord,
    Source,
    StepsRecord,
    choose_compared,
)
from expertlane.results.results import Results
from expertlane.spec.names import Cause, Phase, ProjectedCause

LINK_RANGE = 2.0  # factor by which links may be faster or slower than assumed


@dataclass(frozen=True)
class Row:
    """One deployment of a comparison.

    Attributes:
        number: its place in all tables, from 1; None for one that is not the experiment's.
        step: the projected step at `Comparison.context`, or all measured ones.
    """

    number: int | None
    record: DeploymentRecord
    step: StepsRecord

    @property
    def name(self) -> str:
        """The name that the experiment gives it."""
        return self.record.name

    @property
    def label(self) -> str:
        """Its name with its number in tables, so that shortened names stay distinct."""
        return f"#{self.number} {self.name}"

    @property
    def tps(self) -> float:
        """The likely TPS, or that of all repetitions together."""
        return self.step.tps.value

    @property
    def tps_per_rank(self) -> float:
        """`tps` over the deployment's ranks."""
        return self.tps / self.record.num_ranks

    @property
    def critical_path_tps(self) -> float:
        """TPS by CPU time on the critical path; 0 where none was counted."""
        path = self.step.critical_path
        return path.tps if path else 0.0

    @property
    def critical_path_tps_per_rank(self) -> float:
        """`critical_path_tps` over the deployment's ranks."""
        return self.critical_path_tps / self.record.num_ranks

    @property
    def latency_s(self) -> float:
        """The median of TPOT or TTFT; projected, the step in which each sequence gets a token."""
        median = self.step.token_s.median if self.step.token_s else None
        return (median or self.step.round_s).value


def step_of(row: Row) -> StepsRecord:
    """`row.step`."""
    return row.step


@dataclass(frozen=True)
class OverlapPair:
    """Two deployments that differ in overlap alone."""

    off: Row
    on: Row

    @property
    def exposed_s(self) -> float:
        """Seconds of a step blocked in dispatch and combine without overlap."""
        return _exposed_s(self.off)

    @property
    def hidden_s(self) -> float:
        """Seconds of a step that overlap keeps from being blocked in them."""
        return max(0.0, self.exposed_s - _exposed_s(self.on))

    @property
    def gained_s(self) -> float:
        """Seconds saved in a step, or round if rotating; negative where overlap costs time."""
        return self.off.step.round_s.value - self.on.step.round_s.value

    @property
    def hidden(self) -> float | None:
        """The share of transfers that overlap hides, 0 to 1; None where there are none to hide.

        In virtual time, of those in flight; else of what was exposed.
        """
        if self.on.record.source == "virtual":
            return self.on.step.hidden_share
        return hidden_share(self.hidden_s, self.exposed_s)

    @property
    def added_s(self) -> float:
        """Seconds that computing in two halves adds to a step."""
        return sum(
            self.on.step.breakdown_s.get(cause, 0.0) - self.off.step.breakdown_s.get(cause, 0.0)
            for cause in COMPUTING
        )


def hidden_share(hidden_s: float, exposed_s: float) -> float | None:
    """Share of a step's exposed transfers that overlap hides, 0 to 1; None without any."""
    return min(1.0, max(0.0, hidden_s / exposed_s)) if exposed_s > 0 else None


def _exposed_s(row: Row) -> float:
    if row.step.exposed_s is not None:
        return row.step.exposed_s
    return row.step.breakdown_s.get(ProjectedCause.DISPATCH_COMBINE, 0.0)


@dataclass(frozen=True)
class Comparison:
    """All deployments in one phase: decode, or prefill where nothing was decoded.

    Attributes:
        rows: in the experiment's order.
        conditions: None where real ranks ran.
        context: context of `Row.step` if projected; None where real ranks ran.
        contexts: all projected contexts, ascending.
        num_seqs: sequences of the workload.
        planned: the fastest step that a planner found, if one was looked for.
        pairs: the deployment that the first sentence is about with each that it is compared with,
            if they were measured in turns.
        named: their names, where the whole workload was projected.
        virtual: assumptions of virtual time about links.
    """

    source: Source
    phase: Phase
    rows: tuple[Row, ...]
    conditions: Conditions | None = None
    context: int | None = None
    contexts: tuple[int, ...] = ()
    num_seqs: int = 0
    planned: Row | None = None
    pairs: tuple[PairRecord, ...] = ()
    named: tuple[str, ...] = ()
    virtual: VirtualTime | None = None

    @cached_property
    def compared(self) -> tuple[Row, ...]:
        """Deployments of the first sentence (`choose_compared`); none if there is only one."""
        names = self.named
        if self.pairs:
            names = (self.pairs[0].name, *(each.other for each in self.pairs))
        if names:
            by_name = {row.name: row for row in self.rows}
            return tuple(by_name[name] for name in names)
        rows = self.rows
        places = choose_compared([row.record for row in rows], [row.tps for row in rows])
        return tuple(rows[place] for place in places)

    def pair_of(self, one: Row, other: Row) -> PairRecord | None:
        """Record of two rows that were measured in turns; None otherwise."""
        names = one.name, other.name
        return next((each for each in self.pairs if (each.name, each.other) == names), None)

    def on_links(self, one: Row, other: Row) -> Estimate:
        """Factor on the ratio of their TPS, with bounds for links half to twice as fast."""
        factors = [1.0]
        if self.virtual is not None and self.virtual.scale and one.number and other.number:
            for each in self.virtual.speeds:
                if 1 / LINK_RANGE <= each.scale / self.virtual.scale <= LINK_RANGE:
                    ratio = each.tps[one.number - 1] / each.tps[other.number - 1]
                    factors.append(ratio / (one.tps / other.tps))
        return Estimate(1.0, min(factors), max(factors))

    @property
    def is_run(self) -> bool:
        """True if real ranks ran, also where times are virtual."""
        return self.source in RUN

    @property
    def clock(self) -> str:
        """The clock of its times, in words."""
        return {"measured": "wall time", "virtual": "virtual time"}.get(self.source, self.source)

    @property
    def latency_name(self) -> str:
        """Name of the latency: TPOT or TTFT."""
        return "TPOT" if self.phase is Phase.DECODE else "TTFT"

    @property
    def first(self) -> Row:
        """The experiment's first deployment."""
        return self.rows[0]

    @property
    def fastest(self) -> Row:
        """The deployment with the highest TPS."""
        return max(self.rows, key=lambda row: row.tps)

    @property
    def baselines(self) -> list[Row]:
        """The deployments that an experiment compares against."""
        return [row for row in self.rows if row.record.is_baseline]

    @property
    def proposals(self) -> list[Row]:
        """All deployments that are not baselines."""
        return [row for row in self.rows if not row.record.is_baseline]

    @cached_property
    def best_baseline(self) -> Row | None:
        """The fastest baseline, if there is one."""
        return _fastest(self.baselines)

    @cached_property
    def best_proposal(self) -> Row | None:
        """The fastest proposal, if there is one."""
        return _fastest(self.proposals)

    @property
    def cast(self) -> list[Row]:
        """The first, the best baseline and the best proposal, which sentences are about."""
        cast = [self.first, self.best_baseline, self.best_proposal]
        return list({row.number: row for row in cast if row is not None}.values())

    def factor(self, row: Row, base: Row) -> float:
        """TPS of `row` over `base`; for two measured in turns, their ratio in those turns."""
        if pair := self.pair_of(row, base):
            return pair.ratio.value
        if pair := self.pair_of(base, row):
            return 1 / pair.ratio.value
        return row.tps / base.tps

    @property
    def overlapped(self) -> list[OverlapPair]:
        """Pairs of deployments that decode and differ in overlap alone."""
        if self.phase is not Phase.DECODE:
            return []
        return [
            OverlapPair(off, on)
            for off in self.rows
            for on in self.rows
            if on.record.known_options.overlap is True
            and off.record.layout == on.record.layout
            and off.record.known_options == replace(on.record.known_options, overlap=False)
        ]

    def at(self, row: Row, context: int) -> StepsRecord:
        """The projected decode step of all sequences.

        Raises:
            ValueError: there is none at this context.
        """
        step = row.record.decode_of(context, self.num_seqs)
        if step is None:
            raise ValueError(f"{row.name} has no step at {context}")
        return step

    def fitting(self, row: Row) -> StepsRecord | None:
        """The step of as many sequences as fit at the longest context; None where all do."""
        longest = self.contexts[-1]
        if self.at(row, longest).fits:
            return None
        steps = row.record.steps_of(Phase.DECODE)
        fewer = (s for s in steps if s.context == longest and s.num_seqs < self.num_seqs)
        return next(fewer, None)


def _fastest(rows: Iterable[Row]) -> Row | None:
    return max(rows, key=lambda row: row.tps, default=None)


def run(results: Results, source: Source) -> Comparison | None:
    """The comparison of measured deployments, in wall time (`measured`) or `virtual` time."""
    records = results.select(source, EXPERIMENT)
    if not records or results.is_of_servers:
        return None
    phase = Phase.DECODE if all(each.decode for each in records) else Phase.PREFILL
    steps = [each.decode if phase is Phase.DECODE else each.prefill for each in records]
    return Comparison(
        source,
        phase,
        _rows(records, steps),
        pairs=results.pairs_of(source),
        virtual=results.virtual_time if source == "virtual" else None,
    )


def projected(results: Results, conditions: Conditions | None = None) -> Comparison | None:
    """The comparison projected under some conditions, or the usual ones; None without any.

    Raises:
        ValueError: a deployment has no step at the context that is spoken of.
    """
    if not results.conditions:
        return None
    conditions = conditions or results.conditions[0]
    context = results.context or 0
    records = results.select("projected", EXPERIMENT, conditions)
    decodes = records[0].steps_of(Phase.DECODE)  # at each context, that of all sequences first
    num_seqs = next((step.num_seqs for step in decodes if step.context == context), 0)
    steps = [each.decode_of(context, num_seqs) for each in records]
    found = results.select("projected", FASTEST, conditions)
    planned = [Row(None, each, s) for each in found if (s := each.decode_of(context, num_seqs))]
    return Comparison(
        "projected",
        Phase.DECODE,
        _rows(records, steps),
        conditions,
        context,
        tuple(sorted({step.context for step in decodes if step.context is not None})),
        num_seqs,
        planned[0] if planned else None,
        named=results.workload.compared if results.workload else (),
    )


def _rows(
    records: Sequence[DeploymentRecord], steps: Sequence[StepsRecord | None]
) -> tuple[Row, ...]:
    rows = []
    for place, (record, step) in enumerate(zip(records, steps, strict=True), 1):
        if step is None:
            raise ValueError(f"{record.name} has no step to compare")
        rows.append(Row(place, record, step))
    return tuple(rows)


@dataclass(frozen=True)
class Size(Row):
    """One size of a family of layouts, with its decode steps of all sequences.

    Attributes:
        share: steps of as many sequences a rank as the experiment's largest deployment has; the
            same steps where that is all of them.
    """

    share: StepsRecord

    @property
    def share_tps_per_rank(self) -> float:
        """TPS of `share` over the deployment's ranks."""
        return self.share.tps.value / self.record.num_ranks

    @property
    def critical_path_share_tps_per_rank(self) -> float:
        """TPS of `share` per rank by CPU time on the critical path; 0 where none was counted."""
        path = self.share.critical_path
        return path.tps / self.record.num_ranks if path else 0.0


def scaling(results: Results, source: Source) -> list[Size]:
    """Sizes of scaling; measured, with the experiment's own deployments at missing sizes.

    Those are of the same family: layouts that differ in `dp` and `ep` alone, same options.
    """
    records = list(results.select(source, SCALING))
    if source in RUN:
        families = {_family(each) for each in records}
        own = results.select(source, EXPERIMENT)
        records += [each for each in own if _family(each) in families]
    by_size: dict[int, Size] = {}
    for record in records:
        steps = record.steps_of(Phase.DECODE)
        if steps:
            by_size.setdefault(record.known_layout.ep, Size(None, record, steps[0], steps[-1]))
    return [by_size[size] for size in sorted(by_size)]


def _family(record: DeploymentRecord) -> tuple[object, ...]:
    layout = record.known_layout
    own = layout.replicas, layout.pp, layout.tp, layout.etp
    return *own, record.known_options


LEAST_SHARE = 0.005  # of the step; smaller differences are added up as OTHER
_LEAST_REST = 0.001  # likewise; a smaller OTHER is rounding
OTHER = "other"


@dataclass(frozen=True)
class StepDifference:
    """From the slower to the faster step, in milliseconds, for a waterfall.

    Attributes:
        slower_ms, faster_ms: a decode step of every sequence, or the prefill.
        causes: each with its milliseconds in the faster step less those in the slower one:
            first what is saved, then what is added, the largest first; `OTHER` last, so that
            they sum to `faster_ms - slower_ms`.
    """

    slower_ms: float
    faster_ms: float
    causes: tuple[tuple[str, float], ...]


def step_difference(slower: Row, faster: Row) -> StepDifference:
    """The difference between two deployments' steps; both of one source and phase."""
    slow_s, fast_s = slower.step.breakdown_s, faster.step.breakdown_s
    slower_ms, faster_ms = (1e3 * sum(each.values()) for each in (slow_s, fast_s))
    by_cause = {
        cause: 1e3 * (fast_s.get(cause, 0.0) - slow_s.get(cause, 0.0))
        for cause in dict.fromkeys([*slow_s, *fast_s])
    }
    return difference_of(slower_ms, faster_ms, by_cause)


def difference_of(
    slower_ms: float, faster_ms: float, by_cause: Mapping[str, float]
) -> StepDifference:
    """The difference in the order of a waterfall, small causes summed.

    Args:
        by_cause: milliseconds of the faster step less those of the slower one, of all causes or
            of some.
    """
    named = {c: ms for c, ms in by_cause.items() if abs(ms) >= LEAST_SHARE * slower_ms}
    ordered = sorted(named.items(), key=lambda item: (item[1] > 0, -abs(item[1])))
    rest = faster_ms - slower_ms - sum(named.values())
    if abs(rest) >= _LEAST_REST * slower_ms:
        ordered.append((OTHER, rest))
    return StepDifference(slower_ms, faster_ms, tuple(ordered))


def experts_at_once(record: DeploymentRecord) -> int:
    """Experts of one layer that compute at the same time: `ep` in each replica."""
    return record.known_layout.ep * record.known_layout.replicas


def stages_at_once(record: DeploymentRecord) -> int:
    """Pipeline stages with work at the same time: no more than micro-batches to fill them."""
    return min(record.known_layout.pp, record.known_options.num_micro_batches)


def experts_per_rank(record: DeploymentRecord) -> set[int]:
    """Experts of a layer of which a rank holds all or a part; several where `ep` is uneven."""
    held = (num for rank in record.held for num in rank.num_experts_per_layer)
    return {num for num in held if num}


def part_of_expert(record: DeploymentRecord) -> str:
    """`all`, or the share of each expert that a rank holds."""
    return "all" if record.known_layout.etp == 1 else f"1/{record.known_layout.etp}"


def weight_bytes_of_rank(row: Row) -> float:
    """Bytes of weights that a rank reads in one decode step of every sequence.

    Projected: of the rank that reads most; measured: mean over ranks.
    """
    step = row.step
    if step.most_weight_bytes is not None:
        return step.most_weight_bytes
    total = sum(step.weight_bytes.values())
    return total / row.record.num_ranks / (step.num_rounds or step.num_steps)


COMPUTING = (Cause.ATTENTION, Cause.ROUTER, Cause.EXPERTS, Cause.HEAD)
COMMUNICATION = (
    Cause.DISPATCH_COMBINE,
    Cause.TP_COLLECTIVES,
    Cause.HAND_OVER,
    Cause.WAITING,
    Cause.PIPELINE_BUBBLE,
)
