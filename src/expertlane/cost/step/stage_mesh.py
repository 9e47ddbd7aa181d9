"""Where the ranks of a pipeline stage sit: coordinates, groups and nodes, as arrays over ranks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from expertlane.cost.step.operation import Ints, RankGroups
from expertlane.spec.layout import Layout

Axis = Literal["tp", "dcp", "ep", "etp", "stage", "ep_inter", "ep_intra"]


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
        """[R]; each rank's node."""
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
    def _groups(self) -> dict[Axis, RankGroups]:
        return {}

    def groups(self, axis: Axis) -> RankGroups:
        """The groups of ranks along an axis."""
        if axis not in self._groups:
            self._groups[axis] = RankGroups(self._group(axis), self.node)
        return self._groups[axis]

    def _group(self, axis: Axis) -> Ints:
        layout = self.layout
        match axis:
            case "tp":
                return self._places // layout.tp
            case "dcp":
                return self._places // layout.dcp
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

    @cached_property
    def nodes_of_ep_group(self) -> Ints:
        """[R, ep]; the nodes of the ranks of each rank's `ep` group."""
        layout = self.layout
        by_etp_rank = self.node.reshape(layout.ep, layout.etp).T
        nodes: Ints = by_etp_rank[self.etp_rank]
        return nodes
