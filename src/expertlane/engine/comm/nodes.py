"""Ranks of several nodes: shared memory for groups within a node, else torch.distributed."""

from expertlane.engine.comm.shared_memory import SharedTransport
from expertlane.engine.comm.torch_transport import TorchTransport
from expertlane.engine.comm.transport import Link


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
