"""Dispatch forms: how tokens travel to the ranks of their experts, and results back.

All of them drop no token, whatever the load. Shapes: T tokens of this rank, K = top_k, R rows at
the experts' rank, P token-expert pairs there, H = hidden_size.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.comm.interleave import Steps
from expertlane.comm.mesh import ParallelMesh
from expertlane.moe.all_gather import AllGatherDispatcher
from expertlane.moe.all_to_all import AllToAllDispatcher
from expertlane.moe.copies import ReplicaChoice
from expertlane.moe.experts import ExpertInput
from expertlane.moe.hierarchical import HierarchicalDispatcher
from expertlane.moe.payload import Payload
from expertlane.ops.torch_backend import TorchBackend
from expertlane.spec.deployment import DispatchForm


class Dispatcher(Protocol):
    """One form; `dispatch` gives the experts' input and a handle of its own for `combine`."""

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        tokens_of_stage_rank: Sequence[int],
    ) -> Steps[tuple[ExpertInput, Any]]:
        """Send this rank's tokens and receive those for its experts.

        Args:
            x: [T, H].
            topk_ids: [T, K]; logical experts.
            topk_weights: [T, K] float32.
            tokens_of_stage_rank: [dp·tp]; tokens owned by each rank of the stage.
        """
        ...

    def combine(self, sent: Any, results: Tensor) -> Steps[Tensor]:
        """Bring expert outputs home and sum them by the router's weights.

        Args:
            sent: the handle that `dispatch` gave.
            results: [P, H]; in the order of `ExpertInput.result_of_pair`, partial sums under etp.

        Returns:
            [T, H] in the dtype of `results`.
        """
        ...


class LocalDispatcher:
    """For one rank that holds all experts and all tokens."""

    def __init__(self, num_experts: int, ops: TorchBackend) -> None:
        self._num_experts, self._ops = num_experts, ops

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        tokens_of_stage_rank: Sequence[int],
    ) -> Steps[tuple[ExpertInput, tuple[Tensor, Tensor]]]:
        """Group tokens by expert."""
        pairs = self._ops.group_pairs(topk_ids.int(), 0, 1, self._num_experts)
        return ExpertInput.of(x, pairs), (pairs.numbers, topk_weights)
        yield  # a generator like the others, though it never waits

    def combine(self, sent: tuple[Tensor, Tensor], results: Tensor) -> Steps[Tensor]:
        """Sum the outputs of each token's experts."""
        return self._ops.gather_sum(results, *sent)
        yield


def make_dispatcher(
    form: DispatchForm,
    mesh: ParallelMesh,
    placement: Placement,
    choice: ReplicaChoice,
    payload: Payload,
) -> Dispatcher:
    """The form's dispatcher; without expert parallelism every rank needs every token."""
    if mesh.stage.size == 1:
        return LocalDispatcher(placement.num_experts, choice.ops)
    if form == "all_gather" or mesh.layout.ep == 1:
        return AllGatherDispatcher(mesh, placement, choice, payload)
    if form == "hierarchical":
        return HierarchicalDispatcher(mesh, placement, choice, payload)
    return AllToAllDispatcher(mesh, placement, choice, payload)
