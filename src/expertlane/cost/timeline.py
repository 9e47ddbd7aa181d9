"""The virtual clock of one replica: its pipeline stages, ranks and streams, across steps.

A rank has a compute and a network stream; its clock goes on from step to step, so steps in flight
share the stages as the engine's do: each stage takes steps in the order of their submission, and
the micro-batches of a step one after the other.

Its log becomes the columns, records and events that results and traces need.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.profile import BOUNDS, LIKELY, Execution, Terms
from expertlane.cost.laws.times import Times
from expertlane.cost.pricing import Compiler, StageWork
from expertlane.cost.replay import Clocks, Log, RecordedStep, Replay
from expertlane.cost.step.operation import OUTSIDE, Amounts, Floats, Ints, Operation
from expertlane.results.step_record import RankEvents
from expertlane.spec.names import Stage, Track


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
                known = None
                if alone is not None and isinstance(each, StageWork):
                    known = alone.get((stage, number))
                    if known is None:
                        known = Clocks.zero(self._terms.num_clocks, self._num_ranks)
                        Replay(compiler, known).run(each.parts)
                        alone[stage, number] = known
                replay = Replay(compiler, clocks, may_skip=may_skip)
                of_spans.append(self._micro_batch(clocks, each, arrival, replay, known))
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

    def _micro_batch(
        self,
        clocks: Clocks,
        work: Work,
        arrival: Floats | None,
        replay: Replay,
        alone: Clocks | None,
    ) -> Span:
        """A micro-batch on a stage; as by itself where `alone` says how it goes then."""
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
        elif alone is None:
            log = replay.run(work.parts)
        else:
            clocks.add(alone)
            log = Log()
        end = sending = sent = clocks.compute
        if work.hand_over is None:
            clocks.host = np.maximum(clocks.host, end)  # it reads the tokens
        else:
            sending = np.maximum(end, clocks.network)
            sent = clocks.network = sending + work.hand_over.bounds
        return Span(begin, arrived, launched, end, sending, sent, log)


class LogTable:
    """A log as columns: a row for every step that was run, all likely times [num_rows, R].

    Attributes:
        is_transfer, stages: [num_rows].
        rows, layers: [num_steps]; with layers that were not run one by one, the row that each
            went like, and its layer.
    """

    def __init__(self, log: Log, num_ranks: int) -> None:
        self._log = log
        self._shape = (len(log.executed), num_ranks)
        executed = log.executed
        self.is_transfer = np.array([each.entry.groups is not None for each in executed], bool)
        self.stages = np.array([each.entry.step.stage for each in executed], dtype=np.int64)
        self.rows, self.layers = _expanded(log)

    def column(self, name: str) -> Floats:
        """One of the moments of a `ExecutedStep`, other than `met`."""
        if not self._log.executed:
            return np.zeros(self._shape)
        return np.array([getattr(ran, name)[LIKELY] for ran in self._log.executed])

    @cached_property
    def times(self) -> Ints:
        """[num_rows]; number of layers that ran like each row."""
        return np.bincount(self.rows, minlength=self._shape[0])

    @cached_property
    def blocked_s(self) -> Floats:
        """[num_rows, R]; seconds from `wait` to `end`: of a transfer, the rank's wait for it."""
        return self.column("end") - self.column("wait")

    @cached_property
    def wall_s(self) -> Floats:
        """[num_rows, R]; wall time of each step on its rank."""
        of_compute = self.column("end") - self.column("begin")
        of_transfer = self.column("start") - self.column("begin") + self.blocked_s
        return np.where(self.is_transfer[:, None], of_transfer, of_compute)


def _expanded(log: Log) -> tuple[Ints, Ints]:
    rows = [np.arange(len(log.executed))]
    layers = [[ran.layer for ran in log.executed]]
    for first, last, times in log.repeated:
        for further in range(1, times + 1):
            rows.append(np.arange(first, last))
            layers.append([ran.layer_after(further) for ran in log.executed[first:last]])
    return np.concatenate(rows), np.concatenate(layers).astype(np.int64)


@dataclass(frozen=True, eq=False)
class StageSeconds:
    """Seconds of the ranks of a pipeline stage, as in their records.

    Attributes:
        wall_s, blocked_s: [R, num_micro_batches, num_layers + 1, num_stages].
    """

    wall_s: Floats
    blocked_s: Floats


def stage_seconds(times: StepTimes, num_layers: int, *, count_idle: bool) -> list[StageSeconds]:
    """Each pipeline stage's seconds.

    Args:
        num_layers: layers of the model.
        count_idle: the time since the last step counts as idle, as in the engine.
    """
    return [
        _of_stage(spans, idle_s[LIKELY], num_layers, count_idle)
        for spans, idle_s in zip(times.spans, times.idle_s, strict=True)
    ]


def _of_stage(
    spans: Sequence[Span], idle_s: Floats, num_layers: int, count_idle: bool
) -> StageSeconds:
    num_ranks, num_cells = len(idle_s), (num_layers + 1) * len(Stage)
    seconds = np.zeros((2, len(spans), num_cells, num_ranks))
    for (wall_s, blocked_s), span in zip(seconds.swapaxes(0, 1), spans, strict=True):
        table = LogTable(span.log, num_ranks)
        slots = np.where(table.layers == OUTSIDE, num_layers, table.layers)
        cells = slots * len(Stage) + table.stages[table.rows]
        np.add.at(wall_s, cells, table.wall_s[table.rows])
        is_transfer = table.is_transfer[table.rows]
        np.add.at(blocked_s, cells[is_transfer], table.blocked_s[table.rows[is_transfer]])
        outside = num_layers * len(Stage)
        arriving_s = (span.arrived - span.begin)[LIKELY]
        for of_kind in (wall_s, blocked_s):
            of_kind[outside + Stage.HAND_OVER] += arriving_s
        wall_s[outside + Stage.EMBED] += (span.launched - span.arrived)[LIKELY]
    if count_idle:
        seconds[:, 0, num_layers * len(Stage) + Stage.IDLE] += idle_s
    shape = (2, len(spans), num_layers + 1, len(Stage), num_ranks)
    wall_s, blocked_s = np.moveaxis(seconds.reshape(shape), -1, 1)
    return StageSeconds(wall_s, blocked_s)


class Event(NamedTuple):
    """One stretch of time of all ranks of a pipeline stage.

    Attributes:
        pp_rank: the pipeline stage.
        layer: hidden layer, or `OUTSIDE`.
        part: index of the half, where two are interleaved.
        begin_s, end_s: [R].
        flops, num_bytes: [R]; of an operation, and read by it or sent.
    """

    track: Track
    stage: Stage
    pp_rank: int
    layer: int
    micro_batch: int
    part: int
    begin_s: Floats
    end_s: Floats
    flops: Amounts
    num_bytes: Amounts


def events(times: StepTimes) -> Iterator[Event]:
    """Every operation, transfer and PP transfer of a step run with every layer run."""
    for pp_rank, spans in enumerate(times.spans):
        for micro_batch, span in enumerate(spans):
            none = np.zeros(span.end.shape[1], dtype=np.int64)
            for ran in span.log.executed:
                step = ran.entry.step
                if isinstance(step, Operation):
                    track, begin, end = Track.COMPUTE, ran.start, ran.end
                    flops, num_bytes = step.flops, step.weight_bytes + step.kv_bytes
                else:
                    track, begin, end = Track.NETWORK, ran.met, ran.done
                    flops, num_bytes = none, step.sent_bytes.sum(axis=(0, 2))
                yield Event(
                    track,
                    step.stage,
                    pp_rank,
                    ran.layer,
                    micro_batch,
                    ran.part,
                    np.broadcast_to(begin[LIKELY], end[LIKELY].shape),
                    end[LIKELY],
                    flops,
                    num_bytes,
                )
            if pp_rank + 1 < len(times.spans):
                yield Event(
                    Track.NETWORK,
                    Stage.HAND_OVER,
                    pp_rank,
                    OUTSIDE,
                    micro_batch,
                    0,
                    span.sending[LIKELY],
                    span.sent[LIKELY],
                    none,
                    none,
                )


def transfer_seconds(spans: Sequence[Span]) -> Floats:
    """[2, R]; dispatch and combine of a stage: in flight, and of that, waited for.

    A transfer is in flight from when its group's last member has posted it.
    """
    num_ranks = spans[0].end.shape[1]
    seconds = np.zeros((2, num_ranks))
    for ran in (ran for span in spans for ran in span.log.executed):
        if ran.entry.groups is not None and ran.entry.step.stage is not Stage.COLLECTIVES:
            met, wait, end, done = (
                np.broadcast_to(moment[LIKELY], num_ranks)
                for moment in (ran.met, ran.wait, ran.end, ran.done)
            )
            seconds += done - met, np.maximum(end - np.maximum(wait, met), 0.0)
    return seconds


_TRACKS = list(Track)


def rank_events(times: StepTimes) -> dict[tuple[int, int], RankEvents]:
    """Events by pipeline stage and place in it, of a step in which every layer was run."""
    begin_s = float(min(spans[0].begin[LIKELY].min() for spans in times.spans))
    start_s = float(times.origin_s[LIKELY]) + begin_s
    of_stage: list[list[Event]] = [[] for _ in times.spans]
    for event in events(times):
        of_stage[event.pp_rank].append(event)
    return {
        (pp_rank, place): _of_rank(of_one, place, begin_s, start_s)
        for pp_rank, of_one in enumerate(of_stage)
        for place in range(times.idle_s[pp_rank].shape[1])
    }


def _of_rank(of_stage: list[Event], place: int, begin_s: float, start_s: float) -> RankEvents:
    kept = [each for each in of_stage if each.end_s[place] > each.begin_s[place]]
    counts = [
        (
            _TRACKS.index(each.track),
            each.stage,
            each.layer,
            each.micro_batch,
            int(each.flops[place]),
            int(each.num_bytes[place]),
        )
        for each in kept
    ]
    track, stage, layer, micro_batch, flops, num_bytes = (
        np.array(counts, dtype=np.int64).reshape(-1, 6).T
    )
    moments = np.array([(each.begin_s[place], each.end_s[place]) for each in kept])
    begins_s, ends_s = moments.reshape(-1, 2).T - begin_s
    return RankEvents(start_s, track, stage, layer, micro_batch, begins_s, ends_s, flops, num_bytes)
