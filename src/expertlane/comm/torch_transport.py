"""The seam to `torch.distributed`: gloo and nccl.

Nearly everything is built on the uneven all-to-all, because gloo has it uneven, empty and
asynchronous, and because on few cores it is several times cheaper there than gloo's own all-gather,
reduce-scatter or all-reduce of the same rows (docs/log.md). Only an all-gather
of many bytes goes by single sends and receives: an all-to-all would need a copy of the rows for
every rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from expertlane.comm.transport import AtOnce, PeerLostError
from expertlane.ops.row_parts import RowParts

_MANY_BYTES = 256 * 1024  # of a rank's rows in an all-gather
_GATHER_TAG, _PAIRWISE_TAG = 1, 2  # keep their sends apart from others between the same ranks


@contextlib.contextmanager
def _blaming_peers() -> Iterator[None]:
    """Turn the backend's errors into `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(str(error).splitlines()[0]) from error


class _TorchWork:
    def __init__(self, works: Sequence[Any], received: Tensor | None = None) -> None:
        self._works, self._received = works, received

    def wait(self) -> None:
        with _blaming_peers():
            for work in self._works:
                work.wait()

    def read(self, finish: Callable[[RowParts], Tensor]) -> Tensor:
        assert self._received is not None, "it came in parts"
        return finish(RowParts.of(self._received))

    def let_go(self) -> None:
        """Threads of gloo and nccl see to it."""


class TorchLink:
    """Implements `Link`.

    Args:
        ranks: [size]; global ranks, in group order.
        place: this rank's in the group.
        device_type: of what is sent.
        over_links: gloo's messages go from node to node, where bytes take longer than calls.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        ranks: Sequence[int],
        place: int,
        device_type: str,
        *,
        over_links: bool,
    ) -> None:
        self._group, self._ranks, self._place = group, ranks, place
        self._device = torch.device(device_type)
        self._over_links = over_links
        self.at_once: AtOnce | None = None

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=self._device)

    def all_to_all_parts(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> _TorchWork:
        return self.all_to_all(rows, send, rows.new_empty(sum(receive), rows.shape[1]), receive)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> _TorchWork:
        if self._over_links:
            return self._pairwise(rows, send, received, receive)
        with _blaming_peers():
            work = dist.all_to_all_single(
                received,
                rows,
                output_split_sizes=list(receive),
                input_split_sizes=list(send),
                group=self._group,
                async_op=True,
            )
        return _TorchWork([work], received)

    def _pairwise(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> _TorchWork:
        """An all-to-all whose receives are all posted before its sends.

        gloo sends nothing before the receiver has said that it is ready, on the connection that
        carries its own rows too: in gloo's all-to-all a late rank says so behind its rows.
        """
        parts, into = torch.split(rows, list(send)), torch.split(received, list(receive))
        size, works = len(self._ranks), []
        to = [(self._place + away) % size for away in range(1, size)]
        with _blaming_peers():
            for place in reversed(to):  # who sends to this rank first comes first
                if receive[place]:
                    source = self._ranks[place]
                    works.append(dist.irecv(into[place], source, self._group, _PAIRWISE_TAG))
            for place in to:
                if send[place]:
                    target = self._ranks[place]
                    works.append(dist.isend(parts[place], target, self._group, _PAIRWISE_TAG))
        into[self._place].copy_(parts[self._place])
        return _TorchWork(works, received)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> _TorchWork:
        size = len(self._ranks)
        if max(num_rows_of) * rows.shape[1] * rows.itemsize < _MANY_BYTES:
            rows = rows.repeat(size, 1)
            return self.all_to_all(rows, [len(rows) // size] * size, received, num_rows_of)
        parts = torch.split(received, list(num_rows_of))
        operations = []
        for away in range(1, size):  # every rank begins with another
            to, source = (self._place + away) % size, (self._place - away) % size
            for operation, part, peer in (
                (dist.isend, rows, to),
                (dist.irecv, parts[source], source),
            ):
                if len(part):
                    rank = self._ranks[peer]
                    operations.append(dist.P2POp(operation, part, rank, self._group, _GATHER_TAG))
        with _blaming_peers():
            works = dist.batch_isend_irecv(operations)
        parts[self._place].copy_(rows)
        return _TorchWork(works)

    def send(self, rows: Tensor, to: int) -> _TorchWork:
        with _blaming_peers():
            return _TorchWork([dist.isend(rows, dst=self._ranks[to], group=self._group)])

    def receive(self, rows: Tensor, source: int) -> _TorchWork:
        with _blaming_peers():
            return _TorchWork([dist.irecv(rows, src=self._ranks[source], group=self._group)])


class TorchTransport:
    """Implements `Transport` by one-dimensional device meshes.

    Args:
        rank: the global one.
        over_links: as a `TorchLink`'s.
    """

    def __init__(self, device_type: str, rank: int, *, over_links: bool) -> None:
        self._device_type, self._rank = device_type, rank
        self._over_links = over_links
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}

    def make(self, ranks: tuple[int, ...]) -> None:
        self._meshes[ranks] = DeviceMesh(self._device_type, torch.tensor(ranks))

    def link(self, ranks: tuple[int, ...]) -> TorchLink:
        group, place = self._meshes[ranks].get_group(), ranks.index(self._rank)
        return TorchLink(group, ranks, place, self._device_type, over_links=self._over_links)
