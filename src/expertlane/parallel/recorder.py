"""The clock and counters of a rank: seconds by stage, FLOPs, bytes read and sent."""

import time

import numpy as np

from expertlane.parallel.progress import NO_LAYER, ProgressReporter
from expertlane.spec.names import Link, Stage, Traffic
from expertlane.spec.record import RankRecord

_NUM_STAGES = len(Stage)


class Recorder:
    """Splits a rank's time at every change of stage and adds up what its call sites count.

    `enter` ends the stage before it; there is always exactly one current stage. Where a plan asks
    for no record only the progress line is kept up to date.
    """

    def __init__(
        self, rank: int, num_layers: int, num_experts: int, progress: ProgressReporter
    ) -> None:
        self._rank = rank
        self._num_layers = num_layers
        self._num_experts = num_experts
        self.progress = progress
        self.stage = Stage.IDLE
        self.layer = NO_LAYER
        self._recording = False
        self._micro_batch = 0
        self._wall_at = self._idle_since = time.perf_counter()
        self._cpu_at = time.thread_time()
        self._process_cpu_at = time.process_time()
        self._clear(1)

    def _clear(self, num_micro_batches: int) -> None:
        self._num_micro_batches = num_micro_batches
        num_cells = num_micro_batches * (self._num_layers + 1) * _NUM_STAGES
        self._wall = [0.0] * num_cells
        self._cpu = [0.0] * num_cells
        self._blocked = [0.0] * num_cells
        self._flops = [0] * _NUM_STAGES
        self._weight_bytes = [0] * _NUM_STAGES
        self._num_collectives = [0] * _NUM_STAGES
        self._kv_bytes = 0
        self._sent_bytes = np.zeros((len(Traffic), len(Link)), dtype=np.int64)
        self._tokens = np.zeros((self._num_layers, self._num_experts), dtype=np.int64)

    def begin_step(
        self, step: int, num_micro_batches: int, *, record: bool, count_idle: bool
    ) -> None:
        """Start a step's record; the time since the last step counts as idle if asked for."""
        now = time.perf_counter()
        self.progress.set_step(step)
        self._clear(num_micro_batches)
        self._recording = record
        self._micro_batch = 0
        if count_idle:
            idle = now - self._idle_since
            cell = self._cell(Stage.IDLE, NO_LAYER)
            self._wall[cell] = self._blocked[cell] = idle
        else:
            self._process_cpu_at = time.process_time()
        self.stage, self.layer = Stage.IDLE, NO_LAYER
        self._wall_at, self._cpu_at = now, time.thread_time()

    def _cell(self, stage: Stage, layer: int) -> int:
        slot = self._num_layers if layer == NO_LAYER else layer
        return (self._micro_batch * (self._num_layers + 1) + slot) * _NUM_STAGES + stage

    def set_micro_batch(self, micro_batch: int) -> None:
        """What follows belongs to another micro-batch; call `enter` next."""
        self._close_interval()
        self._micro_batch = micro_batch

    def enter(self, stage: Stage, layer: int = NO_LAYER) -> None:
        """End the current stage and begin `stage` of `layer`."""
        self._close_interval()
        self.stage, self.layer = stage, layer
        self.progress.enter(stage, layer)

    def _close_interval(self) -> None:
        if not self._recording:
            return
        wall, cpu = time.perf_counter(), time.thread_time()
        cell = self._cell(self.stage, self.layer)
        self._wall[cell] += wall - self._wall_at
        self._cpu[cell] += cpu - self._cpu_at
        self._wall_at, self._cpu_at = wall, cpu

    def begin_wait(self) -> float:
        """A wait for other ranks begins; pass what this returns to `end_wait`."""
        self.progress.set_waiting(True)
        return time.perf_counter()

    def end_wait(self, began_s: float) -> None:
        """The wait is over."""
        self.progress.set_waiting(False)
        self.progress.touch()
        if self._recording:
            cell = self._cell(self.stage, self.layer)
            self._blocked[cell] += time.perf_counter() - began_s

    def count_compute(self, flops: int, weight_bytes: int, kv_bytes: int = 0) -> None:
        """Add floating-point operations and bytes read to the current stage."""
        self._flops[self.stage] += flops
        self._weight_bytes[self.stage] += weight_bytes
        self._kv_bytes += kv_bytes

    def count_sent(self, traffic: Traffic, link: Link, num_bytes: int) -> None:
        """Add bytes that this rank sends to another one."""
        self._sent_bytes[traffic, link] += num_bytes

    def count_collective(self) -> None:
        """Add one collective or point-to-point send to the current stage."""
        self._num_collectives[self.stage] += 1

    def count_expert_tokens(self, first_expert: int, num_tokens: list[int]) -> None:
        """Add token-expert pairs of consecutive experts of the current layer."""
        self._tokens[self.layer, first_expert : first_expert + len(num_tokens)] += num_tokens

    def end_step(self) -> RankRecord | None:
        """Close the record; None where the plan asked for none."""
        self._close_interval()
        self.stage, self.layer = Stage.IDLE, NO_LAYER
        self.progress.set_step(-1)
        self.progress.enter(Stage.IDLE, NO_LAYER)
        self._idle_since = time.perf_counter()
        if not self._recording:
            return None
        self._recording = False
        process_cpu = time.process_time()
        used, self._process_cpu_at = process_cpu - self._process_cpu_at, process_cpu
        shape = (self._num_micro_batches, self._num_layers + 1, _NUM_STAGES)
        return RankRecord(
            rank=self._rank,
            wall_s=np.array(self._wall).reshape(shape),
            cpu_s=np.array(self._cpu).reshape(shape),
            blocked_s=np.array(self._blocked).reshape(shape),
            process_cpu_s=used,
            flops=np.array(self._flops, dtype=np.int64),
            weight_bytes=np.array(self._weight_bytes, dtype=np.int64),
            kv_bytes=self._kv_bytes,
            sent_bytes=self._sent_bytes,
            num_collectives=np.array(self._num_collectives, dtype=np.int64),
            num_tokens_per_expert=self._tokens,
        )
