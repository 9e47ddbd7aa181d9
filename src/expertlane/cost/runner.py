"""The runner on a virtual clock: prices step plans in place of executing them; without torch."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.profile import BOUNDS, LIKELY, Terms
from expertlane.cost.pricing import Pricing, StageWork
from expertlane.cost.replay import Clocks
from expertlane.cost.routing import RoutingSource
from expertlane.cost.step.operation import Floats
from expertlane.cost.step.program import ProgramBuilder, StepProgram, count
from expertlane.cost.throughput import MultiTokenAdapter
from expertlane.cost.timeline import ColdStart, StepTimes, Timeline, rank_events, stage_seconds
from expertlane.results.step_record import RankRecord
from expertlane.schedule.plan import Batch, StepOutcome, StepPlan
from expertlane.spec.names import Phase

_KEPT_RANKS = 1 << 15  # ranks of all kept steps together: a step's memory grows with its ranks
_FEWEST_KEPT = 64
_ROUNDING_S = 1e-9
_SEQS_APART = 64  # numbers of sequences within a 64th of each other share a price


@dataclass(eq=False)
class KnownWork:
    """A step, counted and priced.

    Attributes:
        work: [num_stages][num_micro_batches].
        cold_start: its course when all ranks were at rest before; None before that happened.
        alone: clocks after its micro-batches run by themselves, for `Timeline.run`.
    """

    program: StepProgram
    work: Sequence[Sequence[StageWork]]
    cold_start: ColdStart | None = None
    alone: dict[tuple[int, int], Clocks] = field(default_factory=dict)


_Chunks = tuple[tuple[int, int, bool], ...]  # new and cached positions, whether it yields a token


class _BatchSize(NamedTuple):
    """Decoding sequences of a batch, their cached positions, and its chunks of prompts."""

    num_decodes: int
    num_cached: int
    chunks: _Chunks


class StepSharing:
    """The steps of one deployment, for runners that may share it.

    A step takes the work of an earlier one that is alike in each micro-batch: the same number of
    decoding sequences, in all and on the fullest rank, to one in `_SEQS_APART`; about as many
    cached positions of theirs, to a multiple of `context_step` a sequence, or of `few_positions` a
    rank where that is more; and the same prompts beside each other on a node, the new and cached
    positions of each to a multiple of `context_step`. Ranks may change places: tokens of all of
    them choose experts by the same routing. So a step also takes an
    earlier one's sample of the routing; up to `num_samples` steps that are alike draw their own,
    and later ones take those in turn. The steps used least lately are forgotten.

    Args:
        num_ranks: ranks of a replica.
        few_positions: cached positions of a rank that take next to no time beside the rest.
        nodes: [dp]; of each data-parallel rank; None where each counts by itself.
    """

    def __init__(
        self,
        context_step: int,
        num_ranks: int,
        few_positions: int = 1,
        *,
        nodes: Sequence[int] | None = None,
        num_samples: int = 1,
    ) -> None:
        self._context_step = context_step
        self._few_positions = few_positions
        self._nodes = nodes
        self._num_samples = num_samples
        self._most_kept = max(_FEWEST_KEPT, _KEPT_RANKS // num_ranks)
        self._known: OrderedDict[object, _SharedSteps] = OrderedDict()

    def find(self, plan: StepPlan, make: Callable[[], KnownWork]) -> KnownWork:
        """The work of a step like this one; made where there are too few."""
        key = plan.replica, tuple([self._sizes(part) for part in plan.micro_batches])
        alike = self._known.get(key)
        if alike is None:
            alike = self._known[key] = _SharedSteps([])
            if len(self._known) > self._most_kept:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        alike.num_taken += 1
        if len(alike.works) < self._num_samples:
            alike.works.append(make())
            return alike.works[-1]
        return alike.works[alike.num_taken % len(alike.works)]

    def _sizes(self, batches: Sequence[Batch]) -> object:
        """Key of micro-batches that count as alike."""
        sizes = [self._size(batch) for batch in batches]
        if self._nodes is None:
            return tuple([(*self._decodes([size]), size.chunks) for size in sizes])
        prompts: dict[int, list[_Chunks]] = {}
        for node, size in zip(self._nodes, sizes, strict=True):
            if size.chunks:
                prompts.setdefault(node, []).append(size.chunks)
        of_nodes = sorted(tuple(sorted(each)) for each in prompts.values())
        return *self._decodes(sizes), *of_nodes

    def _decodes(self, sizes: "Sequence[_BatchSize]") -> tuple[int, ...]:
        """Key of some ranks' decoding sequences: their number, the most of a rank, positions."""
        counts = [size.num_decodes for size in sizes]
        num_decodes, most = sum(counts), max(counts)
        alike = max(num_decodes * self._context_step, len(sizes) * self._few_positions)
        return (
            _rounded(num_decodes),
            _rounded(most),
            round(sum(size.num_cached for size in sizes) / alike),
            counts.count(0),
        )

    def _size(self, batch: Batch) -> "_BatchSize":
        step, num_computed = self._context_step, batch.num_computed_tokens
        if batch.num_tokens == batch.num_seqs:
            return _BatchSize(batch.num_seqs, int(num_computed.sum()), ())
        is_chunk = batch.num_scheduled_tokens > 1
        chunks = sorted(
            (round(new / step), round(cached / step), yields)
            for new, cached, yields in zip(
                batch.num_scheduled_tokens[is_chunk].tolist(),
                num_computed[is_chunk].tolist(),
                batch.yields_token[is_chunk].tolist(),
                strict=True,
            )
        )
        num_cached = int(num_computed[~is_chunk].sum())
        return _BatchSize(batch.num_seqs - len(chunks), num_cached, tuple(chunks))


def _rounded(num_seqs: int) -> int:
    """A number of sequences rounded down, by at most a 64th."""
    return num_seqs - num_seqs % max(num_seqs // _SEQS_APART, 1)


@dataclass(eq=False)
class _SharedSteps:
    """Works of steps that are alike, and how often one was taken."""

    works: list[KnownWork]
    num_taken: int = 0


MADE_UP_TOKEN = 0


@dataclass(frozen=True, eq=False)
class StepHandle:
    """A step under way; times [B]."""

    plan: StepPlan
    submitted_s: Floats
    finished_s: Floats
    records: tuple[RankRecord, ...]


@dataclass(frozen=True, eq=False)
class PricedStep:
    """A priced step, for an observer.

    Attributes:
        plan: as ranks execute it; `program` and `work` may be another step's (`StepSharing`).
        work: [num_stages][num_micro_batches].
        follows: whether its replica went on with it, without a time in which no request was there.
    """

    plan: StepPlan
    program: StepProgram
    work: Sequence[Sequence[StageWork]]
    times: StepTimes
    follows: bool


@dataclass(eq=False)
class _Replica:
    timeline: Timeline
    phase: Phase | None = None
    ended_s: float = 0.0  # its last step


@dataclass(eq=False, repr=False)
class CostRunner:
    """Executes step plans on a virtual clock; implements `schedule.plan.Runner`.

    The clock has B times: low, likely and high. What is scheduled when follows from one of
    them, `lead`, and the others go along, each with its own times. Every token is `MADE_UP_TOKEN`.

    A step takes the driver `Terms.step_s` before the ranks have its plan; several replicas share
    the driver.

    Attributes:
        sharing: reuses the work of alike steps; None to count and price every step by itself.
        observe: called with every step.
        multi_token: adds drafts: decodes then advance further than their plans say.
        lead: place in `BOUNDS`.
        repeats: micro-batches in flight together run as by themselves, which is nearly exact.
        now_s: [B].
        bounds: by step, when it was submitted and finished: [B] each.
        num_priced: steps that were counted and priced.
    """

    builder: ProgramBuilder
    routing: RoutingSource
    pricing: Pricing
    terms: Terms
    _: KW_ONLY
    sharing: StepSharing | None = None
    observe: Callable[[PricedStep], None] | None = None
    multi_token: MultiTokenAdapter | None = None
    lead: int = LIKELY
    repeats: bool = False
    now_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)), init=False)
    bounds: dict[int, tuple[Floats, Floats]] = field(default_factory=dict, init=False)
    num_priced: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        layout = self.builder.layout
        self._num_tokens = 0
        self._replicas = [
            _Replica(Timeline(self.terms, layout.pp, layout.stage_size))
            for _ in range(layout.replicas)
        ]

    def wait_until(self, due_s: Floats | float) -> None:
        """Move the clock to a moment, [B] or one for all; no effect if it is past."""
        self.now_s = np.maximum(self.now_s, due_s)

    def submit(self, plan: StepPlan) -> StepHandle:
        """Begin a step."""
        submitted_s, layout = self.now_s, self.builder.layout
        driver_s = self.terms.step_s(layout)
        self.now_s = submitted_s + driver_s
        if self.multi_token is not None:
            plan = self.multi_token.adapt(plan)
        known = self._work(plan)
        replica = self._replicas[plan.replica]
        times = self._run(replica.timeline, known, plan)
        same_phase, replica.phase = replica.phase is plan.phase, plan.phase
        if self.observe is not None:
            # The driver may be at all other replicas first.
            idle_s = float((submitted_s - layout.replicas * driver_s)[self.lead]) - replica.ended_s
            follows = idle_s <= _ROUNDING_S
            self.observe(PricedStep(plan, known.program, known.work, times, follows))
        replica.ended_s = float(times.end_s[self.lead])
        records: tuple[RankRecord, ...] = ()
        if plan.record or plan.record_events:
            records = self._records(plan, known.program, times, count_idle=same_phase)
        self.bounds[plan.step] = submitted_s, times.end_s
        return StepHandle(plan, submitted_s, times.end_s, records)

    def first_done(self, handles: Sequence[StepHandle]) -> StepHandle:
        """Let time pass until one of the steps is finished, and say which."""
        first = min(handles, key=lambda handle: float(handle.finished_s[self.lead]))
        self.wait_until(first.finished_s)
        return first

    def collect(self, handle: StepHandle) -> StepOutcome:
        """Let time pass until a step is finished, and take its outcome."""
        self.wait_until(handle.finished_s)
        seq_ids = [seq for batch in handle.plan.batches for seq in batch.yielding_seq_ids]
        return StepOutcome(
            token_ids=dict.fromkeys(seq_ids, MADE_UP_TOKEN),
            logits={},
            records=handle.records,
            submitted_s=float(handle.submitted_s[self.lead]),
            finished_s=float(handle.finished_s[self.lead]),
        )

    def _work(self, plan: StepPlan) -> KnownWork:
        def make() -> KnownWork:
            program = self.builder.build(plan, self.routing, first_token=self._num_tokens)
            self.num_priced += 1
            return KnownWork(program, self.pricing.work(program))

        known = make() if self.sharing is None else self.sharing.find(plan, make)
        self._num_tokens += sum(batch.num_tokens for batch in plan.batches)
        return known

    def _run(self, timeline: Timeline, known: KnownWork, plan: StepPlan) -> StepTimes:
        may_skip = not plan.record_events
        if self.sharing is None or not may_skip or not timeline.is_at_rest(self.now_s):
            alone = known.alone if self.repeats else None
            return timeline.run(known.work, self.now_s, may_skip=may_skip, alone=alone)
        if known.cold_start is None:
            known.cold_start = timeline.cold_start(known.work)
        return timeline.repeat(known.cold_start, self.now_s)

    def _records(
        self, plan: StepPlan, program: StepProgram, times: StepTimes, *, count_idle: bool
    ) -> tuple[RankRecord, ...]:
        num_layers = self.builder.model.num_hidden_layers
        counts = iter(count(program, num_layers, self.builder.model.num_experts))
        of_stages = stage_seconds(times, num_layers, count_idle=count_idle)
        events = rank_events(times) if plan.record_events else {}
        records = []
        for pp_rank, of_stage in enumerate(of_stages):
            for place, (wall_s, blocked_s) in enumerate(
                zip(of_stage.wall_s, of_stage.blocked_s, strict=True)
            ):
                records.append(
                    RankRecord(
                        **vars(next(counts)),
                        wall_s=wall_s,
                        cpu_s=np.zeros_like(wall_s),
                        blocked_s=blocked_s,
                        process_cpu_s=0.0,
                        events=events.get((pp_rank, place)),
                    )
                )
        return tuple(records)
