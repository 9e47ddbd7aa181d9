"""The process groups of a layout, as three views of one world.

Attention sees (replica, pp, dp, tp), experts see (replica·pp, ep, etp) over the same ranks, and a
pipeline stage is (replica·pp, dp·tp).
"""

import torch
from torch.distributed.device_mesh import DeviceMesh

from expertlane.parallel.collectives import Group
from expertlane.parallel.recorder import Recorder
from expertlane.spec.layout import Layout


class DeviceMeshes:
    """The torch meshes of a layout. Making one is collective over *all* ranks of the world."""

    def __init__(self, layout: Layout, device_type: str) -> None:
        world = torch.arange(layout.world_size)
        stages = layout.replicas * layout.pp
        self.dense = DeviceMesh(
            device_type,
            world.view(layout.replicas, layout.pp, layout.dp, layout.tp),
            mesh_dim_names=("replica", "pp", "dp", "tp"),
        )
        self.expert = DeviceMesh(
            device_type,
            world.view(stages, layout.ep, layout.etp),
            mesh_dim_names=("stage", "ep", "etp"),
        )
        self.stage = DeviceMesh(
            device_type, world.view(stages, layout.stage_size), mesh_dim_names=("stage", "member")
        )


class ParallelMesh:
    """One rank's place in a layout and the groups it talks to.

    Attributes:
        at: the rank's coordinates.
        tp, ep, etp: groups of the layout's axes.
        stage: all ranks of the pipeline stage.
        pp: the ranks that hold the other stages at the same place.
    """

    def __init__(
        self,
        layout: Layout,
        meshes: DeviceMeshes,
        rank: int,
        ranks_per_node: int,
        recorder: Recorder,
    ) -> None:
        self.layout = layout
        self.at = layout.coordinates(rank)

        def group(mesh: DeviceMesh, axis: str) -> Group:
            coordinate = mesh.get_coordinate()
            dim = (mesh.mesh_dim_names or ()).index(axis)
            assert coordinate is not None, "only ranks of the layout take their groups"
            place = tuple(slice(None) if i == dim else at for i, at in enumerate(coordinate))
            ranks = mesh.mesh[place].tolist()
            process_group = mesh.get_group(axis) if len(ranks) > 1 else None
            return Group(process_group, ranks, rank, lambda r: r // ranks_per_node, recorder)

        self.tp = group(meshes.dense, "tp")
        self.pp = group(meshes.dense, "pp")
        self.ep = group(meshes.expert, "ep")
        self.etp = group(meshes.expert, "etp")
        self.stage = group(meshes.stage, "member")

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.at.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank chooses tokens."""
        return self.at.pp_rank == self.layout.pp - 1
