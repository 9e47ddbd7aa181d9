"""The groups of ranks that a layout communicates in.

A group holds ranks of the layout; its link connects their processes (`spec.layout`).

Attention sees a world of (replica, pp, dp, tp), experts see (replica·pp, ep, etp) over the same
ranks. Many groups of these views have the same ranks (at `ep = dp·tp` the expert-parallel group is
the whole stage), and layouts share them too, so groups are made once for every set of ranks: with
gloo each one costs threads and sockets.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from expertlane.engine.comm.collectives import CheckedGroup, Group
from expertlane.engine.comm.recorder import CheckedRecorder, Recorder
from expertlane.engine.comm.transport import Link, Transport
from expertlane.spec.layout import Layout, Members

AXES = ("tp", "pp", "ep", "etp", "stage")
NODE_AXES = ("ep_inter", "ep_intra")


def groups_of_axis(layout: Layout, axis: str, ranks_per_node: int = 1) -> list[list[int]]:
    """Global ranks of every group of an axis of the layout.

    A `stage` group is all ranks of a pipeline stage. An `ep` group is divided by nodes: an
    `ep_intra` group is its ranks on one node, an `ep_inter` group those with the same place on each
    node.

    Raises:
        SpecError: `ep_intra` or `ep_inter` where `ep` groups lie unevenly on nodes.
    """
    dense = np.arange(layout.world_size).reshape(layout.replicas, layout.pp, layout.dp, layout.tp)
    stages = dense.reshape(layout.replicas * layout.pp, layout.stage_size)
    expert = stages.reshape(-1, layout.ep, layout.etp)
    by_axis = {
        "tp": dense,
        "pp": np.moveaxis(dense, 1, -1),
        "ep": np.moveaxis(expert, 1, -1),
        "etp": expert,
        "stage": stages,
    }
    if axis in NODE_AXES:
        size = layout.ep_ranks_per_node(ranks_per_node)
        by_node = by_axis["ep"].reshape(-1, layout.ep // size, size)
        by_axis |= {"ep_inter": np.moveaxis(by_node, 1, -1), "ep_intra": by_node}
    ranks = by_axis[axis]
    groups: list[list[int]] = ranks.reshape(-1, ranks.shape[-1]).tolist()
    return groups


class Meshes:
    """The process groups that were made, by their processes; axes and layouts share them.

    Args:
        transport: None for a single rank, and before an epoch is joined.
    """

    def __init__(self, transport: Transport | None = None) -> None:
        self._transport = transport
        self._made: set[tuple[int, ...]] = set()

    def renew(self, transport: Transport) -> None:
        """Join another epoch; its groups must be made anew."""
        self.leave()
        self._transport = transport

    def leave(self) -> None:
        """Leave the epoch, and all its groups."""
        if self._transport is not None:
            self._transport.leave()
        self._transport = None
        self._made.clear()

    def make(self, layout: Layout, ranks_per_node: int = 0, members: Members | None = None) -> None:
        """Make the groups of `layout` that do not exist yet; collective over *all* processes.

        Args:
            ranks_per_node: if not 0, groups of the axes of nodes are made too.
            members: processes of the layout's ranks; by default rank r is process r.
        """
        numbers = (members or Members(layout)).numbers
        for ranks in self._groups(layout, ranks_per_node):
            of_group = tuple(numbers[rank] for rank in ranks)
            if of_group not in self._made and self._transport is not None:
                self._transport.make(of_group)
                self._made.add(of_group)

    def _groups(self, layout: Layout, ranks_per_node: int) -> Iterator[tuple[int, ...]]:
        for axis in (*AXES, *NODE_AXES) if ranks_per_node else AXES:
            for ranks in groups_of_axis(layout, axis, ranks_per_node):
                if len(ranks) > 1:
                    yield tuple(ranks)

    def link(self, numbers: tuple[int, ...]) -> Link:
        """The link of the group of exactly these processes, of which the caller is one."""
        assert self._transport is not None, "there are other ranks"
        return self._transport.link(numbers)


class ParallelMesh:
    """One rank's coordinates in a layout, and its groups.

    Args:
        meshes: None for a place whose rank does not communicate yet.
        rank: the rank in the layout.
        members: processes of the layout's ranks; by default rank r is process r.

    Attributes:
        at: the rank's coordinates.
        is_first_stage, is_last_stage: its pipeline stage embeds tokens, or samples them.
        recorder: records the transfers of its groups, and the computations between them.
        tp, ep, etp: the rank's groups of these axes.
        stage: the group of all ranks of its pipeline stage.
        pp: the group of the ranks with the same place in every pipeline stage.
    """

    def __init__(
        self,
        layout: Layout,
        meshes: Meshes | None,
        rank: int,
        ranks_per_node: int,
        recorder: Recorder,
        members: Members | None = None,
    ) -> None:
        self.layout = layout
        self.at = layout.coordinates(rank)
        self.is_first_stage = self.at.pp_rank == 0
        self.is_last_stage = self.at.pp_rank == layout.pp - 1
        self._meshes = meshes
        self._rank = rank
        self._numbers = (members or Members(layout)).numbers
        self._ranks_per_node = ranks_per_node
        self.recorder = recorder
        self.tp, self.pp, self.ep, self.etp, self.stage = map(self._group, AXES)

    def renew(self) -> None:
        """Give all groups their links in the epoch that `Meshes` has joined and made them in."""
        own = vars(self)
        for group in (own[axis] for axis in (*AXES, *NODE_AXES) if axis in own):
            group.renew(self._link(group.ranks))

    def _group(self, axis: str) -> Group:
        groups = groups_of_axis(self.layout, axis, self._ranks_per_node)
        ranks = next(ranks for ranks in groups if self._rank in ranks)
        kind = CheckedGroup if isinstance(self.recorder, CheckedRecorder) else Group
        return kind(self._link(ranks), ranks, self._rank, self._ranks_per_node, self.recorder)

    def _link(self, ranks: Sequence[int]) -> Link | None:
        if self._meshes is None or len(ranks) == 1:
            return None
        return self._meshes.link(tuple(self._numbers[rank] for rank in ranks))

    @cached_property
    def ep_inter(self) -> Group:
        """The group of the `ep` group's ranks with this rank's place on their nodes, if made."""
        return self._group("ep_inter")

    @cached_property
    def ep_intra(self) -> Group:
        """The group of the `ep` group's ranks on this rank's node, if made."""
        return self._group("ep_intra")
