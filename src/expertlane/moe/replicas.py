"""Which rank computes each token-expert pair, where experts may have copies."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.parallel.mesh import ParallelMesh
from expertlane.parallel.recorder import Recorder


@dataclass(frozen=True)
class Destinations:
    """Where a rank's pairs go.

    Attributes:
        ranks: [T, K]; the expert-parallel rank of each pair.
        slots: [T, K]; the slot of the pair's expert there.
        reached: [T, ep]; whether a token goes to a rank at all.
    """

    ranks: Tensor
    slots: Tensor
    reached: Tensor


class ReplicaChoice:
    """One rank's choice of a copy for each of its pairs.

    A copy on the rank itself comes first, else those on its node, else all. Of several it takes
    the one that it has given the fewest pairs of this batch, and each rank begins with another, so
    that the load is spread without a word between ranks. It depends on the batch alone.

    """

    def __init__(
        self, mesh: ParallelMesh, placement: Placement, recorder: Recorder, device: torch.device
    ) -> None:
        ep_rank, nodes = mesh.ep.rank, mesh.ep.nodes
        nearest = [_nearest(ranks, ep_rank, nodes) for ranks in placement.ranks_of_experts()]
        num_copies = np.array([len(ranks) for ranks in nearest])
        ranks = np.array([np.resize(ranks, num_copies.max()) for ranks in nearest])
        self._ep = placement.ep
        self._has_choice = num_copies.max() > 1
        self._ranks = torch.from_numpy(ranks).to(device)  # [num_experts, most copies]
        self._num_copies = torch.from_numpy(num_copies).to(device)
        self._slots = torch.from_numpy(placement.slots()).to(device)
        self._offset = mesh.stage.rank
        self._recorder = recorder
        node_ids = sorted(set(nodes))
        self._own_node = node_ids.index(nodes[ep_rank])
        on_node = torch.tensor([[node == each for each in node_ids] for node in nodes])
        self._on_node = on_node.float().to(device)  # [ep, num_nodes]

    def destinations(self, topk_ids: Tensor) -> Destinations:
        """Choose for a batch.

        Args:
            topk_ids: [T, K]; logical experts.
        """
        ids = topk_ids.flatten()
        copy: Tensor | int = 0
        if self._has_choice:
            copy = (_num_equal_before(ids) + self._offset) % self._num_copies[ids]
        ranks = self._ranks[ids, copy].view_as(topk_ids)
        reached = torch.zeros(len(ranks), self._ep, dtype=torch.bool, device=ranks.device)
        reached.scatter_(1, ranks, True)
        if self._recorder.is_recording:
            self._count_fan_out(reached)
        return Destinations(ranks, self._slots[ranks, topk_ids], reached)

    def _count_fan_out(self, reached: Tensor) -> None:
        by_node = (reached.float() @ self._on_node).long()  # [T, num_nodes]; ranks reached there
        ranks, nodes = by_node.sum(1), (by_node > 0).sum(1)
        here = by_node[:, self._own_node]
        remote_ranks = int((ranks - here).sum())
        remote_nodes = int((nodes - (here > 0).long()).sum())
        self._recorder.count_fan_out(ranks, nodes, remote_ranks, remote_nodes)


def _nearest(ranks: list[int], ep_rank: int, nodes: list[int]) -> list[int]:
    if ep_rank in ranks:
        return [ep_rank]
    return [rank for rank in ranks if nodes[rank] == nodes[ep_rank]] or ranks


def _num_equal_before(ids: Tensor) -> Tensor:
    """[n]; how many equal ids stand before each."""
    order = torch.argsort(ids, stable=True)
    ordered, places = ids[order], torch.arange(len(ids), device=ids.device)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(is_first, places, 0).cummax(0).values if len(ids) else places
    num_before = torch.empty_like(places)
    num_before[order] = places - start
    return num_before
