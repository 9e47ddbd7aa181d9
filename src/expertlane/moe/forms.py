"""The dispatch form that a deployment names."""

from expertlane.balance.placement import Placement
from expertlane.comm.mesh import ParallelMesh
from expertlane.moe.all_gather import AllGatherDispatcher
from expertlane.moe.all_to_all import AllToAllDispatcher
from expertlane.moe.copies import ReplicaChoice
from expertlane.moe.dispatch import Dispatcher, LocalDispatcher
from expertlane.moe.hierarchical import HierarchicalDispatcher
from expertlane.moe.payload import Payload
from expertlane.spec.deployment import DispatchForm


def make_dispatcher(
    form: DispatchForm,
    mesh: ParallelMesh,
    placement: Placement,
    choice: ReplicaChoice,
    payload: Payload,
) -> Dispatcher:
    """The form's dispatcher; without expert parallelism every rank needs every token."""
    if mesh.stage.size == 1:
        return LocalDispatcher(placement.num_experts)
    if form == "all_gather" or mesh.layout.ep == 1:
        return AllGatherDispatcher(mesh, placement, choice, payload)
    if form == "hierarchical":
        return HierarchicalDispatcher(mesh, placement, choice, payload)
    return AllToAllDispatcher(mesh, placement, choice, payload)
