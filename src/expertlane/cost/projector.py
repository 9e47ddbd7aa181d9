"""Projection of one deployment: steps of given sizes, their memory, and where time goes.

Every rank's own counts are priced and replayed on a virtual clock, so this is the model in full,
where the closed form has one rank stand for all.

The three clocks of `BOUNDS` have all laws low, all likely and all high. `ClocksByLaw` adds two for
every error: one law low or high and all others likely, so that what two deployments share can
cancel (`planner.ranking`).

What is one error, the same wherever it occurs, and so in two deployments at once:

- of a law that was fitted, the scatter of its measurements around it: of alike sizes (the same to
  a power of two, of what the law is looked up by). How far it is off for one size says next to
  nothing of another, twice as large (docs/validation.md);
- where a law stands in for another device or type, what its bounds are wider for that: of the law;
- of a law that nothing was measured for, and of single terms, launch and driver for example: all;
- how well transfers hide behind what computes beside them.

Different errors are independent of each other.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np

from expertlane.cost.breakdown import (
    Breakdown,
    BreakdownTable,
    basis_shares,
    floor_s,
)
from expertlane.cost.laws.device import looked_up_by
from expertlane.cost.laws.profile import (
    BOUNDS,
    LIKELY,
    Execution,
    ModelledCluster,
    Profile,
    Terms,
    kernels_of,
)
from expertlane.cost.laws.times import Basis, Times
from expertlane.cost.pricing import Block, Pricing, StageWork, TimedStep, law_dtype
from expertlane.cost.replay import Clocks
from expertlane.cost.routing import LoadedRouting, placed
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.operation import Floats, NumberTypes, Operation, Transfer
from expertlane.cost.step.program import ProgramBuilder, StepProgram, most_weight_bytes
from expertlane.cost.throughput import MultiToken
from expertlane.cost.timeline import StepTimes, Timeline, rank_events
from expertlane.results.estimate import Estimate
from expertlane.results.record import StepsRecord
from expertlane.results.step_record import RankEvents
from expertlane.results.timeline import StepTimeline, timeline_of
from expertlane.spec.deployment import DispatchMode, Options, PayloadType
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase

LawError = tuple[str, tuple[int, ...]]  # the law, and the sizes where it is of alike sizes alone
ErrorSeconds = Mapping[LawError, tuple[float, float]]  # at the error's low and its high

_HIDING = "hiding of transfers", ()
_SINGLE_TERMS = ("launch_s", "driver_s", "driver_per_rank_s", "dp_sync_s")
_HIGH = BOUNDS.index("high")
_Work = Sequence[Sequence[StageWork]]  # [num_stages][num_micro_batches]


@dataclass(frozen=True, eq=False)
class ClocksByLaw:
    """The clocks of some steps: those of `BOUNDS`, then two for each error."""

    errors: Sequence[LawError]
    _types: NumberTypes

    @classmethod
    def of(cls, works: Sequence[_Work], terms: Terms, types: NumberTypes) -> "ClocksByLaw":
        """Clocks for all errors that these steps, and the terms of their execution, have."""
        found: dict[LawError, None] = {_HIDING: None}
        found |= dict.fromkeys((name, ()) for name in (*_SINGLE_TERMS, *terms.in_series))
        for stage in (each for work in works for of_stage in work for each in of_stage):
            for timed in _steps_of(stage):
                found |= dict.fromkeys(_errors(timed.step, timed.times, types))
            if stage.hand_over is not None:
                found |= dict.fromkeys(_errors(None, stage.hand_over, types))
        return cls(list(found), types)

    def terms(self, terms: Terms) -> Terms:
        """The terms on all clocks."""
        hiding = [*BOUNDS, *[BOUNDS[LIKELY]] * (2 * len(self.errors))]
        low, high = self._clocks(_HIDING)
        hiding[low], hiding[high] = BOUNDS[0], BOUNDS[_HIGH]

        def on_clocks(name: str, bounds: Floats) -> Floats:
            error: LawError = name, ()
            return self._on_clocks(bounds, {error: bounds} if error in self.errors else {})

        return terms.changed(on_clocks, hiding)

    def work(self, works: Sequence[_Work]) -> list[list[list[StageWork]]]:
        """Steps with times on all clocks; blocks that were shared stay shared."""
        blocks: dict[int, Block] = {}
        steps: dict[int, TimedStep] = {}

        def timed(step: TimedStep) -> TimedStep:
            if id(step) not in steps:
                steps[id(step)] = replace(step, times=self._times(step.step, step.times))
            return steps[id(step)]

        def block(one: Block) -> Block:
            if id(one) not in blocks:
                blocks[id(one)] = Block([timed(each) for each in one.steps], one.layers)
            return blocks[id(one)]

        def stage(one: StageWork) -> StageWork:
            sent = None if one.hand_over is None else self._times(None, one.hand_over)
            return StageWork([[block(each) for each in part] for part in one.parts], sent)

        known: dict[int, list[list[StageWork]]] = {}
        for work in works:  # of equal sizes one stands for all
            if id(work) not in known:
                known[id(work)] = [[stage(each) for each in of_stage] for of_stage in work]
        return [known[id(work)] for work in works]

    def seconds(self, on_clocks: Floats) -> ErrorSeconds:
        """Seconds at the low and the high of each error, from seconds [B] on all clocks."""
        pairs = on_clocks[len(BOUNDS) :].reshape(-1, 2).tolist()
        return {error: (low, high) for error, (low, high) in zip(self.errors, pairs, strict=True)}

    def _clocks(self, error: LawError) -> tuple[int, int]:
        low = len(BOUNDS) + 2 * self.errors.index(error)
        return low, low + 1

    def _on_clocks(self, bounds: Floats, of_errors: Mapping[LawError, Floats]) -> Floats:
        """Bounds [3, ...] on all clocks, [B, ...]: likely but on those of its own errors."""
        num = len(BOUNDS) + 2 * len(self.errors)
        spread = np.broadcast_to(bounds[LIKELY], (num, *bounds.shape[1:])).copy()
        spread[: len(BOUNDS)] = bounds
        for error, own in of_errors.items():
            low, high = self._clocks(error)
            spread[low], spread[high] = own[0], own[_HIGH]
        return spread

    def _times(self, step: Operation | Transfer | None, times: Times) -> Times:
        of_errors = _errors(step, times, self._types)
        return replace(times, bounds=self._on_clocks(times.bounds, of_errors))


def _steps_of(stage: StageWork) -> Iterator[TimedStep]:
    return (timed for part in stage.parts for block in part for timed in block.steps)


def _errors(
    step: Operation | Transfer | None, times: Times, types: NumberTypes
) -> dict[LawError, Floats]:
    """A step's errors, and its bounds [3, R] under each; the step of a PP transfer is None."""
    law, sizes = _law_of(step, types)
    low, likely, high = times.bounds
    if times.basis is Basis.BOUND and times.wider == 1:
        return {(law, ()): times.bounds}
    alike = tuple(np.rint(np.log2(np.maximum(sizes, 1))).astype(int).tolist())
    scatter = np.array(
        [np.minimum(low * times.wider, likely), likely, np.maximum(high / times.wider, likely)]
    )
    if times.wider == 1:
        return {(law, alike): scatter}
    common = np.array(
        [np.maximum(low, likely / times.wider), likely, np.minimum(high, likely * times.wider)]
    )
    return {(law, ()): common, (law, alike): scatter}


def _law_of(step: Operation | Transfer | None, types: NumberTypes) -> tuple[str, list[float]]:
    """The name of a step's law, and the sizes it is looked up by, each the largest of all ranks."""
    if step is None:
        return "send", []
    if isinstance(step, Operation):
        looked_up = looked_up_by(step.kind, step.sizes)
        name = f"{step.kind}.{law_dtype(types, step)}"
        return name, [float(np.max(size)) for size in looked_up.values()]
    load = step.load
    where = "inter_node" if (load.num_nodes > 1).any() else "intra_node"
    carried = np.maximum(load.out_bytes, load.in_bytes).sum(axis=0)
    name = f"{step.stage.label}.{step.kind}.{where}"
    return name, [float(carried.max()), float(load.group_size.max())]


@dataclass(frozen=True)
class Setting:
    """Conditions that all deployments of a plan or comparison share.

    Attributes:
        routing: source of the experts that tokens choose.
        payload: number type in which hidden states are dispatched.
        step_tokens: tokens of a prefill step, as for `memory.prefill_step_tokens`.
        multi_token: drafts of deployments that use multi-token prediction.
    """

    types: NumberTypes
    execution: Execution
    routing: LoadedRouting
    payload: PayloadType = "model"
    step_tokens: int | None = None
    multi_token: MultiToken = field(default_factory=MultiToken)


_ROUNDS = 3  # rounds of rotating micro-batches; the last one counts


@dataclass(frozen=True)
class StepSize:
    """A step of alike sequences, over the whole system.

    Attributes:
        num_seqs: sequences that take part.
        num_new, num_cached: new tokens of each, and positions cached before.
        fits: whether it fits into memory.
    """

    num_seqs: int
    num_new: int
    num_cached: int
    fits: bool = True
    phase: Phase = Phase.DECODE


@dataclass(frozen=True, eq=False)
class StepByStage:
    """A projected step, split by cause as a rank's clock splits a measured one.

    Attributes:
        seconds: of the step, or round.
    """

    seconds: float
    _shares: Callable[[], Mapping[str, float]]
    _works: Sequence[_Work]

    @property
    def causes_s(self) -> Mapping[str, float]:
        """Seconds by `Cause`, and by causes of `ProjectedCause` that have other names there."""
        shares = self._shares().items()
        return {cause: self.seconds * share for cause, share in shares if share}

    def timed(self) -> Iterator[tuple[Operation | Transfer | None, Times]]:
        """All operations and transfers with their times; None is a PP transfer."""
        for stage in (each for work in self._works for of_stage in work for each in of_stage):
            for step in _steps_of(stage):
                yield step.step, step.times
            if stage.hand_over is not None:
                yield None, stage.hand_over


class Projector:
    """Projects steps of one deployment on one cluster.

    Where an option is `auto`, each step takes the fastest form, with or without overlap.

    Args:
        num_drafts: draft tokens per step.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        options: Options,
        cluster: ModelledCluster,
        setting: Setting,
        num_drafts: int = 0,
    ) -> None:
        ranks_per_node = cluster.profile.ranks_per_node
        self._modes = {
            phase: options.of_phase(phase).modes(layout, ranks_per_node) for phase in Phase
        }
        self._num_drafts = num_drafts
        self._layout = layout
        self._options = options
        self._setting = setting
        self._price_by(cluster.profile)
        self._programs: dict[Hashable, StepProgram] = {}
        self._builder = ProgramBuilder(
            model,
            layout,
            placed(model, layout, options, setting.routing, ranks_per_node),
            types=setting.types,
            payload=options.payload,
            ranks_per_node=ranks_per_node,
            kernels=kernels_of(cluster.profile),
            num_drafts=num_drafts,
        )

    def _price_by(self, profile: Profile) -> None:
        self._device = profile.device
        self._terms = Terms.of(profile, self._setting.execution)
        self._pricing = Pricing(profile, self._setting.types)

    def repriced(self, profile: Profile) -> "Projector":
        """A projector of this deployment under other laws, which shares the steps' operations."""
        other = copy(self)
        other._price_by(profile)
        return other

    def by_stage(self, size: StepSize, mode: DispatchMode) -> "StepByStage":
        """One step as it would be measured: its likely time, and parts of it by cause."""
        _, works = self._priced(size, mode, is_kept=True)
        timeline = Timeline(self._terms, self._layout.pp, self._layout.stage_size)
        ran = self._rounds(works, timeline, self._terms)
        seconds = float(_last_round_s(ran, works)[LIKELY])

        def shares() -> Mapping[str, float]:
            return self._explained(ran, works, by_stage=True).shares

        return StepByStage(seconds, shares, works)

    def fastest_mode(self, size: StepSize) -> DispatchMode:
        """The dispatch form, with or without overlap, that a step takes."""
        first, *others = self._modes[size.phase]
        if not others:
            return first
        return min((first, *others), key=lambda mode: self.by_stage(size, mode).seconds)

    def step(self, size: StepSize) -> StepsRecord:
        """One step; of rotating micro-batches, a round."""
        steps = (self._step(*self._priced(size, mode), size) for mode in self._modes[size.phase])
        return min(steps, key=lambda step: step.round_s.value)

    def step_by_error(self, size: StepSize) -> tuple[StepsRecord, ErrorSeconds]:
        """One step of a deployment with a single mode, and its seconds under each law's error."""
        (mode,) = self._modes[size.phase]
        programs, works = self._priced(size, mode)
        clocks = ClocksByLaw.of(works, self._terms, self._setting.types)
        run = self._run(clocks.work(works), clocks.terms(self._terms))
        return self._step(programs, works, size, run), clocks.seconds(run[0])

    def likely_s(self, size: StepSize) -> float:
        """Likely seconds of one step, or round, of a deployment with a single mode.

        Rotating micro-batches are taken as independent, nearly so: use it for ratios of such times.
        """
        (mode,) = self._modes[size.phase]
        _, works = self._priced(size, mode)
        timeline = Timeline(self._terms, self._layout.pp, self._layout.stage_size)
        ran = self._rounds(works, timeline, self._terms, as_alone=True)
        return float(_last_round_s(ran, works)[LIKELY])

    def _step(
        self,
        programs: Sequence[StepProgram],
        works: Sequence[list[list[StageWork]]],
        size: StepSize,
        run: tuple[Floats, Breakdown] | None = None,
    ) -> StepsRecord:
        seconds, breakdown = run or self._run(works, self._terms)
        num_tokens = size.num_seqs * size.num_new
        by_basis, extrapolated = basis_shares(works)
        wall_s = Estimate.between(seconds[: len(BOUNDS)])
        return StepsRecord(
            phase=size.phase,
            context=size.num_cached,
            num_steps=1,
            num_rounds=1,
            num_tokens=num_tokens,
            num_seqs=size.num_seqs,
            wall_s=wall_s,
            tps=num_tokens * self._tokens_per_step(size.phase) / wall_s,
            breakdown_s={
                str(cause): wall_s.value * share for cause, share in breakdown.shares.items()
            },
            floor_s=floor_s(programs, self._device, self._setting.types),
            flops_utilisation=float(breakdown.flops_utilisation),
            read_utilisation=float(breakdown.bytes_utilisation),
            basis_shares=by_basis,
            extrapolated_share=extrapolated,
            most_weight_bytes=most_weight_bytes(programs),
            fits=size.fits,
        )

    def _tokens_per_step(self, phase: Phase) -> float:
        """Tokens that a sequence yields for each new token of a step."""
        is_drafted = self._num_drafts and phase is Phase.DECODE
        return self._setting.multi_token.tokens_per_step if is_drafted else 1.0

    def timeline(self, size: StepSize) -> StepTimeline:
        """Timeline of every rank of a replica in such a step, or round."""
        layout, modes = self._layout, self._modes[size.phase]
        mode, *others = modes
        if others:
            mode = min(
                modes,
                key=lambda each: self._step(*self._priced(size, each), size).round_s.value,
            )
        _, works = self._priced(size, mode)
        timeline = Timeline(self._terms, layout.pp, layout.stage_size)
        events: list[tuple[int, int, RankEvents]] = []
        ran = self._rounds(works, timeline, self._terms, may_skip=False)
        for times, place in ran[-len(works) :]:
            events += [
                (pp_rank * layout.stage_size + of_stage, place, of_rank)
                for (pp_rank, of_stage), of_rank in rank_events(times).items()
                if len(of_rank.begin_s)
            ]
        num_tokens = size.num_seqs * size.num_new
        return timeline_of(events, num_tokens=num_tokens, num_seqs=size.num_seqs)

    def _priced(
        self, size: StepSize, mode: DispatchMode, *, is_kept: bool = False
    ) -> tuple[Sequence[StepProgram], Sequence[list[list[StageWork]]]]:
        groups = self._groups(size)
        alike: dict[str, tuple[StepProgram, list[list[StageWork]]]] = {}
        for group in groups:  # equal sizes share one program
            if str(group) not in alike:
                key = str(group), size, mode
                program = self._programs.get(key) or self._program(group, size, mode)
                if is_kept:
                    self._programs[key] = program
                alike[str(group)] = program, self._pricing.work(program)
        programs, works = zip(*(alike[str(group)] for group in groups), strict=True)
        return programs, works

    def _groups(self, size: StepSize) -> list[list[list[int]]]:
        """[steps in flight][micro-batches][dp]; sequences of the fullest replica."""
        layout, options = self._layout, self._options
        of_replica = len(partition(size.num_seqs, layout.replicas)[0])
        of_rank = [len(part) for part in partition(of_replica, layout.dp)]
        m = options.num_micro_batches
        cut = [[len(partition(num, m)[place]) for num in of_rank] for place in range(m)]
        if options.micro_batch_schedule == "rotating":
            return [[part] for part in cut if any(part)]
        return [[part for part in cut if any(part)]]

    def _program(
        self, micro_batches: list[list[int]], size: StepSize, mode: DispatchMode
    ) -> StepProgram:
        cut = [(mode.form, self._halves(each, size, mode.overlap)) for each in micro_batches]
        return self._builder.build_sized(cut, self._setting.routing)

    def _halves(self, num_seqs: list[int], size: StepSize, overlap: bool) -> list[PartSizes]:
        num_parts = 2 if overlap and max(num_seqs) > 1 else 1
        halves = [
            [len(partition(num, num_parts)[place]) for num in num_seqs]
            for place in range(num_parts)
        ]
        layout = self._layout
        drafts = self._num_drafts if size.phase is Phase.DECODE else 0
        return [
            PartSizes.even(layout.dp, layout.tp, half, size.num_new, size.num_cached, drafts)
            for half in halves
            if any(half)
        ]

    def _run(
        self, works: Sequence[list[list[StageWork]]], terms: Terms
    ) -> tuple[Floats, Breakdown]:
        """[B]; seconds of a round in the steady state, and the breakdown of the likely ones."""
        timeline = Timeline(terms, self._layout.pp, self._layout.stage_size)
        ran = self._rounds(works, timeline, terms)
        return _last_round_s(ran, works), self._explained(ran, works)

    def _explained(
        self,
        ran: Sequence[tuple[StepTimes, int]],
        works: Sequence[object],
        by_stage: bool = False,
    ) -> Breakdown:
        """The last round, as it is measured: with the driver's time since the step before it.

        Of rotating micro-batches others are under way meanwhile.
        """
        since_s = float(ran[-2][0].end_s[LIKELY]) if len(works) == 1 else None
        table = BreakdownTable(self._device, self._setting.types, by_stage=by_stage)
        for times, _ in ran[-len(works) :]:
            table.add(times, since_s)
        return table.result()

    def _rounds(
        self,
        works: Sequence[list[list[StageWork]]],
        timeline: Timeline,
        terms: Terms,
        *,
        may_skip: bool = True,
        as_alone: bool = False,
    ) -> list[tuple[StepTimes, int]]:
        """Steps up to the steady state, each with its group; the last round is in it."""
        alone: defaultdict[int, dict[tuple[int, int], Clocks]] = defaultdict(dict)
        driver_s = terms.step_s(self._layout)
        ends: Floats = np.zeros((len(works), terms.num_clocks))  # of each group's last step
        ran = []
        if len(works) == 1 and may_skip:
            cold = timeline.cold_start(works[0])
            first = timeline.repeat(cold, driver_s)
            if timeline.is_at_rest(next_s := first.end_s + driver_s):
                return [(first, 0), (timeline.repeat(cold, next_s), 0)]
            ends[0] = first.end_s
            ran.append((first, 0))
        planned_s = np.zeros(terms.num_clocks)
        while len(ran) < len(works) * (_ROUNDS if len(works) > 1 else 2):
            for place, work in enumerate(works):
                planned_s = np.maximum(planned_s, ends[place]) + driver_s  # one driver for all
                times = timeline.run(
                    work,
                    planned_s,
                    may_skip=may_skip,
                    alone=alone[id(work)] if as_alone and len(works) > 1 else None,
                )
                ends[place] = times.end_s
                ran.append((times, place))
        return ran


def _last_round_s(ran: Sequence[tuple[StepTimes, int]], works: Sequence[object]) -> Floats:
    """[B]; seconds of the last round, from steps with their groups up to the steady state."""
    seconds: Floats = ran[-1][0].end_s - ran[-1 - len(works)][0].end_s
    return seconds
