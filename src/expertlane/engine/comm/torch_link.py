"""Transfers among the ranks of a group by a process group of `torch.distributed`, gloo's or nccl's.

Nearly everything is built on the uneven all-to-all: gloo has it asynchronous and with uneven or
empty parts, and on few cores it is several times cheaper than gloo's own all-gather, reduce-scatter
or all-reduce of the same rows (docs/log.md). Only an all-gather of many bytes goes by single sends
and receives: an all-to-all would need a copy of the rows for every rank.

nccl has more collectives of its own. Its streams are those of torch's process group, not ours: each
group has one of its own, on which a transfer begins once the computing stream has come to where it
was asked for; a wait has the computing stream, not the host, wait for its end. A second stream of
ours would add two events to each transfer and overlap nothing more. Never run on a GPU
(docs/validation.md); padding is tested on gloo's process group.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.transport import Link, PeerLostError, Work

_MOST_PADDED = 1.25  # padded over real rows, in a transfer of many bytes; not measured
_SUMMED = (torch.float16, torch.bfloat16)  # summed by nccl across nodes
_AT_ONCE = timedelta(milliseconds=1)
MANY_BYTES = 256 * 1024  # of a rank's rows in an all-gather
_TAG, _GATHER_TAG, _PAIRWISE_TAG, ABORT_TAG = range(4)  # keep sends between the same ranks apart


@contextlib.contextmanager
def blaming_peers(epoch: Epoch) -> Iterator[None]:
    """Turn the backend's errors into `PeerLostError`, or `EpochEndedError` if the epoch ended."""
    try:
        yield
    except RuntimeError as error:
        epoch.check()
        raise PeerLostError(str(error).splitlines()[0]) from error


class Gloo:
    """A process group of gloo.

    Args:
        store: the rendezvous of its ranks.
        place: this rank's place in the group, of `size`.
    """

    def __init__(self, store: Store, place: int, size: int, timeout: timedelta) -> None:
        from torch.distributed import ProcessGroupGloo

        self.group: Any = ProcessGroupGloo(store, place, size, timeout)
        self._others = [other for other in range(size) if other != place]
        self._num_devices = os.environ.get("GLOO_SOCKET_IFNAME", "").count(",") + 1

    @contextlib.contextmanager
    def together(self, works: list[Any]) -> Iterator[None]:
        """Begin several sends and receives, each with a wait of its own."""
        yield

    def abort(self) -> None:
        """Abort all operations by receives that time out, which close their device's connections.

        A receive whose connection is broken already fails earlier, and closes none.
        """
        tags = range(ABORT_TAG, ABORT_TAG + self._num_devices)
        for other, tag in itertools.product(self._others, tags):
            with contextlib.suppress(RuntimeError):
                self.group.recv([torch.empty(1)], other, tag).wait(_AT_ONCE)


class Nccl:
    """A process group of nccl. Its abort has never run: docs/validation.md.

    Args:
        store: the rendezvous of its ranks.
        place: this rank's place in the group, of `size`.
    """

    def __init__(
        self, store: Store, place: int, size: int, timeout: timedelta, device: torch.device
    ) -> None:
        from torch.distributed import ProcessGroupNCCL

        # The epoch tells ranks that another is lost; by default torch would end their processes.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        options.is_high_priority_stream = True  # beside kernels that fill the GPU
        self.group: Any = ProcessGroupNCCL(store, place, size, options)
        self.group.eager_connect_single_device(device)

    @contextlib.contextmanager
    def together(self, works: list[Any]) -> Iterator[None]:
        """Begin several sends and receives as one; `works` becomes the one wait for all of them."""
        self.group._start_coalescing()
        yield
        works[:] = [self.group._end_coalescing()]

    def abort(self) -> None:
        """Abort all operations: kernels that wait for other ranks end, with any values."""
        self.group.abort()


Backend = Gloo | Nccl


class TorchWork(Work):
    """Torch's works of a transfer.

    Args:
        sent: what must outlive the transfer.
        then: called after the wait.
    """

    def __init__(
        self,
        works: Sequence[Any],
        epoch: Epoch,
        received: Tensor | None = None,
        sent: Tensor | None = None,
        then: Callable[[], object] | None = None,
    ) -> None:
        self._works, self._epoch, self.received = works, epoch, received
        self._sent, self._then = sent, then

    def wait(self) -> None:
        with blaming_peers(self._epoch):
            for work in self._works:
                work.wait()
        if self._then is not None:
            self._then()

    def let_go(self) -> None:
        """Return at once: threads of gloo and nccl go on with the send."""


class TorchLink(Link):
    """A link by a process group.

    Args:
        place: this rank's place in the group, of `size`.
        device: device of the rows.
        spans_nodes: the ranks of the group are on several nodes.
    """

    sends_in_pairs = True  # between nodes, where bytes take longer than calls

    def __init__(
        self,
        backend: Backend,
        place: int,
        size: int,
        device: torch.device,
        epoch: Epoch,
        *,
        spans_nodes: bool,
    ) -> None:
        self._backend, self._group = backend, backend.group
        self._place, self._size = place, size
        self._device, self._epoch = device, epoch
        self._spans_nodes = spans_nodes

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=self._device)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> TorchWork:
        if self._spans_nodes and self.sends_in_pairs:
            return self._pairwise(rows, send, received, receive)
        with blaming_peers(self._epoch):
            work = self._group.alltoall_base(received, rows, list(receive), list(send))
        return TorchWork([work], self._epoch, received)

    def _pairwise(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> TorchWork:
        """An all-to-all whose receives are all posted before its sends.

        gloo sends nothing before the receiver has said that it is ready, on the connection that
        carries its own rows too: in gloo's all-to-all a late rank says so behind its rows.
        """
        parts, into = torch.split(rows, list(send)), torch.split(received, list(receive))
        group = self._group
        to = [(self._place + away) % self._size for away in range(1, self._size)]
        with blaming_peers(self._epoch):
            works = [
                group.recv([into[place]], place, _PAIRWISE_TAG)
                for place in reversed(to)  # the rank that sends to this one first comes first
                if receive[place]
            ]
            works += [
                group.send([parts[place]], place, _PAIRWISE_TAG) for place in to if send[place]
            ]
        into[self._place].copy_(parts[self._place])
        return TorchWork(works, self._epoch, received)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> TorchWork:
        size = self._size
        if max(num_rows_of) * rows.shape[1] * rows.itemsize < MANY_BYTES:
            rows = rows.repeat(size, 1)
            return self.all_to_all(rows, [len(rows) // size] * size, received, num_rows_of)
        parts = torch.split(received, list(num_rows_of))
        works: list[Any] = []
        with blaming_peers(self._epoch), self._backend.together(works):
            for away in range(1, size):  # every rank begins with another
                to, source = (self._place + away) % size, (self._place - away) % size
                if len(rows):
                    works.append(self._group.send([rows], to, _GATHER_TAG))
                if len(parts[source]):
                    works.append(self._group.recv([parts[source]], source, _GATHER_TAG))
        parts[self._place].copy_(rows)
        return TorchWork(works, self._epoch)

    def send(self, rows: Tensor, to: int) -> TorchWork:
        with blaming_peers(self._epoch):
            return TorchWork([self._group.send([rows], to, _TAG)], self._epoch)

    def receive(self, rows: Tensor, source: int) -> TorchWork:
        with blaming_peers(self._epoch):
            return TorchWork([self._group.recv([rows], source, _TAG)], self._epoch)


class NcclLink(TorchLink):
    """A link with nccl's own all-gather, and its reduce-scatter of 16-bit values across nodes.

    `Group` computes other sums: inside a node every rank sends as many bytes either way, and nccl
    rounds after each rank (docs/design_decisions.md).
    """

    sends_in_pairs = False
    pads = True

    def padded_to(self, num_rows_of: Sequence[int], row_bytes: int) -> int | None:
        most = max(num_rows_of)
        is_small = most * row_bytes < MANY_BYTES
        is_worth = is_small or most * self._size <= _MOST_PADDED * sum(num_rows_of)
        return most if is_worth else None

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> TorchWork:
        width = rows.shape[1]
        most = self.padded_to(num_rows_of, width * rows.itemsize)
        if most is None:
            return super().all_gather(rows, received, num_rows_of)
        if not most:
            return TorchWork([], self._epoch)
        is_even = min(num_rows_of) == most
        whole = received if is_even else rows.new_empty(self._size * most, width)
        sent = _padded(rows, most)
        with blaming_peers(self._epoch):
            work = self._group._allgather_base(whole, sent)
        if is_even:
            return TorchWork([work], self._epoch, sent=sent)

        def cut() -> None:
            parts = whole.view(self._size, most, width)
            kept = [part[:num] for part, num in zip(parts, num_rows_of, strict=True)]
            torch.cat(kept, out=received)

        return TorchWork([work], self._epoch, sent=sent, then=cut)

    def reduce_scatter(
        self, rows: Tensor, num_rows_of: Sequence[int]
    ) -> tuple[TorchWork, Tensor] | None:
        width = rows.shape[1]
        most = self.padded_to(num_rows_of, width * rows.itemsize)
        if not (self._spans_nodes and rows.dtype in _SUMMED and most):
            return None
        if min(num_rows_of) < most:
            parts = [_padded(part, most) for part in torch.split(rows, list(num_rows_of))]
            rows = torch.cat(parts)
        own = rows.new_empty(most, width)
        with blaming_peers(self._epoch):
            work = self._group._reduce_scatter_base(own, rows)
        return TorchWork([work], self._epoch, sent=rows), own[: num_rows_of[self._place]]


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    """Rows padded to [num_rows, width] with uninitialized rows."""
    if len(rows) == num_rows:
        return rows
    padded = rows.new_empty(num_rows, rows.shape[1])
    padded[: len(rows)] = rows
    return padded
