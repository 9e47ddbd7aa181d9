"""The record of a rank's steps: seconds by stage, waits, and what is counted meanwhile."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from expertlane.cost.step.operation import TransferKind
from expertlane.engine.comm.checks import Checks
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.core_token import CoreToken
from expertlane.engine.comm.meter import Meter
from expertlane.engine.comm.operation_log import OperationLog
from expertlane.engine.comm.progress import NO_LAYER, ProgressReporter
from expertlane.engine.comm.step_counters import StepCounters
from expertlane.engine.comm.step_times import StepTimes
from expertlane.results.rank_totals import RankTotals
from expertlane.results.step_checks import Place
from expertlane.results.step_record import RankRecord
from expertlane.spec.names import CheckPoint, Stage

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
