"""The counters of a rank: seconds by stage, FLOPs, bytes read and sent."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from expertlane.comm.clocks import HostClock
from expertlane.comm.core_token import CoreToken
from expertlane.comm.meter import Meter
from expertlane.comm.operation_log import OperationLog
from expertlane.comm.progress import NO_LAYER, ProgressReporter
from expertlane.comm.step_times import StepTimes
from expertlane.cost.step.operation import TransferKind
from expertlane.results.rank_totals import RankTotals
from expertlane.results.step_record import RankRecord
from expertlane.spec.names import CheckPoint, Stage, Traffic

if TYPE_CHECKING:
    from expertlane.comm.checks import Checks

ResultT = TypeVar("ResultT")

_NUM_STAGES = len(Stage)


class Recorder:
    """Splits a rank's time at every change of stage and adds up what its call sites count.

    `enter` ends the stage before it; there is always exactly one current stage. Where a plan asks
    for no record, only the progress line is kept up to date.

    Args:
        rank: global rank.
        world_size: ranks of the layout, replicas too.
        token: taken while a step's operations are recorded; None where ranks share no cores.

    Attributes:
        is_recording: anything is counted in this step.
        is_interleaved: another part of the batch is computed while one waits.
        meter: running totals, of steps without a record too; None until they are asked for.
        checks: what looks for silent errors; None where nobody does.
    """

    checks: "Checks | None" = None

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
        self._rank = rank
        self._world_size = world_size
        self._num_layers = num_layers
        self._num_experts = num_experts
        self.progress = progress
        self._clock = clock
        self._token = token
        self._log: OperationLog | None = None
        self.stage = Stage.IDLE
        self.layer = NO_LAYER
        self._last_layer = NO_LAYER
        self.is_recording = False
        self._recording_routing = self._recording_events = False
        self.is_interleaved = False
        self.meter: Meter | None = None
        self._micro_batch = 0
        self._waited_cpu_s, self._wait_began_ns = 0.0, 0
        self._ended_s = time.perf_counter()
        self._process_cpu_s = time.process_time()
        self._clear()

    def _clear(self) -> None:
        self._idle_s = 0.0
        self._flops = [0] * _NUM_STAGES
        self._weight_bytes = [0] * _NUM_STAGES
        self._num_collectives = [0] * _NUM_STAGES
        self._kv_bytes = 0
        self._sent_bytes: defaultdict[tuple[Stage, Traffic], list[int]] = defaultdict(
            lambda: [0] * self._world_size
        )
        self._tokens = np.zeros((self._num_layers, self._num_experts), dtype=np.int64)
        self._by_ranks_reached, self._by_nodes_reached = np.zeros(
            (2, self._world_size + 1), dtype=np.int64
        )
        self._num_remote_rank_copies = self._num_remote_node_copies = 0
        self._payload_squares = np.zeros(2)
        self._num_pairs_saved, self._copies_s = 0, 0.0
        self._topk_ids: defaultdict[int, list[Tensor]] = defaultdict(list)  # by layer

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
            self._clear()
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

    def count_compute(self, flops: int, weight_bytes: int, kv_bytes: int = 0) -> None:
        """Add floating-point operations and bytes read to the current stage."""
        if self.is_recording:
            self._flops[self.stage] += flops
            self._weight_bytes[self.stage] += weight_bytes
            self._kv_bytes += kv_bytes

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
        self._num_collectives[self.stage] += 1
        real = num_rows if num_real is None else num_real
        counted = [
            (Traffic.PAYLOAD, real, row_bytes - metadata_bytes),
            (Traffic.METADATA, real, metadata_bytes),
        ]
        if num_real is not None:
            padding = [a - b for a, b in zip(num_rows, num_real, strict=True)]
            counted.append((Traffic.PADDING, padding, row_bytes))
        for traffic, rows, num_bytes in counted:
            if num_bytes:
                of_rank = self._sent_bytes[self.stage, traffic]
                for rank, num in zip(to, rows, strict=True):
                    of_rank[rank] += num * num_bytes
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

    def count_expert_tokens(self, experts: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Add token-expert pairs of different experts of the current layer."""
        if self.is_recording:
            self._tokens[self.layer, list(experts)] += num_tokens

    def record_topk_ids(self, topk_ids: Tensor) -> None:
        """Keep the experts chosen in the current layer, if the plan asks for routing.

        Args:
            topk_ids: [T, K]; logical experts of this rank's own tokens.
        """
        if self._recording_routing:
            self._topk_ids[self.layer].append(topk_ids.to("cpu", torch.int32, copy=True))

    def count_fan_out(
        self,
        ranks_reached: Tensor,
        nodes_reached: Tensor,
        num_remote_rank_copies: int,
        num_remote_node_copies: int,
    ) -> None:
        """Add how far one layer's tokens spread.

        Args:
            ranks_reached, nodes_reached: [T] whole numbers; how many ranks and nodes hold experts
                chosen for each token; this one counts where it does too.
            num_remote_rank_copies: (token, rank on another node) pairs.
            num_remote_node_copies: (token, other node) pairs.
        """
        if self.is_recording:
            num = self._world_size + 1
            self._by_ranks_reached += np.bincount(ranks_reached.cpu().numpy(), minlength=num)
            self._by_nodes_reached += np.bincount(nodes_reached.cpu().numpy(), minlength=num)
            self._num_remote_rank_copies += num_remote_rank_copies
            self._num_remote_node_copies += num_remote_node_copies

    def count_copies(self, num_saved: int, seconds: float) -> None:
        """Add what sharing one layer's tokens among copies brought and took.

        Args:
            num_saved: pairs that the fullest rank is spared.
            seconds: processor time of this rank.
        """
        if self.is_recording:
            self._num_pairs_saved += num_saved
            self._copies_s += seconds
        if self.meter is not None:
            self.meter.shared_out(num_saved, seconds)

    def count_payload_error(self, error_squares: float, squares: float) -> None:
        """Add hidden states that are sent in a narrower type.

        Args:
            error_squares: the sum of the squares of what rounding changed.
            squares: the sum of the squares of the hidden states.
        """
        if self.is_recording:
            self._payload_squares += (error_squares, squares)

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
        sent_bytes = np.zeros((_NUM_STAGES, len(Traffic), self._world_size), dtype=np.int64)
        for (stage, traffic), of_rank in self._sent_bytes.items():
            sent_bytes[stage, traffic] = of_rank
        sent_bytes[..., self._rank] = 0
        # Of a rank with several threads, one waits for the others meanwhile.
        is_alone = self._token is not None and torch.get_num_threads() == 1
        return RankRecord(
            rank=self._rank,
            wall_s=wall_s,
            cpu_s=cpu_s,
            blocked_s=blocked_s,
            process_cpu_s=time.process_time() - self._process_cpu_s,
            flops=np.array(self._flops, dtype=np.int64),
            weight_bytes=np.array(self._weight_bytes, dtype=np.int64),
            kv_bytes=self._kv_bytes,
            sent_bytes=sent_bytes,
            num_collectives=np.array(self._num_collectives, dtype=np.int64),
            num_tokens_per_expert=self._tokens,
            tokens_by_ranks_reached=self._by_ranks_reached,
            tokens_by_nodes_reached=self._by_nodes_reached,
            num_remote_rank_copies=self._num_remote_rank_copies,
            num_remote_node_copies=self._num_remote_node_copies,
            num_pairs_saved=self._num_pairs_saved,
            copies_s=self._copies_s,
            payload_squares=self._payload_squares,
            topk_ids={layer: torch.cat(ids).numpy() for layer, ids in self._topk_ids.items()},
            events=self._times.events(is_alone=is_alone) if self._recording_events else None,
            operations=None if self._log is None else self._log.operations(self._world_size),
        )
