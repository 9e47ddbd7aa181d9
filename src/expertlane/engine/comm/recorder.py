"""The record of a rank's steps: seconds by stage, waits, counts, a timeline, single operations."""

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
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.core_token import CoreToken
from expertlane.engine.comm.meter import Meter
from expertlane.engine.comm.progress import NO_LAYER, ProgressReporter
from expertlane.engine.comm.step_counters import StepCounters
from expertlane.results.rank_totals import RankTotals
from expertlane.results.step_checks import Place
from expertlane.results.step_record import Action, RankEvents, RankOperations, RankRecord
from expertlane.spec.names import CheckPoint, Stage, Track

_LEAST_LOST_S = 20e-6  # of CPU time in a stretch; less is what the marks themselves take
_NUM_STAGES = len(Stage)
_TRACKS = list(Track)

Stretch = tuple[Track, int, float, float]  # track, cell, begin and end in seconds
# What a wait needs to be drawn: the mark at which what was waited for came, and the thread's CPU
# seconds before and after.
Arrival = tuple[Any, float, float]


class StepTimes:
    """Marks of a step's clock: one wherever a stage begins, two for each wait within a stage.

    An interval is known by its cell: its place in an array of all micro-batches, layers (and one
    slot for what is of none) and stages.
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
        self._arrivals: list[Arrival] = []  # of each wait, where there are to be events

    def enter(self, micro_batch: int, layer: int, stage: Stage) -> None:
        """End the present interval and begin another."""
        slot = self._num_layers if layer == NO_LAYER else layer
        self._cells.append((micro_batch * (self._num_layers + 1) + slot) * _NUM_STAGES + stage)
        self._mark()

    def _mark(self) -> None:
        self._marks.append(self._clock.mark())
        self._cpu_marks.append(time.thread_time())

    def waited(self, begin: Any, arrived: Any, begin_cpu_s: float) -> None:
        """Record a wait that has ended in the present interval.

        Args:
            begin: its mark.
            arrived: that of when what was waited for came; None where no events are wanted.
            begin_cpu_s: the thread's CPU seconds then; for events alone.
        """
        self._waits.append((self._cells[-1], begin, self._clock.mark()))
        if arrived is not None:
            self._arrivals.append((arrived, begin_cpu_s, time.thread_time()))

    def end(self) -> None:
        """End the last interval."""
        self._mark()
        self._clock.settle()

    def seconds(self) -> list[npt.NDArray[np.float64]]:
        """Wall time, CPU time of the thread, and the part of wall time in waits, by cell."""
        wall_s, cpu_s, blocked_s = found = [np.zeros(self._shape) for _ in range(3)]
        for cell, (begin, end), (cpu_begin_s, cpu_end_s) in self._intervals():
            wall_s.flat[cell] += self._clock.seconds(begin, end)
            cpu_s.flat[cell] += cpu_end_s - cpu_begin_s
        for cell, begin, end in self._waits:
            blocked_s.flat[cell] += self._clock.seconds(begin, end)
        return found

    def events(self, *, is_alone: bool) -> RankEvents:
        """Every interval without its waits, every wait, and what of both other ranks took.

        Args:
            is_alone: whether CPU time that an interval lacks was another rank's on the same core.
        """
        kept = [
            row
            for row in self._stretches(is_alone)
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
        """Cell, marks and CPU seconds of each, in order and without gaps."""
        return zip(self._cells, pairwise(self._marks), pairwise(self._cpu_marks), strict=True)

    def _stretches(self, is_alone: bool) -> Iterator[Stretch]:
        """Each moment once, from the step's start; waits lie within an interval of their cell."""
        seconds, first = self._clock.seconds, self._marks[0]
        remaining = zip(self._waits, self._arrivals, strict=True)
        following = next(remaining, None)

        def computed(cell: int, begin_s: float, end_s: float, cpu_s: float) -> Iterator[Stretch]:
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


def _split(
    track: Track, cell: int, begin_s: float, until_s: float, end_s: float
) -> Iterator[Stretch]:
    """A stretch up to where other ranks had the core, if they had it for long."""
    if end_s - until_s < _LEAST_LOST_S:
        yield track, cell, begin_s, end_s
        return
    yield track, cell, begin_s, until_s
    yield Track.DESCHEDULED, cell, until_s, end_s


_KINDS = list(TransferKind)


class OperationLog:
    """The computations, transfers and waits of one rank in one step.

    It starts with a computation; between `pause` and `resume` nothing is timed.

    Args:
        stage: of the first computation.
        layer: of the first computation.
    """

    def __init__(self, stage: Stage, layer: int) -> None:
        self._rows: list[tuple[int, int, int, int, float, int]] = []
        self._transfers: list[tuple[int, int, list[int]]] = []
        self._place = (int(stage), layer, 0)
        self._is_paused = True
        self.resume()

    def enter(self, stage: Stage, layer: int, micro_batch: int) -> None:
        """End the present computation and start another one."""
        self.pause()
        self._place = (int(stage), layer, micro_batch)
        self.resume()

    def pause(self) -> None:
        """End the present computation; until `resume` nothing is timed."""
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
            sent_bytes: [world_size]; to each global rank.

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
        """Record that the rank needs what the previous stage sends, while the log is paused."""
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

# What is gathered over a tensor-parallel group, by the stage before.
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
    """Splits a rank's time at every change of stage, beside what its call sites count.

    `enter` ends the stage before it; there is always exactly one current stage. Where a plan asks
    for no record, only the progress line is kept up to date.

    Args:
        rank: global rank.
        world_size: ranks of the layout, replicas too.
        token: taken while a step's operations are recorded; None where ranks share no cores.

    Attributes:
        is_interleaved: another part of the batch is computed while one waits.
        checks: what looks for silent errors; None where nobody does.
    """

    checks: Checks | None = None

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
            count_idle: the time since the last step counts as idle, the wait for the core too.
            record_routing: keep the experts that tokens choose; implies `record`.
            record_events: keep every stretch of time; implies `record`.
            record_operations: keep what is to be replayed, one rank a core at a time; implies
                `record`.
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
        """What follows belongs to another micro-batch; call `enter` next."""
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
        if self.is_recording:
            self._times.enter(self._micro_batch, layer, stage)

    def begin_wait(self) -> Any:
        """A wait for other ranks begins; pass what this returns to `end_wait`."""
        self.progress.set_waiting(True)
        if self._log is not None:
            self._log.pause()
            if self._token is not None:
                self._token.release()
        if self._recording_events:
            self._waited_cpu_s = time.thread_time()
        if self.meter is not None:
            self._wait_began_ns = time.monotonic_ns()
        return self._clock.mark() if self.is_recording else None

    def end_wait(self, begin: Any, transfer: int | None = None) -> None:
        """Count the wait since `begin`, and report progress.

        Args:
            transfer: the number that `post` gave for what was waited for, if the replay is to
                wait for it too.
        """
        arrived = self._clock.mark() if self._recording_events else None
        if self.meter is not None:
            self.meter.waited(self._wait_began_ns)
        if self._log is not None and self._token is not None:
            self._token.acquire()
        self.progress.set_waiting(False)
        self.progress.touch()
        if self.is_recording:
            self._times.waited(begin, arrived, self._waited_cpu_s)
        if self._log is not None:
            if transfer is not None:
                self._log.wait(transfer)
            self._log.resume()

    def arrive(self) -> None:
        """What the pipeline stage before has sent is needed now."""
        if self._log is not None:
            self._log.pause()
            self._log.arrive()
            self._log.resume()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is computed for a record alone is no part of what the replay computes."""
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
        """A collective or send of the current stage begins; call `posted` when it is under way.

        Rows that stay here do not count.

        Args:
            ranks: of its group, global.
            to: global ranks that rows go to.
            num_rows: as long as `to`; rows to each of them.
            row_bytes, metadata_bytes: of a row, and how many of them are no hidden state.
            num_real: as long as `to`; how many of the rows are no padding; None for all.

        Returns:
            Its number for `end_wait`; None unless operations are recorded.
        """
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
        """The transfer is under way, and the rank computes on."""
        if self._log is not None:
            self._log.resume()

    @property
    def may_wait_at_once(self) -> bool:
        """Whether nothing else can be computed while a rank waits, and nothing is counted."""
        return not (self.is_recording or self.is_interleaved)

    def wait_at_once(self, until: Callable[[], ResultT]) -> ResultT:
        """What a wait in the current stage gives, in a step in which nothing is counted."""
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
        """Since the first call, which begins them."""
        if self.meter is None:
            self.meter = Meter(self._num_layers, self._num_experts)
        return self.meter.totals()

    def check_finite(self, values: Tensor, point: CheckPoint, layer: int = NO_LAYER) -> None:
        """Look for values that are NaN or infinite, where that is asked."""

    def end_step(self) -> RankRecord | None:
        """Close the record; None where the plan asked for none."""
        if self._log is not None:
            self._log.pause()
            if self._token is not None:
                self._token.release()
        record = self._record() if self.is_recording else None
        self._log = None
        self.is_recording = self._recording_routing = self._recording_events = False
        self.enter(Stage.IDLE, self._last_layer)  # the launcher shall see where it came to
        self.layer = NO_LAYER
        self._ended_s = time.perf_counter()
        self._process_cpu_s = time.process_time()
        return record

    def _record(self) -> RankRecord:
        self._times.end()
        wall_s, cpu_s, blocked_s = self._times.seconds()
        for seconds in (wall_s, blocked_s):
            seconds[0, -1, Stage.IDLE] += self._idle_s
        # Of a rank with several threads, one waits for the others meanwhile.
        is_alone = self._token is not None and torch.get_num_threads() == 1
        return self._counted(
            wall_s=wall_s,
            cpu_s=cpu_s,
            blocked_s=blocked_s,
            process_cpu_s=time.process_time() - self._process_cpu_s,
            events=self._times.events(is_alone=is_alone) if self._recording_events else None,
            operations=None if self._log is None else self._log.operations(self._world_size),
        )


class CheckedRecorder(Recorder):
    """A recorder that also knows what is checked, and which stage was before.

    Attributes:
        before: the stage before the present one.
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
        """As `Recorder`'s; what every transfer moves is looked at between its begin and its end."""
        return super().may_wait_at_once and not self.checks.is_full

    @property
    def place(self) -> Place:
        """Where a transfer of the present stage is."""
        stage = self.before if self.stage is Stage.COLLECTIVES else self.stage
        return self.checks.place(_GATHERED.get(stage, CheckPoint.HAND_OVER), self.layer)
