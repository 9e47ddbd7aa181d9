"""Hierarchical dispatch: a token crosses to another node once, however many ranks it reaches there.

It goes to the rank with the sender's own place on that node, which forwards it to those of the
node's ranks that compute its experts. Back come partial sums: of a rank to the one that forwarded,
of a node to the sender; in float32 and rank order. The idea is that of DeepSeek-V3's dispatch
(arXiv:2412.19437, section 3.2.2): links between nodes are the slower ones.

N nodes with M expert-parallel ranks each. The numbers of tokens that every rank sends to every rank
and node, exchanged once, tell all sizes of both hops.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.moe.dispatch import ExpertInput, Pairs, gather_sum, group_by_expert
from expertlane.moe.packing import columns_of, pack, unpack
from expertlane.moe.replicas import Destinations, ReplicaChoice
from expertlane.parallel.interleave import Steps
from expertlane.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class _Hop:
    """The way back over one group.

    Attributes:
        send, receive: [group]; rows that went out and came in.
        places: [num_tokens, group]; which row a token was in the one for each peer, -1 for none.
    """

    send: list[int]
    receive: list[int]
    places: Tensor


@dataclass(frozen=True)
class Forwarded:
    """The way back of a hierarchical dispatch.

    Attributes:
        inter, intra: the hop between nodes, and the one inside the node.
        pairs: of the rows that arrived for this rank's experts.
        rows_of_etp_rank: [etp]; how many of those rows each rank of the etp group took in.
    """

    inter: _Hop
    intra: _Hop
    pairs: Pairs
    rows_of_etp_rank: list[int]


class HierarchicalDispatcher:
    """Implements `moe.dispatch.Dispatcher`."""

    def __init__(self, mesh: ParallelMesh, placement: Placement, choice: ReplicaChoice) -> None:
        self._mesh = mesh
        self._choice = choice
        self._inter, self._intra = mesh.ep_inter, mesh.ep_intra
        self._num_slots = max(map(len, placement.experts_of_rank))
        self._num_local_experts = len(placement.experts_of_rank[mesh.at.ep_rank])

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        tokens_of_stage_rank: Sequence[int],
    ) -> Steps[tuple[ExpertInput, Forwarded]]:
        """Send one copy of each token to every node it reaches, and forward what arrives."""
        to = self._choice.destinations(topk_ids)
        on_node = to.reached.view(-1, self._inter.size, self._intra.size).any(dim=2)
        own = torch.cat([to.reached.sum(0), on_node.sum(0)]).view(1, -1)
        stage = self._mesh.stage
        counting = stage.all_gather(own, [1] * stage.size, metadata_bytes=own.nbytes)
        # While the counts travel:
        node, token, places = _by_peer(on_node)
        ids = self._ids_on(node, token, to)
        parts = columns_of([ids, topk_weights, x])
        packed = pack([ids, topk_weights.index_select(0, token)], x, token)
        gathered = yield counting
        counts, of_etp_rank = self._counts(gathered)
        metadata_bytes = topk_ids.shape[1] * (ids.itemsize + topk_weights.itemsize)
        inter = self._inter_hop(places, counts)
        packed = yield self._inter.all_to_all(packed, inter.send, inter.receive, metadata_bytes)
        packed, places = self._for_own_node(unpack(packed, parts))
        intra = self._intra_hop(places, counts)
        packed = yield self._intra.all_to_all(packed, intra.send, intra.receive, metadata_bytes)
        if self._mesh.layout.etp > 1:
            packed = yield self._mesh.etp.all_gather(packed, of_etp_rank, metadata_bytes)
        slots, weights, rows = unpack(packed, parts)
        arrived, pairs = group_by_expert(rows, slots, weights, self._num_local_experts)
        return arrived, Forwarded(inter, intra, pairs, of_etp_rank)

    def _counts(self, gathered: Tensor) -> tuple[npt.NDArray[np.int64], list[int]]:
        """Tokens from each rank at this etp_rank to each rank and node: [N, M, N · M + N].

        And the rows that each rank of the etp group is to take in, [etp].
        """
        layout, at = self._mesh.layout, self._mesh.at
        counts = gathered.cpu().numpy().reshape(layout.ep, layout.etp, -1)
        of_etp_rank: list[int] = counts[:, :, at.ep_rank].sum(axis=0).tolist()
        shape = self._inter.size, self._intra.size, -1
        return counts[:, at.etp_rank].reshape(shape), of_etp_rank

    def _ids_on(self, node: Tensor, token: Tensor, to: Destinations) -> Tensor:
        """[R, K] int32; physical experts within a node that rows go to, -1 in others."""
        ranks, slots = to.ranks.index_select(0, token), to.slots.index_select(0, token)
        ids = ranks % self._intra.size * self._num_slots + slots
        return torch.where(ranks // self._intra.size == node[:, None], ids, -1).int()

    def _for_own_node(self, arrived: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Rows packed for the ranks of this node, and which row each one that arrived is there.

        They hold local experts, -1 for other ranks'.
        """
        ids, weights, rows = arrived
        size = self._intra.size
        ranks = torch.where(ids >= 0, ids // self._num_slots, size).long()
        reached = torch.zeros(len(ids), size + 1, dtype=torch.bool, device=ids.device)
        reached = reached.scatter_(1, ranks, True)[:, :-1]
        peer, row, places = _by_peer(reached)
        is_theirs = ranks.index_select(0, row) == peer[:, None]
        slots = torch.where(is_theirs, ids.index_select(0, row) % self._num_slots, -1)
        return pack([slots, weights.index_select(0, row)], rows, row), places

    def _inter_hop(self, places: Tensor, counts: npt.NDArray[np.int64]) -> _Hop:
        node, own, ep = self._inter.rank, self._intra.rank, self._mesh.layout.ep
        return _Hop(
            send=counts[node, own, ep:].tolist(),
            receive=counts[:, own, ep + node].tolist(),
            places=places,
        )

    def _intra_hop(self, places: Tensor, counts: npt.NDArray[np.int64]) -> _Hop:
        own, size = self._intra.rank, self._intra.size
        first = self._inter.rank * size
        return _Hop(
            send=counts[:, own, first : first + size].sum(axis=0).tolist(),
            receive=counts[:, :, first + own].sum(axis=0).tolist(),
            places=places,
        )

    def combine(self, sent: Forwarded, results: Tensor) -> Steps[Tensor]:
        """Sum per rank, then per node, then at home."""
        partial = sent.pairs.weighted_sum(results)
        if self._mesh.layout.etp > 1:
            partial = yield self._mesh.etp.reduce_scatter(partial, sent.rows_of_etp_rank)
        for group, hop in ((self._intra, sent.intra), (self._inter, sent.inter)):
            back = yield group.all_to_all(partial, hop.receive, hop.send)
            ones = torch.ones(hop.places.shape, dtype=torch.float32, device=back.device)
            partial = gather_sum(back, hop.places, ones)
        return partial


def _by_peer(reached: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Peers and tokens by peer, then token; and which of those each token and peer is, or -1."""
    peer, token = reached.t().nonzero(as_tuple=True)
    places = torch.full(reached.shape, -1, device=reached.device)
    places[token, peer] = torch.arange(len(token), device=reached.device)
    return peer, token, places
