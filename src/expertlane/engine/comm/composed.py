"""Transports made of others: of several nodes, and of GPUs whose hosts exchange their rows.

Ranks that share a GPU, which nccl refuses, have their rows copied to the host, exchanged there, and
copied back. The host waits for the device before it sends, so nothing overlaps: this shows that
results are right, not how fast GPUs are. The copies have never run on a GPU (docs/validation.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertlane.engine.comm.shared_memory import SharedTransport
from expertlane.engine.comm.torch_transport import TorchTransport
from expertlane.engine.comm.transport import Link, Transport, Work


class NodesTransport:
    """Implements `Transport` by one of two transports for each group.

    Args:
        in_node: transport of groups within this rank's node.
        among_nodes: transport of groups that span nodes.
        rank: global rank.
        ranks_per_node: consecutive ranks that share a node.
    """

    def __init__(
        self, in_node: SharedTransport, among_nodes: TorchTransport, rank: int, ranks_per_node: int
    ) -> None:
        self._in_node, self._among_nodes = in_node, among_nodes
        self._rank, self._ranks_per_node = rank, ranks_per_node

    def make(self, ranks: tuple[int, ...]) -> None:
        """Make a group; collective over all ranks if it spans nodes, else over its node's ranks."""
        nodes = {rank // self._ranks_per_node for rank in ranks}
        if len(nodes) > 1:
            self._among_nodes.make(ranks)
        elif self._rank // self._ranks_per_node in nodes:
            self._in_node.make(ranks)

    def link(self, ranks: tuple[int, ...]) -> Link:
        is_in_node = len({rank // self._ranks_per_node for rank in ranks}) == 1
        return self._in_node.link(ranks) if is_in_node else self._among_nodes.link(ranks)

    def leave(self) -> None:
        self._in_node.leave()
        self._among_nodes.leave()


class _StagedWork(Work):
    """A transfer between hosts, and the copy to the device after it.

    Args:
        came: rows received, on the host; None for a send.
        received: on the device, of the same size; filled with them after the wait.
    """

    def __init__(
        self, work: Work, came: Tensor | None = None, received: Tensor | None = None
    ) -> None:
        self._work, self._came, self.received = work, came, received

    def wait(self) -> None:
        self._work.wait()
        if self._came is not None and self.received is not None:
            # Pinned memory: torch does not reuse it before the copy is over.
            self.received.copy_(self._came, non_blocking=True)
            self._came = None

    def let_go(self) -> None:
        self._work.let_go()


class StagedLink(Link):
    """A link for a device by a link between hosts."""

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

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> _StagedWork:
        came = self._room(received)
        work = self._link.all_gather(self._on_host(rows), came, num_rows_of)
        return _StagedWork(work, came, received)

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
