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
from expertlane.moe.packing import pack, unpack
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
        counts, of_etp_rank = yield from self._exchange_counts(to.reached, on_node)
        ids, weights, rows, inter = yield from self._to_nodes(x, topk_weights, to, on_node, counts)
        slots, weights, rows, intra = yield from self._inside(ids, weights, rows, counts)
        if self._mesh.layout.etp > 1:
            slots, weights, rows = yield from self._over_etp(slots, weights, rows, of_etp_rank)
        arrived, pairs = group_by_expert(rows, slots, weights, self._num_local_experts)
        return arrived, Forwarded(inter, intra, pairs, of_etp_rank)

    def _exchange_counts(
        self, reached: Tensor, on_node: Tensor
    ) -> Steps[tuple[npt.NDArray[np.int64], list[int]]]:
        """Tokens from each rank at this etp_rank to each rank and node: [N, M, N · M + N].

        And the rows that each rank of the etp group is to take in, [etp].
        """
        stage, layout, at = self._mesh.stage, self._mesh.layout, self._mesh.at
        own = torch.cat([reached.sum(0), on_node.sum(0)]).view(1, -1)
        gathered = yield stage.all_gather(own, [1] * stage.size, metadata_bytes=own.nbytes)
        counts = gathered.cpu().numpy().reshape(layout.ep, layout.etp, -1)
        of_etp_rank: list[int] = counts[:, :, at.ep_rank].sum(axis=0).tolist()
        shape = self._inter.size, self._intra.size, -1
        return counts[:, at.etp_rank].reshape(shape), of_etp_rank

    def _to_nodes(
        self,
        x: Tensor,
        topk_weights: Tensor,
        to: Destinations,
        on_node: Tensor,
        counts: npt.NDArray[np.int64],
    ) -> Steps[tuple[Tensor, Tensor, Tensor, _Hop]]:
        """Physical experts in this node [R, K] (-1 in others), weights and rows of what came."""
        inter, intra, ep = self._inter, self._intra, self._mesh.layout.ep
        node, token, places = _by_peer(on_node)
        place_in_node = to.ranks[token] % intra.size
        is_here = to.ranks[token] // intra.size == node[:, None]
        ids = torch.where(is_here, place_in_node * self._num_slots + to.slots[token], -1).int()
        hop = _Hop(
            send=counts[inter.rank, intra.rank, ep:].tolist(),
            receive=counts[:, intra.rank, ep + inter.rank].tolist(),
            places=places,
        )
        parts = [ids, topk_weights[token], x[token]]
        packed = yield inter.all_to_all(
            pack(parts), hop.send, hop.receive, metadata_bytes=_metadata_bytes(parts)
        )
        ids, weights, rows = unpack(packed, _columns(parts))
        return ids, weights, rows, hop

    def _inside(
        self, ids: Tensor, weights: Tensor, rows: Tensor, counts: npt.NDArray[np.int64]
    ) -> Steps[tuple[Tensor, Tensor, Tensor, _Hop]]:
        """Local experts [R, K] (-1 for other ranks'), weights and rows of what is for this rank."""
        inter, intra = self._inter, self._intra
        rank_in_node = torch.where(ids >= 0, ids // self._num_slots, intra.size).long()
        reached = torch.zeros(len(ids), intra.size + 1, dtype=torch.bool, device=ids.device)
        reached = reached.scatter_(1, rank_in_node, True)[:, :-1]
        peer, row, places = _by_peer(reached)
        is_theirs = rank_in_node[row] == peer[:, None]
        slots = torch.where(is_theirs, ids[row] % self._num_slots, -1)
        first = inter.rank * intra.size
        hop = _Hop(
            send=counts[:, intra.rank, first : first + intra.size].sum(axis=0).tolist(),
            receive=counts[:, :, first + intra.rank].sum(axis=0).tolist(),
            places=places,
        )
        parts = [slots, weights[row], rows[row]]
        packed = yield intra.all_to_all(
            pack(parts), hop.send, hop.receive, metadata_bytes=_metadata_bytes(parts)
        )
        slots, weights, rows = unpack(packed, _columns(parts))
        return slots, weights, rows, hop

    def _over_etp(
        self, slots: Tensor, weights: Tensor, rows: Tensor, of_etp_rank: list[int]
    ) -> Steps[tuple[Tensor, Tensor, Tensor]]:
        parts = [slots, weights, rows]
        packed = yield self._mesh.etp.all_gather(
            pack(parts), of_etp_rank, metadata_bytes=_metadata_bytes(parts)
        )
        slots, weights, rows = unpack(packed, _columns(parts))
        return slots, weights, rows

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


def _columns(parts: Sequence[Tensor]) -> list[tuple[torch.dtype, int]]:
    return [(part.dtype, part.shape[1]) for part in parts]


def _metadata_bytes(parts: Sequence[Tensor]) -> int:
    """Of a row: all but the last part, which is the hidden state."""
    return sum(part.shape[1] * part.itemsize for part in parts[:-1])
