"""Where the ranks of a pipeline stage sit: coordinates, groups and nodes, as arrays over ranks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from expertlane.cost.step.operation import Ints, Neighbours
from expertlane.spec.layout import Layout

Axis = Literal["tp", "ep", "etp", "stage", "ep_inter", "ep_intra"]


@dataclass(frozen=True, eq=False)
class StageMesh:
    """One pipeline stage of one replica; R ranks.

    Args:
        first_rank: global rank of the stage's first.
    """

    layout: Layout
    first_rank: int
    ranks_per_node: int

    @classmethod
    def of(cls, layout: Layout, replica: int, pp_rank: int, ranks_per_node: int) -> "StageMesh":
        """The stage at a place of a layout."""
        first = replica * layout.replica_size + pp_rank * layout.stage_size
        return cls(layout, first, ranks_per_node)

    @property
    def size(self) -> int:
        """Ranks, R."""
        return self.layout.stage_size

    @cached_property
    def _places(self) -> Ints:
        return np.arange(self.size)

    @cached_property
    def node(self) -> Ints:
        """[R]."""
        node: Ints = (self.first_rank + self._places) // self.ranks_per_node
        return node

    @cached_property
    def tp_rank(self) -> Ints:
        """[R]."""
        return self._places % self.layout.tp

    @cached_property
    def ep_rank(self) -> Ints:
        """[R]."""
        return self._places // self.layout.etp

    @cached_property
    def etp_rank(self) -> Ints:
        """[R]."""
        return self._places % self.layout.etp

    @cached_property
    def ep_per_node(self) -> int:
        """Ranks of an `ep` group on one node.

        Raises:
            SpecError: not equally many on each.
        """
        return self.layout.ep_ranks_per_node(self.ranks_per_node)

    @property
    def num_ep_nodes(self) -> int:
        """Nodes that an `ep` group lies on, where equally many of its ranks are on each."""
        return self.layout.ep // self.ep_per_node

    @cached_property
    def _groups(self) -> dict[Axis, Ints]:
        return {}

    def group(self, axis: Axis) -> Ints:
        """[R]; equal numbers are one group."""
        if axis not in self._groups:
            self._groups[axis] = self._group(axis)
        return self._groups[axis]

    def _group(self, axis: Axis) -> Ints:
        layout = self.layout
        match axis:
            case "tp":
                return self._places // layout.tp
            case "etp":
                return self.ep_rank
            case "ep":
                return self.etp_rank
            case "stage":
                return np.zeros_like(self._places)
            case "ep_intra":
                return self.ep_rank // self.ep_per_node * layout.etp + self.etp_rank
            case "ep_inter":
                return self.ep_rank % self.ep_per_node * layout.etp + self.etp_rank

    def group_size(self, axis: Axis) -> int:
        """Ranks of a group."""
        layout = self.layout
        match axis:
            case "tp":
                return layout.tp
            case "etp":
                return layout.etp
            case "ep":
                return layout.ep
            case "stage":
                return self.size
            case "ep_intra":
                return self.ep_per_node
            case "ep_inter":
                return self.num_ep_nodes

    @cached_property
    def _peers(self) -> dict[Axis, Ints]:
        return {}

    def peers(self, axis: Axis) -> Ints:
        """[R, R]; 1 where two different ranks share a group, else 0."""
        if axis not in self._peers:
            group = self.group(axis)
            peers = (group[:, None] == group).astype(np.int64)
            np.fill_diagonal(peers, 0)
            self._peers[axis] = peers
        return self._peers[axis]

    @cached_property
    def _neighbours(self) -> dict[Axis, Neighbours]:
        return {}

    def neighbours(self, axis: Axis) -> Neighbours:
        """What transfers over an axis have in common."""
        if axis not in self._neighbours:
            self._neighbours[axis] = Neighbours(self.group(axis), self.node)
        return self._neighbours[axis]

    @cached_property
    def nodes_of_ep_group(self) -> Ints:
        """[R, ep]; the nodes of the ranks of each rank's `ep` group."""
        layout = self.layout
        by_etp_rank = self.node.reshape(layout.ep, layout.etp).T
        nodes: Ints = by_etp_rank[self.etp_rank]
        return nodes

    @cached_property
    def _links(self) -> dict[Axis, tuple[int, int, int]]:
        return {}

    def peers_by_link(self, axis: Axis) -> tuple[int, int, int]:
        """Of the rank with most peers on other nodes: peers on its own, on others, and nodes."""
        if axis not in self._links:
            is_near = self.node[:, None] == self.node
            peers = self.peers(axis) > 0
            rank = int((peers & ~is_near).sum(axis=1).argmax())
            near, far = (int((peers[rank] & each[rank]).sum()) for each in (is_near, ~is_near))
            nodes = self.node[self.group(axis) == self.group(axis)[rank]]
            self._links[axis] = near, far, len(set(nodes.tolist()))
        return self._links[axis]
