"""Transfers among the ranks of a group by a process group of `torch.distributed`.

Nearly everything is built on the uneven all-to-all: gloo has it asynchronous and with uneven or
empty parts, and on few cores it is several times cheaper than gloo's own all-gather, reduce-scatter
or all-reduce of the same rows (docs/log.md). Only an all-gather of many bytes goes by single sends
and receives: an all-to-all would need a copy of the rows for every rank. nccl has more collectives
of its own (`engine/comm/nccl.py`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.transport import AtOnce, PeerLostError
from expertlane.engine.ops.row_parts import RowParts

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


class Backend(Protocol):
    """A process group of torch, and the operations in which gloo and nccl differ."""

    group: Any

    def together(self, works: list[Any]) -> AbstractContextManager[None]:
        """Within this, begin several sends and receives; `works` then holds the waits for them."""
        ...

    def abort(self) -> None:
        """Abort all operations."""
        ...


class TorchWork:
    """Implements `Work` by torch's works."""

    def __init__(
        self,
        works: Sequence[Any],
        epoch: Epoch,
        received: Tensor | None = None,
        sent: Tensor | None = None,
    ) -> None:
        self._works, self._epoch, self._received = works, epoch, received
        self._sent = sent  # must outlive the transfer

    def wait(self) -> None:
        with blaming_peers(self._epoch):
            for work in self._works:
                work.wait()

    def read(self, finish: Callable[[RowParts], Tensor]) -> Tensor:
        assert self._received is not None, "it came in parts"
        return finish(RowParts.of(self._received))

    def let_go(self) -> None:
        """Return at once: threads of gloo and nccl go on with the send."""


class TorchLink:
    """Implements `Link` by a process group.

    Args:
        place: this rank's place in the group, of `size`.
        device: device of the rows.
        over_links: gloo's messages go between nodes, where bytes take longer than calls.
    """

    at_once: AtOnce | None = None

    def __init__(
        self,
        backend: Backend,
        place: int,
        size: int,
        device: torch.device,
        epoch: Epoch,
        *,
        over_links: bool,
    ) -> None:
        self._backend, self._group = backend, backend.group
        self._place, self._size = place, size
        self._device, self._epoch = device, epoch
        self._over_links = over_links

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=self._device)

    def all_to_all_parts(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> TorchWork:
        return self.all_to_all(rows, send, rows.new_empty(sum(receive), rows.shape[1]), receive)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> TorchWork:
        if self._over_links:
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

    def padded_to(self, num_rows_of: Sequence[int], row_bytes: int) -> int | None:
        return None

    def reduce_scatter(
        self, rows: Tensor, num_rows_of: Sequence[int]
    ) -> "tuple[TorchWork, Tensor] | None":
        return None

    def send(self, rows: Tensor, to: int) -> TorchWork:
        with blaming_peers(self._epoch):
            return TorchWork([self._group.send([rows], to, _TAG)], self._epoch)

    def receive(self, rows: Tensor, source: int) -> TorchWork:
        with blaming_peers(self._epoch):
            return TorchWork([self._group.recv([rows], source, _TAG)], self._epoch)
