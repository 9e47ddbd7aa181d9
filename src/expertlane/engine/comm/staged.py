"""Transfers between GPUs through host memory, for ranks that share a GPU, which nccl refuses.

Rows are copied to the host, exchanged there by the hosts' transport, and copied back. The host
waits for the device before it sends, so nothing overlaps: this shows that results are right, not
how fast GPUs are. The copies have never run on a GPU (docs/validation.md).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expertlane.engine.comm.transport import AtOnce, Link, Transport, Work
from expertlane.engine.ops.row_parts import RowParts


class _StagedWork:
    """A transfer between hosts, and the copy to the device after it.

    Args:
        came: rows received, on the host; None for a send.
        received: on the device, of the same size; filled with them after the wait.
    """

    def __init__(
        self, work: Work, came: Tensor | None = None, received: Tensor | None = None
    ) -> None:
        self._work, self._came, self._received = work, came, received

    def wait(self) -> None:
        self._work.wait()
        if self._came is not None and self._received is not None:
            # Pinned memory: torch does not reuse it before the copy is over.
            self._received.copy_(self._came, non_blocking=True)
            self._came = None

    def read(self, finish: Callable[[RowParts], Tensor]) -> Tensor:
        assert self._received is not None, "it is no send"
        return finish(RowParts.of(self._received))

    def let_go(self) -> None:
        self._work.let_go()


class StagedLink:
    """Implements `Link` for a device by a link between hosts."""

    at_once: AtOnce | None = None

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link, self._device = link, device

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=self._device)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> _StagedWork:
        came = self._room(received)
        work = self._link.all_to_all(self._on_host(rows), send, came, receive)
        return _StagedWork(work, came, received)

    def all_to_all_parts(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> _StagedWork:
        return self.all_to_all(rows, send, rows.new_empty(sum(receive), rows.shape[1]), receive)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> _StagedWork:
        came = self._room(received)
        work = self._link.all_gather(self._on_host(rows), came, num_rows_of)
        return _StagedWork(work, came, received)

    def padded_to(self, num_rows_of: Sequence[int], row_bytes: int) -> int | None:
        return None

    def reduce_scatter(
        self, rows: Tensor, num_rows_of: Sequence[int]
    ) -> tuple[_StagedWork, Tensor] | None:
        return None

    def send(self, rows: Tensor, to: int) -> _StagedWork:
        return _StagedWork(self._link.send(self._on_host(rows), to))

    def receive(self, rows: Tensor, source: int) -> _StagedWork:
        came = self._room(rows)
        return _StagedWork(self._link.receive(came, source), came, rows)

    def _on_host(self, rows: Tensor) -> Tensor:
        """Copy rows to the host and wait, since a transport between hosts sends at once."""
        return self._room(rows).copy_(rows)

    def _room(self, like: Tensor) -> Tensor:
        is_pinned = self._device.type == "cuda"
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=is_pinned)


class StagedTransport:
    """Implements `Transport` for a device.

    Args:
        hosts: the transport between hosts.
    """

    def __init__(self, hosts: Transport, device: torch.device) -> None:
        self._hosts, self._device = hosts, device

    def make(self, ranks: tuple[int, ...]) -> None:
        self._hosts.make(ranks)

    def link(self, ranks: tuple[int, ...]) -> StagedLink:
        return StagedLink(self._hosts.link(ranks), self._device)

    def leave(self) -> None:
        self._hosts.leave()
