"""The seam to `torch.distributed`: the only file that starts a transfer, or waits for one.

Nearly everything is built on the uneven all-to-all, because gloo has it uneven, empty and
asynchronous, and because on few cores it is several times cheaper there than gloo's own all-gather,
reduce-scatter or all-reduce of the same rows (benchmarks/bench_collectives.py). It also leaves
every sum to us, in float32 and in rank order. Only an all-gather of many bytes goes by single sends
and receives: an all-to-all would need a copy of the rows for every rank.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from expertlane.comm.recorder import Recorder
from expertlane.errors import RankError
from expertlane.ops.backend import backend_for
from expertlane.spec.names import Traffic

_MANY_BYTES = 256 * 1024  # of a rank's rows in an all-gather
_GATHER_TAG = 1  # keeps its sends apart from others between the same ranks


class PeerLostError(RankError):
    """A transfer failed or timed out: some other rank is the cause."""


@contextlib.contextmanager
def _blaming_peers() -> Iterator[None]:
    """Turn the backend's errors into `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(str(error).splitlines()[0]) from error


class Pending:
    """A transfer in flight. It remembers the stage that began it, for the clock."""

    def __init__(
        self,
        recorder: Recorder,
        works: Sequence[Any],
        finish: Callable[[], Tensor],
        keep: Tensor | None,
    ) -> None:
        self._recorder = recorder
        self._works = works
        self._finish = finish
        self._keep = keep  # the sent buffer must outlive the transfer
        self._stage, self._layer = recorder.stage, recorder.layer

    def wait(self) -> Tensor:
        """Block until the transfer is done and give its result.

        Raises:
            PeerLostError: the other side is gone or did not answer within the group's bound.
        """
        self._recorder.enter(self._stage, self._layer)
        if self._works:
            begin = self._recorder.begin_wait()
            with _blaming_peers():
                for work in self._works:
                    work.wait()
            self._recorder.end_wait(begin)
        self._keep = None
        return self._finish()


class Group:
    """Ranks that exchange rows of two-dimensional tensors.

    Args:
        process_group: None for a group of one.
        ranks_per_node: consecutive global ranks that share a node.

    Attributes:
        ranks: [size]; global ranks, in group order.
        nodes: [size]; the node of each of them.
        rank: this rank's place in the group.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        rank: int,
        ranks_per_node: int,
        recorder: Recorder,
    ) -> None:
        self._process_group = process_group
        self.ranks = list(ranks)
        self.nodes = [each // ranks_per_node for each in ranks]
        self._recorder = recorder
        self.size = len(ranks)
        self.rank = self.ranks.index(rank)

    def _count(self, send: Sequence[int], row_bytes: int, metadata_bytes: int) -> None:
        recorder, ranks = self._recorder, self.ranks
        recorder.count_collective()
        recorder.count_sent(Traffic.PAYLOAD, ranks, send, row_bytes - metadata_bytes)
        recorder.count_sent(Traffic.METADATA, ranks, send, metadata_bytes)

    def _exchange(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        metadata_bytes: int,
        finish: Callable[[Tensor], Tensor] = lambda received: received,
    ) -> Pending:
        rows = rows.contiguous()
        row_bytes = rows.shape[1] * rows.itemsize
        self._count(send, row_bytes, metadata_bytes)
        received = rows.new_empty((sum(receive), rows.shape[1]))
        with _blaming_peers():
            work = dist.all_to_all_single(
                received,
                rows,
                output_split_sizes=list(receive),
                input_split_sizes=list(send),
                group=self._process_group,
                async_op=True,
            )
        return Pending(self._recorder, [work], lambda: finish(received), rows)

    def all_to_all(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        metadata_bytes: int = 0,
    ) -> Pending:
        """Send consecutive rows to the ranks of the group, and get theirs in rank order.

        Args:
            rows: [sum(send), width].
            send, receive: [size]; numbers of rows, zeros allowed.
            metadata_bytes: how many bytes of each row are no hidden state; only counted.

        Returns:
            [sum(receive), width] when waited for.
        """
        if self.size == 1:
            return Pending(self._recorder, (), lambda: rows, None)
        return self._exchange(rows, send, receive, metadata_bytes)

    def all_gather(
        self, rows: Tensor, num_rows_of: Sequence[int], metadata_bytes: int = 0
    ) -> Pending:
        """Give every rank the rows of all, in rank order; uneven and empty ones too.

        Args:
            rows: [num_rows_of[self.rank], width].

        Returns:
            [sum(num_rows_of), width] when waited for.
        """
        if self.size == 1:
            return Pending(self._recorder, (), lambda: rows, None)
        if max(num_rows_of) * rows.shape[1] * rows.itemsize >= _MANY_BYTES:
            return self._gather_by_sends(rows.contiguous(), num_rows_of, metadata_bytes)
        send = [rows.shape[0]] * self.size
        return self._exchange(rows.repeat(self.size, 1), send, num_rows_of, metadata_bytes)

    def _gather_by_sends(
        self, rows: Tensor, num_rows_of: Sequence[int], metadata_bytes: int
    ) -> Pending:
        row_bytes = rows.shape[1] * rows.itemsize
        self._count([len(rows)] * self.size, row_bytes, metadata_bytes)
        received = rows.new_empty((sum(num_rows_of), rows.shape[1]))
        parts = torch.split(received, list(num_rows_of))
        operations = []
        for away in range(1, self.size):  # every rank begins with another
            to, source = (self.rank + away) % self.size, (self.rank - away) % self.size
            for operation, part, peer in (
                (dist.isend, rows, to),
                (dist.irecv, parts[source], source),
            ):
                if len(part):
                    group = self._process_group
                    operations.append(
                        dist.P2POp(operation, part, self.ranks[peer], group, _GATHER_TAG)
                    )
        with _blaming_peers():
            works = dist.batch_isend_irecv(operations)
        parts[self.rank].copy_(rows)
        return Pending(self._recorder, works, lambda: received, rows)

    def reduce_scatter(self, rows: Tensor, num_rows_of: Sequence[int]) -> Pending:
        """Add up every rank's rows, in float32 and in rank order; each rank gets its part.

        Args:
            rows: [sum(num_rows_of), width].

        Returns:
            [num_rows_of[self.rank], width] in the dtype of `rows` when waited for.
        """
        if self.size == 1:
            return Pending(self._recorder, (), lambda: rows, None)
        own = num_rows_of[self.rank]

        def add_up(received: Tensor) -> Tensor:
            return backend_for(received.device).sum_parts(received, self.size)

        return self._exchange(rows, num_rows_of, [own] * self.size, 0, add_up)

    def send(self, rows: Tensor, to: int) -> Pending | None:
        """Begin to send rows to the rank at place `to`; None where there are none to send."""
        if rows.shape[0] == 0:
            return None
        rows = rows.contiguous()
        row_bytes = rows.shape[1] * rows.itemsize
        self._recorder.count_collective()
        self._recorder.count_sent(Traffic.PAYLOAD, [self.ranks[to]], [rows.shape[0]], row_bytes)
        with _blaming_peers():
            work = dist.isend(rows, dst=self.ranks[to], group=self._process_group)
        return Pending(self._recorder, [work], lambda: rows, rows)

    def receive(self, rows: Tensor, source: int) -> Pending:
        """Begin to fill `rows` from the rank at place `source`."""
        works = []
        if rows.shape[0]:
            with _blaming_peers():
                works = [dist.irecv(rows, src=self.ranks[source], group=self._process_group)]
        return Pending(self._recorder, works, lambda: rows, None)


ResultT = TypeVar("ResultT")

# A computation that begins a transfer, yields it where it waits, and is sent its result. One batch
# is exhausting one such generator; two-batch overlap is interleaving two, so that one computes
# while the other's tokens travel.
Steps = Generator[Pending, Tensor, ResultT]


def interleave(computations: Sequence[Steps[ResultT]]) -> list[ResultT]:
    """Run all computations to their ends, switching at every wait; results in the given order.

    Each is run up to its next wait in turn, so every rank that runs the same computations begins
    their transfers in the same order, whatever the sizes.
    """
    results: dict[int, ResultT] = {}
    waiting: deque[tuple[int, Pending | None]] = deque((i, None) for i in range(len(computations)))
    while waiting:
        index, pending = waiting.popleft()
        computation = computations[index]
        try:
            following = computation.send(pending.wait()) if pending else next(computation)
        except StopIteration as stop:
            results[index] = stop.value
        else:
            waiting.append((index, following))
    return [results[index] for index in range(len(computations))]
