"""All-gather dispatch: every rank of the stage gets all tokens, and takes those of its experts.

It needs no counts, since the plan says how many tokens each rank has, and its shapes do not turn
on the routing. Weighted partial sums come back by reduce-scatter, in float32 and rank order. With
`ep = 1`, where every rank has a part of every expert, all forms come down to this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.moe.dispatch import ExpertInput, Pairs, group_by_expert
from expertlane.moe.packing import columns_of, pack, unpack
from expertlane.moe.replicas import ReplicaChoice
from expertlane.parallel.interleave import Steps
from expertlane.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class Gathered:
    """The way back of an all-gather.

    Attributes:
        pairs: of the stage's tokens with this rank's experts.
        tokens_of_stage_rank: [dp·tp].
    """

    pairs: Pairs
    tokens_of_stage_rank: Sequence[int]


class AllGatherDispatcher:
    """Implements `moe.dispatch.Dispatcher`."""

    def __init__(self, mesh: ParallelMesh, placement: Placement, choice: ReplicaChoice) -> None:
        self._stage = mesh.stage
        self._choice = choice
        self._num_slots = max(map(len, placement.experts_of_rank))
        self._num_local_experts = len(placement.experts_of_rank[mesh.at.ep_rank])
        self._first_id = mesh.at.ep_rank * self._num_slots

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        tokens_of_stage_rank: Sequence[int],
    ) -> Steps[tuple[ExpertInput, Gathered]]:
        """Gather all tokens of the stage."""
        to = self._choice.destinations(topk_ids)
        physical_ids = (to.ranks * self._num_slots + to.slots).int()
        packed = yield self._stage.all_gather(
            pack([physical_ids, topk_weights], x),
            tokens_of_stage_rank,
            metadata_bytes=topk_ids.shape[1] * (physical_ids.itemsize + topk_weights.itemsize),
        )
        ids, weights, rows = unpack(packed, columns_of([physical_ids, topk_weights, x]))
        slots = ids - self._first_id
        slots = torch.where((slots >= 0) & (slots < self._num_slots), slots, -1)
        arrived, pairs = group_by_expert(rows, slots, weights, self._num_local_experts)
        return arrived, Gathered(pairs, tokens_of_stage_rank)

    def combine(self, sent: Gathered, results: Tensor) -> Steps[Tensor]:
        """Add up all ranks' weighted partial sums."""
        partial = sent.pairs.weighted_sum(results)
        return (yield self._stage.reduce_scatter(partial, sent.tokens_of_stage_rank))
