"""The recorder of a rank's steps: seconds by stage, waits, counts, timeline, single operations."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.cost.step.operation import TransferKind
from expertlane.engine.comm.checks import Checks
from expertlane.engine.comm.clocks import CoreToken, HostClock
from expertlane.engine.comm.counters import Meter, StepCounters
from expertlane.engine.comm.progress import NO_LAYER, ProgressReporter
from expertlane.engine.comm.rank_profile import CommOp, RankProfile
from expertlane.results.step_checks import Place
from expertlane.results.step_record import (
    Action,
    RankEvents,
    RankOperations,
    RankRecord,
    RankTotals,
    RankWaits,
)
from expertlane.spec.names import CheckPoint, Stage, Track

_LEAST_LOST_S = 20e-6  # of CPU time in a span; the marks themselves take less
_NUM_STAGES = len(Stage)
_TRACKS = list(Track)

Span = tuple[Track, int, float, float]  # track, cell, begin and end in seconds
# For the timeline of a wait: the mark at which the transfer arrived, and the thread's CPU seconds
# before and after the wait.
Arrival = tuple[Any, float, float]


class StepTimes:
    """Marks of a step's clock: one where each stage begins, two for each wait within a stage.

    An interval has a cell: its index in an array [micro-batches, layers + 1, stages], whose last
    layer stands for work outside layers.
    """

    def __init__(self, clock: HostClock, num_micro_batches: int, num_layers: int) -> None:
        self._clock = clock
        clock.restart()
        self._num_layers = num_layers
        self._shape = num_micro_batches, num_layers + 1, _NUM_STAGES
        self._started_s = time.perf_counter()
        self._cells: list[int] = []  # of every interval, in order
        self._marks: list[Any] = []  # where each interval begins; one more at the end
        self._cpu_marks: list[float] = []
        self._waits: list[tuple[int, Any, Any]] = []  # cell, and marks of its begin and end
        self._arrivals: list[Arrival] = []  # of each wait, if events are recorded

    def enter(self, micro_batch: int, layer: int, stage: Stage) -> None:
        """End the current interval and begin another."""
        self._mark()
        slot = self._num_layers if layer == NO_LAYER else layer
        self._cells.append((micro_batch * (self._num_layers + 1) + slot) * _NUM_STAGES + stage)

    def _mark(self) -> None:
        self._marks.append(self._clock.mark())
        self._cpu_marks.append(time.thread_time())

    def waited(self, begin: Any, arrived: Any, begin_cpu_s: float) -> None:
        """Record a wait that has ended in the current interval.

        Args:
            begin: mark of its begin.
            arrived: mark at which the transfer arrived; None unless events are recorded.
            begin_cpu_s: the thread's CPU seconds at its begin; used for events alone.
        """
        self._waits.append((self._cells[-1], begin, self._clock.mark()))
        if arrived is not None:
            self._arrivals.append((arrived, begin_cpu_s, time.thread_time()))

    def end(self) -> None:
        """End the last interval."""
        self._mark()
        self._clock.settle()

    def seconds(self) -> list[npt.NDArray[np.float64]]:
        """Wall seconds, and CPU seconds of the thread, each by cell."""
        wall_s, cpu_s = found = [np.zeros(self._shape) for _ in range(2)]
        for cell, (begin, end), (cpu_begin_s, cpu_end_s) in self._intervals():
            wall_s.flat[cell] += self._clock.seconds(begin, end)
            cpu_s.flat[cell] += cpu_end_s - cpu_begin_s
        return found

    def waits(self) -> RankWaits:
        """All waits, in order."""
        seconds = [self._clock.seconds(begin, end) for _, begin, end in self._waits]
        cells = np.array([cell for cell, _, _ in self._waits], dtype=np.int64)
        return RankWaits(cells, np.array(seconds, dtype=np.float64))

    def events(self, *, is_alone: bool) -> RankEvents:
        """The timeline: intervals without their waits, waits, and spans without the core.

        Args:
            is_alone: whether wall time of an interval beyond its CPU time was another rank's on the
                same core.
        """
        kept = [
            row
            for row in self._spans(is_alone)
            if row[3] > row[2] and row[1] % _NUM_STAGES != Stage.IDLE
        ]
        tracks, cells, begin_s, end_s = zip(*kept, strict=True) if kept else [()] * 4
        places = np.array(cells, dtype=np.int64)
        micro_batch, slot, stage = (
            axis.astype(np.int64) for axis in np.unravel_index(places, self._shape)
        )
        return RankEvents(
            start_s=self._started_s,
            track=np.array([_TRACKS.index(track) for track in tracks], dtype=np.int64),
            stage=stage,
            layer=np.where(slot == self._num_layers, NO_LAYER, slot),
            micro_batch=micro_batch,
            begin_s=np.array(begin_s, dtype=np.float64),
            end_s=np.array(end_s, dtype=np.float64),
        )

    def _intervals(self) -> Iterator[tuple[int, tuple[Any, Any], tuple[float, float]]]:
        """Cell, marks and CPU seconds of each interval, in order and without gaps."""
        return zip(self._cells, pairwise(self._marks), pairwise(self._cpu_marks), strict=True)

    def _spans(self, is_alone: bool) -> Iterator[Span]:
        """Spans that cover the step without overlap; waits lie in an interval of their cell."""
        seconds, first = self._clock.seconds, self._marks[0]
        remaining = zip(self._waits, self._arrivals, strict=True)
        following = next(remaining, None)

        def computed(cell: int, begin_s: float, end_s: float, cpu_s: float) -> Iterator[Span]:
            until_s = begin_s + cpu_s if is_alone else end_s
            return _split(Track.COMPUTE, cell, begin_s, until_s, end_s)

        for cell, (begin, end), (cpu_s, end_cpu_s) in self._intervals():
            begin_s, end_s = seconds(first, begin), seconds(first, end)
            while following is not None:
                (_, wait, over), (arrived, wait_cpu_s, over_cpu_s) = following
                wait_s = seconds(first, wait)
                if wait_s >= end_s:
                    break
                arrived_s, over_s = seconds(first, arrived), seconds(first, over)
                yield from computed(cell, begin_s, wait_s, wait_cpu_s - cpu_s)
                yield from _split(Track.NETWORK, cell, wait_s, arrived_s, over_s)
                begin_s, cpu_s = over_s, over_cpu_s
                following = next(remaining, None)
            yield from computed(cell, begin_s, end_s, end_cpu_s - cpu_s)


def _split(track: Track, cell: int, begin_s: float, until_s: float, end_s: float) -> Iterator[Span]:
    """Divide a span at `until_s`, where other ranks got the core, if they had it for long."""
    if end_s - until_s < _LEAST_LOST_S:
        yield track, cell, begin_s, end_s
        return
    yield track, cell, begin_s, until_s
    yield Track.DESCHEDULED, cell, until_s, end_s


_KINDS = list(TransferKind)


class OperationLog:
    """The computations, transfers and waits of one rank in one step, for the replay.

    It starts with a computation; between `pause` and `resume` nothing is timed.

    Args:
        stage: stage of the first computation.
        layer: layer of the first computation.
    """

    def __init__(self, stage: Stage, layer: int) -> None:
        self._rows: list[tuple[int, int, int, int, float, int]] = []
        self._transfers: list[tuple[int, int, list[int]]] = []
        self._place = (int(stage), layer, 0)
        self._is_paused = True
        self.resume()

    def enter(self, stage: Stage, layer: int, micro_batch: int) -> None:
        """End the current computation and start another."""
        self.pause()
        self._place = (int(stage), layer, micro_batch)
        self.resume()

    def pause(self) -> None:
        """End the current computation; until `resume` nothing is timed."""
        if not self._is_paused:
            self._is_paused = True
            self._add(Action.COMPUTE, time.thread_time() - self._since_s, -1)

    def resume(self) -> None:
        """Start timing again, at the same place."""
        self._is_paused = False
        self._since_s = time.thread_time()

    def post(self, kind: TransferKind, first_rank: int, sent_bytes: Sequence[int]) -> int:
        """Record that a transfer starts, while the log is paused.

        Args:
            first_rank: the lowest global rank of its group.
            sent_bytes: [world_size]; bytes to each global rank.

        Returns:
            The transfer's number in this log, which `wait` takes.
        """
        number = len(self._transfers)
        self._transfers.append((_KINDS.index(kind), first_rank, list(sent_bytes)))
        self._add(Action.POST, 0.0, number)
        return number

    def wait(self, transfer: int) -> None:
        """Record that the rank needs a transfer's result, while the log is paused."""
        self._add(Action.WAIT, 0.0, transfer)

    def arrive(self) -> None:
        """Record that the rank needs the previous stage's output, while the log is paused."""
        self._add(Action.ARRIVE, 0.0, -1)

    def _add(self, action: Action, seconds: float, transfer: int) -> None:
        self._rows.append((action, *self._place, seconds, transfer))

    def operations(self, world_size: int) -> RankOperations:
        """Everything recorded, as arrays; the log must be paused."""
        rows = np.array(self._rows, dtype=np.float64).reshape(-1, 6)
        action, stage, layer, micro_batch = rows[:, :4].T.astype(np.int64)
        kinds, first_ranks, sent = (
            zip(*self._transfers, strict=True) if self._transfers else [()] * 3
        )
        return RankOperations(
            action=action,
            stage=stage,
            layer=layer,
            micro_batch=micro_batch,
            cpu_s=rows[:, 4].copy(),
            transfer=rows[:, 5].astype(np.int64),
            kind=np.array(kinds, dtype=np.int64),
            first_rank=np.array(first_ranks, dtype=np.int64),
            sent_bytes=np.array(sent, dtype=np.int64).reshape(-1, world_size),
        )


ResultT = TypeVar("ResultT")

# The checkpoint of rows gathered over a tensor-parallel group, by the stage before the gather.
_GATHERED = {
    Stage.ATTENTION: CheckPoint.BEFORE_ATTENTION,
    Stage.ROUTER: CheckPoint.BEFORE_MLP,
    Stage.COMBINE: CheckPoint.BEFORE_MLP,
    Stage.EMBED: CheckPoint.EMBEDDING,
    Stage.HAND_OVER: CheckPoint.HAND_OVER,
    Stage.DISPATCH: CheckPoint.DISPATCH,
    Stage.EXPERTS: CheckPoint.MLP,
    Stage.HEAD: CheckPoint.HEAD,
}


class Recorder(StepCounters):
    """Counters that also split a rank's time at every change of stage.

    `enter` ends the stage before it; there is always exactly one current stage. Where a plan asks
    for no record, only the progress line and the meter, if any, are kept up to date.

    Args:
        rank: global rank.
        world_size: ranks of the layout, replicas included.
        token: taken while a step's operations are recorded; None where ranks share no cores.

    Attributes:
        is_interleaved: another part of the batch is computed while one waits.
        checks: the search for silent errors; None without one.
        profile: annotates this step in a trace; None without one.
    """

    checks: Checks | None = None
    profile: RankProfile | None = None

    def __init__(
        self,
        rank: int,
        num_layers: int,
        num_experts: int,
        progress: ProgressReporter,
        clock: HostClock,
        world_size: int,
        token: CoreToken | None = None,
    ) -> None:
        super().__init__(rank, num_layers, num_experts, world_size)
        self.progress = progress
        self._clock = clock
        self._token = token
        self._log: OperationLog | None = None
        self._last_layer = NO_LAYER
        self._recording_events = False
        self.is_interleaved = False
        self._micro_batch = 0
        self._idle_s = 0.0
        self._waited_cpu_s, self._wait_began_ns = 0.0, 0
        self._ended_s = time.perf_counter()
        self._process_cpu_s = time.process_time()

    def begin_step(
        self,
        step: int,
        num_micro_batches: int,
        *,
        record: bool,
        count_idle: bool,
        record_routing: bool = False,
        record_events: bool = False,
        record_operations: bool = False,
    ) -> None:
        """Start a step's record.

        Args:
            record: keep seconds by stage, and counts.
            count_idle: the time since the last step counts as idle, the wait for the core too.
            record_routing: keep the experts that tokens choose; implies `record`.
            record_events: keep the timeline; implies `record`.
            record_operations: keep the operations for a replay, with one rank at a time on each
                core; implies `record`.
        """
        self.progress.set_step(step)
        if self.meter is not None:
            self.meter.num_steps += 1
        self._log = None  # an earlier step may have come to nothing
        self.is_recording = record or record_routing or record_events or record_operations
        if self.is_recording:
            self._clear_counts()
            self._idle_s = 0.0
        self._recording_routing = record_routing
        self._recording_events = record_events
        self._micro_batch = 0
        if record_operations and self._token is not None:
            self.progress.set_waiting(True)
            self._token.acquire()
            self.progress.set_waiting(False)
        if count_idle:
            self._idle_s = time.perf_counter() - self._ended_s
        else:
            self._process_cpu_s = time.process_time()
        if self.is_recording:
            self._times = StepTimes(self._clock, num_micro_batches, self._num_layers)
        if record_operations:
            self._log = OperationLog(Stage.IDLE, NO_LAYER)
        self.enter(Stage.IDLE)

    def set_micro_batch(self, micro_batch: int) -> None:
        """Record for this micro-batch from the next `enter` on."""
        self._micro_batch = micro_batch

    def enter(self, stage: Stage, layer: int = NO_LAYER) -> None:
        """End the current stage and begin `stage` of `layer`."""
        self.stage, self.layer = stage, layer
        if layer != NO_LAYER:
            self._last_layer = layer
        now_ns = self.progress.enter(stage, layer)
        if self.meter is not None:
            self.meter.enter(stage, now_ns)
        if self._log is not None:
            self._log.enter(stage, layer, self._micro_batch)
        if self.profile is not None:  # no system call between its mark and the clock's
            self.profile.enter(stage)
        if self.is_recording:
            self._times.enter(self._micro_batch, layer, stage)

    def begin_wait(self) -> Any:
        """Begin a wait for other ranks; gives its mark, for `end_wait`."""
        self.progress.set_waiting(True)
        if self._log is not None:
            self._log.pause()
            if self._token is not None:
                self._token.release()
        if self._recording_events:
            self._waited_cpu_s = time.thread_time()
        if self.meter is not None:
            self._wait_began_ns = time.monotonic_ns()
        if self.profile is not None:
            self.profile.begin_wait()
        return self._clock.mark() if self.is_recording else None

    def end_wait(
        self, begin: Any, transfer: int | None = None, comm_op: CommOp | None = None
    ) -> None:
        """End a wait: count the time since `begin`, and report progress.

        Args:
            transfer: the number that `post` gave for the transfer, if the replay has to wait for it
                too.
            comm_op: the transfer, for the profile; None where others don't enter it.
        """
        arrived = self._clock.mark() if self._recording_events else None
        if self.meter is not None:
            self.meter.waited(self._wait_began_ns)
        if self._log is not None and self._token is not None:
            self._token.acquire()
        self.progress.set_waiting(False)
        self.progress.touch()
        if self.profile is not None:
            self.profile.end_wait(comm_op)
        if self.is_recording:
            self._times.waited(begin, arrived, self._waited_cpu_s)
        if self._log is not None:
            if transfer is not None:
                self._log.wait(transfer)
            self._log.resume()

    def arrive(self) -> None:
        """Record that the output of the previous pipeline stage is needed now."""
        if self._log is not None:
            self._log.pause()
            self._log.arrive()
            self._log.resume()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within this, computations serve the record alone, and are not replayed."""
        if self._log is not None:
            self._log.pause()
        yield
        if self._log is not None:
            self._log.resume()

    def post(
        self,
        kind: TransferKind,
        ranks: Sequence[int],
        to: Sequence[int],
        num_rows: Sequence[int],
        row_bytes: int,
        metadata_bytes: int = 0,
        num_real: Sequence[int] | None = None,
    ) -> int | None:
        """Record that a collective or send begins; call `posted` when it is under way.

        Rows that stay on this rank do not count.

        Args:
            ranks: global ranks of its group.
            to: [n]; global ranks that rows go to.
            num_rows: [n]; rows to each of them.
            row_bytes: bytes of a row.
            metadata_bytes: bytes of a row that are no hidden state.
            num_real: [n]; rows to each without padding; None for all.

        Returns:
            The transfer's number for `end_wait`; None unless operations are recorded.
        """
        if self.profile is not None:
            self.profile.begin_transfer()
            if kind is TransferKind.SEND:
                self.profile.send((self._rank, *to))
        if not self.is_recording:
            return None
        self._count_sent(to, num_rows, row_bytes, metadata_bytes, num_real)
        if self._log is None:
            return None
        self._log.pause()
        sent_bytes = [0] * self._world_size
        for rank, num in zip(to, num_rows, strict=True):
            sent_bytes[rank] = num * row_bytes
        sent_bytes[self._rank] = 0
        return self._log.post(kind, min(ranks), sent_bytes)

    def posted(self) -> None:
        """Record that the transfer is under way, and that the rank computes on."""
        if self._log is not None:
            self._log.resume()

    @property
    def may_wait_at_once(self) -> bool:
        """True if a transfer can be begun and waited for in one call.

        Nothing overlaps with it then, and the step is not recorded.
        """
        return not (self.is_by_stage or self.is_interleaved)

    @property
    def is_by_stage(self) -> bool:
        """True if this step's time is recorded by stage, so that no call may do several of them."""
        return self.is_recording or self.profile is not None

    def wait_at_once(self, until: Callable[[], ResultT]) -> ResultT:
        """Run a transfer and its wait in the current stage of a step that is not recorded."""
        progress, meter = self.progress, self.meter
        progress.set_waiting(True)
        if meter is None:
            result = until()
        else:
            began_ns = time.monotonic_ns()
            result = until()
            meter.waited(began_ns)
            meter.transferred(began_ns, began_ns)
        progress.set_waiting(False)
        progress.touch()
        return result

    def totals(self) -> RankTotals:
        """The meter's totals since the first call, which starts the meter."""
        if self.meter is None:
            self.meter = Meter(self._num_layers, self._num_experts)
        return self.meter.totals()

    def check_finite(self, values: Tensor, point: CheckPoint, layer: int = NO_LAYER) -> None:
        """Check that values are finite; does nothing without checks."""

    def end_step(self) -> RankRecord | None:
        """Close the record; None where the plan asked for none."""
        if self._log is not None:
            self._log.pause()
            if self._token is not None:
                self._token.release()
        record = self._record() if self.is_recording else None
        self._log = None
        self.is_recording = self._recording_routing = self._recording_events = False
        self.enter(Stage.IDLE, self._last_layer)  # the launcher can see the layer it reached
        self.layer = NO_LAYER
        self._ended_s = time.perf_counter()
        self._process_cpu_s = time.process_time()
        return record

    def _record(self) -> RankRecord:
        if self.profile is not None:
            self.profile.enter(Stage.IDLE)  # making the record is part of no stage
        self._times.end()
        wall_s, cpu_s = self._times.seconds()
        waits, blocked_s = self._times.waits(), np.zeros_like(wall_s)
        np.add.at(blocked_s.reshape(-1), waits.cell, waits.blocked_s)
        for seconds in (wall_s, blocked_s):
            seconds[0, -1, Stage.IDLE] += self._idle_s
        # With several threads, this one also waits for the others.
        is_alone = self._token is not None and torch.get_num_threads() == 1
        return self._counted(
            wall_s=wall_s,
            cpu_s=cpu_s,
            blocked_s=blocked_s,
            waits=waits,
            process_cpu_s=time.process_time() - self._process_cpu_s,
            events=self._times.events(is_alone=is_alone) if self._recording_events else None,
            operations=None if self._log is None else self._log.operations(self._world_size),
        )


class CheckedRecorder(Recorder):
    """A recorder that checks for silent errors too.

    Attributes:
        before: the stage before the current one; it tells what a collective gathers.
    """

    checks: Checks

    def __init__(self, checks: Checks, *given: Any) -> None:
        super().__init__(*given)
        self.checks = checks
        self.before = Stage.IDLE

    def enter(self, stage: Stage, layer: int = NO_LAYER) -> None:
        if stage is not self.stage:
            self.before = self.stage
        super().enter(stage, layer)

    def set_micro_batch(self, micro_batch: int) -> None:
        super().set_micro_batch(micro_batch)
        self.checks.set_micro_batch(micro_batch)

    def check_finite(self, values: Tensor, point: CheckPoint, layer: int = NO_LAYER) -> None:
        self.checks.finite(values, point, layer)

    @property
    def may_wait_at_once(self) -> bool:
        """`Recorder.may_wait_at_once`, but never with full checks, which inspect each transfer."""
        return super().may_wait_at_once and not self.checks.is_full

    @property
    def place(self) -> Place:
        """The place of a transfer of the current stage, for checks."""
        stage = self.before if self.stage is Stage.COLLECTIVES else self.stage
        return self.checks.place(_GATHERED.get(stage, CheckPoint.HAND_OVER), self.layer)
