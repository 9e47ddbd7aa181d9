"""The runner on a virtual clock: prices step plans in place of executing them; without torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from expertlane.cost.breakdown import Why, WhyTable
from expertlane.cost.laws.execution import BOUNDS, LIKELY, Terms
from expertlane.cost.multi_token import Stretch
from expertlane.cost.pricing import Pricing, StageWork
from expertlane.cost.routing import RoutingSource
from expertlane.cost.sharing import KnownWork, StepSharing
from expertlane.cost.step.program import ProgramBuilder, StepProgram
from expertlane.cost.step.totals import count
from expertlane.cost.step_log import rank_events, stage_seconds
from expertlane.cost.timeline import StepTimes, Timeline
from expertlane.results.step_record import RankRecord
from expertlane.schedule.drive import FinishedStep
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase

Floats = npt.NDArray[np.float64]

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
    """A step as an observer sees it.

    Attributes:
        plan: as the ranks take it; `program` and `work` may be another step's (`StepSharing`).
        work: [num_stages][num_micro_batches].
    """

    plan: StepPlan
    program: StepProgram
    work: Sequence[Sequence[StageWork]]
    times: StepTimes


@dataclass(eq=False)
class _Replica:
    timeline: Timeline
    phase: Phase | None = None
    why: dict[Phase, WhyTable] = field(default_factory=dict)


class CostRunner:
    """Executes step plans on a virtual clock; implements `schedule.plan.Runner`.

    The clock has three hands, B: low, likely and high. What is scheduled when follows from one of
    them, `lead`, and the others go along, each with its own times. Every token is `MADE_UP_TOKEN`.

    A step takes the driver `Terms.step_s` before the ranks have its plan; several replicas share
    the driver.

    Attributes:
        now_s: [B].
        bounds: by step, when it was submitted and finished: [B] each.
        num_priced: steps that were counted and priced.
        lead: place in `BOUNDS`.

    Args:
        sharing: of steps that are alike; None to count and price every step for itself.
        explain: keep `why` tables.
        observe: told of every step.
        stretch: of multi-token prediction; decode steps then go further than their plans say.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        builder: ProgramBuilder,
        routing: RoutingSource,
        pricing: Pricing,
        terms: Terms,
        *,
        sharing: StepSharing | None = None,
        explain: bool = False,
        observe: Callable[[PricedStep], None] | None = None,
        stretch: Stretch | None = None,
        lead: int = LIKELY,
    ) -> None:
        self.lead = lead
        self.now_s: Floats = np.zeros(len(BOUNDS))
        self.bounds: dict[int, tuple[Floats, Floats]] = {}
        self.num_priced = 0
        self._model = model
        self._builder = builder
        self._routing = routing
        self._pricing = pricing
        self._terms = terms
        self._num_ranks = layout.replica_size
        self._sharing = sharing
        self._explain = explain
        self._observe = observe
        self._stretch = stretch
        self._num_tokens = 0
        self._replicas = [
            _Replica(Timeline(terms, layout.pp, layout.stage_size)) for _ in range(layout.replicas)
        ]

    def wait_until(self, due_s: Floats | float) -> None:
        """Let time pass up to a moment, [B] or one for all; none if it is over."""
        self.now_s = np.maximum(self.now_s, due_s)

    def submit(self, plan: StepPlan) -> StepHandle:
        """Begin a step."""
        submitted_s = self.now_s
        self.now_s = submitted_s + self._terms.step_s(self._num_ranks)
        if self._stretch is not None:
            plan = self._stretch.of(plan)
        known = self._work(plan)
        replica = self._replicas[plan.replica]
        times = self._run(replica.timeline, known, plan)
        same_phase, replica.phase = replica.phase is plan.phase, plan.phase
        if self._explain:
            self._add_why(replica, plan.phase, times, is_new=not same_phase)
        if self._observe is not None:
            self._observe(PricedStep(plan, known.program, known.work, times))
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
        batches = [batch for part in handle.plan.micro_batches for batch in part]
        seq_ids = [seq for batch in batches for seq in batch.seq_ids[batch.yields_token].tolist()]
        return StepOutcome(
            token_ids=dict.fromkeys(seq_ids, MADE_UP_TOKEN),
            logits={},
            records=handle.records,
            submitted_s=float(handle.submitted_s[self.lead]),
            finished_s=float(handle.finished_s[self.lead]),
        )

    def at_bound(self, steps: Iterable[FinishedStep], bound: int) -> list[FinishedStep]:
        """The same steps, without records, as one hand of the clock saw them.

        Args:
            bound: place in `BOUNDS`.
        """
        return [
            FinishedStep(
                plan,
                replace(
                    outcome,
                    records=(),
                    submitted_s=float(self.bounds[plan.step][0][bound]),
                    finished_s=float(self.bounds[plan.step][1][bound]),
                ),
            )
            for plan, outcome in steps
        ]

    def why(self, phase: Phase, replica: int = 0) -> Why | None:
        """Where the time of the last spell of a phase went; None if there was none.

        Raises:
            ValueError: the runner was not told to explain.
        """
        if not self._explain:
            raise ValueError("why tables were not asked for")
        table = self._replicas[replica].why.get(phase)
        return table.result() if table else None

    def _add_why(self, replica: _Replica, phase: Phase, times: StepTimes, *, is_new: bool) -> None:
        if is_new:
            pricing = self._pricing
            replica.why[phase] = WhyTable(
                pricing.profile.device, pricing.types.weights, pricing.dtype
            )
        replica.why[phase].add(times)

    def _work(self, plan: StepPlan) -> KnownWork:
        def make() -> KnownWork:
            program = self._builder.build(plan, self._routing, first_token=self._num_tokens)
            self.num_priced += 1
            return KnownWork(program, self._pricing.work(program))

        known = make() if self._sharing is None else self._sharing.find(plan, make)
        self._num_tokens += sum(batch.num_tokens for part in plan.micro_batches for batch in part)
        return known

    def _run(self, timeline: Timeline, known: KnownWork, plan: StepPlan) -> StepTimes:
        may_jump = not plan.record_events
        if self._sharing is None or not may_jump or not timeline.is_at_rest(self.now_s):
            return timeline.run(known.work, self.now_s, may_jump=may_jump)
        if known.from_rest is None:
            known.from_rest = timeline.from_rest(known.work)
        return timeline.repeat(known.from_rest, self.now_s)

    def _records(
        self, plan: StepPlan, program: StepProgram, times: StepTimes, *, count_idle: bool
    ) -> tuple[RankRecord, ...]:
        num_layers = self._model.num_hidden_layers
        counts = iter(count(program, num_layers, self._model.num_experts))
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
