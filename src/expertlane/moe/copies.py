"""Which rank computes each token-expert pair, where experts may have copies."""

import numpy as np
import torch
from torch import Tensor

from expertlane.balance.copies import usable_copies
from expertlane.balance.placement import Placement
from expertlane.comm.mesh import ParallelMesh
from expertlane.comm.recorder import Recorder
from expertlane.ops.backend import backend_for


class ReplicaChoice:
    """One rank's choice of a copy for each of its pairs.

    As `balance.copies` defines it. It depends on the batch alone.

    Attributes:
        ops: what computes here.
        num_slots: the most that any rank has; slot s of rank r has the physical id
            r · num_slots + s.
    """

    def __init__(
        self, mesh: ParallelMesh, placement: Placement, recorder: Recorder, device: torch.device
    ) -> None:
        self.ops = backend_for(device)
        ep_rank, nodes = mesh.ep.rank, mesh.ep.nodes
        is_held = placement.slots().T >= 0
        usable = usable_copies(is_held, np.array([ep_rank]), np.array([nodes]))[0]
        num_copies = usable.sum(axis=1)
        ranks = np.argsort(~usable, axis=1, kind="stable")[:, : num_copies.max()]
        ranks = np.where(np.arange(ranks.shape[1]) < num_copies[:, None], ranks, ranks[:, :1])
        self.num_slots = max(map(len, placement.experts_of_rank))
        slots = placement.slots()[ranks, np.arange(placement.num_experts)[:, None]]
        self._ep = placement.ep
        self._table = torch.from_numpy(ranks * self.num_slots + slots).to(device)
        self._num_copies = torch.from_numpy(num_copies).to(device)
        self._offset = mesh.stage.rank
        self._recorder = recorder
        node_ids = sorted(set(nodes))
        self._own_node = node_ids.index(nodes[ep_rank])
        on_node = torch.tensor([[node == each for each in node_ids] for node in nodes])
        self._on_node = on_node.float().to(device)  # [ep, num_nodes]

    def physical_ids(self, topk_ids: Tensor) -> Tensor:
        """[T, K] int32; the copy of each pair of a batch.

        Args:
            topk_ids: [T, K] int64; logical experts.
        """
        ids = self.ops.choose_copies(topk_ids, self._table, self._num_copies, self._offset)
        if self._recorder.is_recording:
            self._count_fan_out(ids)
        return ids

    def _count_fan_out(self, ids: Tensor) -> None:
        reached = torch.zeros(len(ids), self._ep, dtype=torch.bool, device=ids.device)
        reached.scatter_(1, (ids // self.num_slots).long(), True)
        by_node = (reached.float() @ self._on_node).long()  # [T, num_nodes]; ranks reached there
        ranks, nodes = by_node.sum(1), (by_node > 0).sum(1)
        here = by_node[:, self._own_node]
        remote_ranks = int((ranks - here).sum())
        remote_nodes = int((nodes - (here > 0).long()).sum())
        self._recorder.count_fan_out(ranks, nodes, remote_ranks, remote_nodes)
