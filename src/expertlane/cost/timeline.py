"""The virtual clock of one replica: its pipeline stages, ranks and streams, across steps.

A rank has a compute and a network stream; its clock goes on from step to step, so steps in flight
share the stages as the engine's do: each stage takes steps in the order of their submission, and
the micro-batches of a step one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from expertlane.cost.laws.execution import BOUNDS, Execution, Terms
from expertlane.cost.laws.times import Times
from expertlane.cost.pricing import Compiler, StageWork
from expertlane.cost.replay import Clocks, Log, RecordedStep, Replay
from expertlane.cost.step.operation import Floats


@dataclass(frozen=True, eq=False)
class RecordedWork:
    """Recorded work of a pipeline stage for one micro-batch.

    Attributes:
        before, steps: steps before it needs the previous stage's hidden states, and after.
        hand_over: as in `StageWork`.
    """

    before: Sequence[RecordedStep]
    steps: Sequence[RecordedStep]
    hand_over: Times | None = None


Work = StageWork | RecordedWork


@dataclass(frozen=True, eq=False)
class Span:
    """One micro-batch on one pipeline stage; all [B, R].

    Attributes:
        begin: the ranks turned to it.
        arrived: hidden states of the stage before were there too; equal to `begin` on the first.
        launched: its graph was launched, where there is one; else `arrived`.
        end: all its parts were done.
        sending, sent: its hidden states began to travel, and were at the next stage; both `end`
            on the last stage.
        log: the steps that ran in between.
    """

    begin: Floats
    arrived: Floats
    launched: Floats
    end: Floats
    sending: Floats
    sent: Floats
    log: Log


@dataclass(frozen=True, eq=False)
class StepTimes:
    """One step on the virtual clock.

    Attributes:
        spans: [num_stages][num_micro_batches]; their times count from `origin_s`.
        idle_s: [num_stages], [B, R] each; from the end of a rank's step before to this one's
            begin.
        end_s: [B]; end of the last rank.
        origin_s: [B].
    """

    spans: Sequence[Sequence[Span]]
    idle_s: Sequence[Floats]
    end_s: Floats
    origin_s: Floats = field(default_factory=lambda: np.zeros(len(BOUNDS)))


@dataclass(frozen=True, eq=False)
class ColdStart:
    """A step that began at zero with all ranks at rest; it goes alike whenever they are.

    Attributes:
        stages: the clocks after it, [num_stages].
    """

    times: StepTimes
    stages: Sequence[Clocks]


class Timeline:
    """Keeps the ranks' clocks over the steps of a replica.

    Args:
        num_stages: pipeline stages.
        num_ranks: ranks of each stage.
    """

    def __init__(self, terms: Terms, num_stages: int, num_ranks: int) -> None:
        self._terms = terms
        self._compiler = Compiler(terms)
        self._num_ranks = num_ranks
        self._stages = [Clocks.zero(terms.num_clocks, num_ranks) for _ in range(num_stages)]

    def run(
        self,
        work: Sequence[Sequence[Work]],
        plan_s: Floats | float,
        *,
        may_skip: bool = True,
        alone: "dict[tuple[int, int], Clocks] | None" = None,
    ) -> StepTimes:
        """Take a step through all stages.

        Args:
            work: [num_stages][num_micro_batches].
            plan_s: [B], or one for all; when the plan reaches the ranks.
            may_skip: layers that repeat exactly are not run one by one (`Replay`), so that not
                all of them are in the logs.
            alone: how its micro-batches go by themselves, by stage and number, as far as is known;
                more are added. Each then begins on all ranks of a stage with the last of them, and
                logs are empty.
        """
        compiler = self._compiler
        plan = np.broadcast_to(np.asarray(plan_s, dtype=np.float64), (self._terms.num_clocks,))[
            :, None
        ]
        spans: list[list[Span]] = []
        idle_s = []
        for stage, (clocks, of_stage) in enumerate(zip(self._stages, work, strict=True)):
            ended = clocks.compute
            clocks.compute = np.maximum(ended, plan)
            clocks.host = np.maximum(clocks.host, clocks.compute)  # a rank ends a step for good
            idle_s.append(clocks.compute - ended)
            arrivals = [span.sent for span in spans[-1]] if spans else [None] * len(of_stage)
            of_spans = []
            for number, (each, arrival) in enumerate(zip(of_stage, arrivals, strict=True)):
                if alone is None or isinstance(each, RecordedWork):
                    replay = Replay(compiler, clocks, may_skip=may_skip)
                    of_spans.append(self._micro_batch(clocks, each, arrival, replay))
                    continue
                key = stage, number
                if key not in alone:
                    alone[key] = Clocks.zero(self._terms.num_clocks, self._num_ranks)
                    Replay(compiler, alone[key]).run(each.parts)
                of_spans.append(self._repeated(clocks, each, arrival, alone[key]))
            spans.append(of_spans)
        end_s = np.max([clocks.compute.max(axis=1) for clocks in self._stages], axis=0)
        return StepTimes(spans, idle_s, end_s)

    def is_at_rest(self, plan_s: Floats) -> bool:
        """True if all ranks have finished before a plan reaches them, at [B]."""
        plan = plan_s[:, None]
        return all(
            bool((each <= plan).all())
            for clocks in self._stages
            for each in (clocks.compute, clocks.network, clocks.host)
        )

    def cold_start(self, work: Sequence[Sequence[Work]]) -> ColdStart:
        """Run a step that begins at zero with all ranks at rest; this timeline is left as it is."""
        other = Timeline(self._terms, len(self._stages), self._num_ranks)
        return ColdStart(other.run(work, 0.0), other._stages)

    def repeat(self, known: ColdStart, plan_s: Floats) -> StepTimes:
        """Run a step whose ranks are at rest by its known cold start; the same result as `run`."""
        idle_s = [plan_s[:, None] - clocks.compute for clocks in self._stages]
        self._stages = [clocks.later(plan_s) for clocks in known.stages]
        return StepTimes(known.times.spans, idle_s, known.times.end_s + plan_s, plan_s)

    def _repeated(
        self, clocks: Clocks, work: StageWork, arrival: Floats | None, alone: Clocks
    ) -> Span:
        """A micro-batch run as by itself, once all ranks of the stage can begin."""
        begin = clocks.compute
        arrived = begin if arrival is None else np.maximum(begin, arrival)
        launched = arrived
        if self._terms.execution is Execution.GRAPH:
            clocks.host = clocks.host + self._terms.launch_s[:, None]
            launched = np.maximum(arrived, clocks.host)
        start = launched.max(axis=1, keepdims=True)
        end = sending = sent = clocks.compute = start + alone.compute
        clocks.network = np.maximum(
            clocks.network, np.where(alone.network > 0, start, 0.0) + alone.network
        )
        clocks.host = np.maximum(clocks.host, np.where(alone.host > 0, start, 0.0) + alone.host)
        if work.hand_over is None:
            clocks.host = np.maximum(clocks.host, end)
        else:
            sending = np.maximum(end, clocks.network)
            sent = clocks.network = sending + work.hand_over.bounds
        return Span(begin, arrived, launched, end, sending, sent, Log())

    def _micro_batch(
        self, clocks: Clocks, work: Work, arrival: Floats | None, replay: Replay
    ) -> Span:
        if isinstance(work, RecordedWork):
            replay.run_recorded(work.before)
        begin = clocks.compute
        arrived = begin if arrival is None else np.maximum(begin, arrival)
        clocks.compute = arrived
        if self._terms.execution is Execution.GRAPH:
            clocks.host = clocks.host + self._terms.launch_s[:, None]
            clocks.compute = np.maximum(arrived, clocks.host)
        launched = clocks.compute
        if isinstance(work, RecordedWork):
            log = replay.run_recorded(work.steps)
        else:
            log = replay.run(work.parts)
        end = sending = sent = clocks.compute
        if work.hand_over is None:
            clocks.host = np.maximum(clocks.host, end)  # it reads the tokens
        else:
            sending = np.maximum(end, clocks.network)
            sent = clocks.network = sending + work.hand_over.bounds
        return Span(begin, arrived, launched, end, sending, sent, log)
