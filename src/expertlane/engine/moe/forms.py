"""The dispatcher of each form."""

from expertlane.balance.placement import Placement
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.moe.all_to_all import AllToAllDispatcher
from expertlane.engine.moe.checked import CheckedDispatcher, TaggedPayload
from expertlane.engine.moe.dispatch import CopyChooser, Dispatcher, LocalDispatcher, Payload
from expertlane.engine.moe.hierarchical import HierarchicalDispatcher
from expertlane.engine.moe.static import AllGatherDispatcher, StaticDispatcher
from expertlane.spec.dispatch import DispatchForm, form_on

_DISPATCHERS: dict[DispatchForm, type[Dispatcher]] = {
    "all_to_all": AllToAllDispatcher,
    "all_gather": AllGatherDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "static": StaticDispatcher,
}


def make_dispatcher(
    form: DispatchForm,
    mesh: ParallelMesh,
    placement: Placement,
    choice: CopyChooser,
    payload: Payload,
) -> Dispatcher:
    """The dispatcher of a form on the mesh's layout, with checks if they are full.

    The layout may simplify the form (`form_on`).
    """
    own, checks = form_on(mesh.layout, form), mesh.recorder.checks
    kind = LocalDispatcher if own is None else _DISPATCHERS[own]
    if checks is None or not checks.is_full:
        return kind(mesh, placement, choice, payload)
    tagged = TaggedPayload(payload, mesh.stage.ranks[mesh.stage.rank])
    inner = kind(mesh, placement, choice, tagged)
    return CheckedDispatcher(inner, tagged, mesh, placement, checks)
