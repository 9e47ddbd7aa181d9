"""Hierarchical dispatch: a token crosses to another node once, however many ranks it reaches there.

It goes to the rank with the sender's own place on that node, which forwards it to those of the
node's ranks that compute its experts. Partial sums come back: of each rank to the one that
forwarded, of each node to the sender; in float32 and rank order. The idea is that of DeepSeek-V3's
dispatch (arXiv:2412.19437, section 3.2.2): links between nodes are the slower ones.

N nodes with M expert-parallel ranks each. The numbers of tokens that every rank sends to every rank
and node are exchanged once, and give all sizes of both hops.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.comm.collectives import Group, Steps
from expertlane.engine.moe.dispatch import Dispatcher, RoutedTokens, bytes_of, columns_of, unpack
from expertlane.engine.ops.bookkeeping import PeerRows
from expertlane.engine.ops.products import PairGroups
from expertlane.engine.ops.row_parts import RowParts


@dataclass(frozen=True)
class _Hop:
    """One hop of a dispatch over a group, for its way back in `combine`.

    Attributes:
        send, receive: [group]; rows sent to each peer and received from it.
        places: [num_tokens, group]; the row of each token for each peer, -1 for none.
    """

    send: list[int]
    receive: list[int]
    places: Tensor


@dataclass(frozen=True)
class Forwarded:
    """The handle of a hierarchical dispatch for `combine`.

    Attributes:
        inter: the hop between nodes.
        intra: the hop inside the node; None on nodes with one expert-parallel rank.
        places: [R, K]; index of each pair's result, for the rows that arrived; -1 for pairs of
            other ranks.
        weights: [R, K] float32; top-k weights.
        rows_of_etp_rank: [etp]; how many of the R rows each rank of the etp group received.
    """

    inter: _Hop
    intra: _Hop | None
    places: Tensor
    weights: Tensor
    rows_of_etp_rank: list[int]


class HierarchicalDispatcher(Dispatcher):
    """Sends a copy of each token to every node that it reaches, which is forwarded inside it."""

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, Forwarded]]:
        """Send one copy of each token to every node it reaches, and forward what arrives."""
        mesh, num_slots = self._mesh, self._choice.num_slots
        between, within = mesh.ep_inter, mesh.ep_intra
        is_balanced = self._is_balanced(tokens)
        if is_balanced:
            telling = self._tell_choices(tokens)
        else:
            ids = self._choice.physical_ids(tokens.topk_ids)
            to_nodes = self._to_nodes(ids)
            to_ranks = self._ops.rows_by_peer(ids, num_slots, mesh.layout.ep)
            telling = self._tell_all(torch.cat([to_ranks.counts, to_nodes.counts]))
        # While choices or counts travel:
        travelling = [tokens.topk_weights, *self._payload.encode(tokens.x)]
        if is_balanced:
            of_stage = self._choice.balanced((yield telling), tokens.num_of_stage_rank)
            to_nodes = self._to_nodes(self._choice.own_of(of_stage, tokens.num_of_stage_rank))
            gathered = self._rows(of_stage, tokens.num_of_stage_rank)
        columns = columns_of([to_nodes.ids, *travelling])
        packed = self._pack(between, [to_nodes.ids], travelling, to_nodes.tokens)
        if not is_balanced:
            gathered = yield telling
        counts, of_etp_rank = self._counts(gathered)
        metadata_bytes = bytes_of(columns[:-1])
        inter = self._inter_hop(to_nodes.places, counts)
        packed = yield from between.exchanged(packed, inter.send, inter.receive, metadata_bytes)
        intra = None
        if within.size > 1:
            ids, *arrived = unpack(packed, columns)
            inside = self._ops.rows_by_peer(ids, num_slots, within.size)
            packed = self._pack(within, [inside.ids], arrived, inside.tokens)
            intra = self._intra_hop(inside.places, counts)
            packed = yield from within.exchanged(packed, intra.send, intra.receive, metadata_bytes)
        if mesh.layout.etp > 1:
            packed = yield from mesh.etp.gathered(packed, of_etp_rank, metadata_bytes)
        slots, weights, *hidden = unpack(packed, columns)
        rows = self._payload.decode(hidden, tokens.x.dtype)
        pairs = self._ops.group_pairs(slots, 0, 1, self._num_local_experts)
        return rows, pairs, Forwarded(inter, intra, pairs.numbers, weights, of_etp_rank)

    def _to_nodes(self, ids: Tensor) -> PeerRows:
        node_slots = self._mesh.ep_intra.size * self._choice.num_slots
        return self._ops.rows_by_peer(ids, node_slots, self._mesh.ep_inter.size)

    def _rows(self, ids: Tensor, num_of_stage_rank: Sequence[int]) -> Tensor:
        """Rows [dp·tp, N · M + N] that each rank of the stage sends to each rank and node.

        Args:
            ids: [tokens of the stage, K] int32; physical ids of all pairs.
        """
        within, num_slots = self._mesh.ep_intra.size, self._choice.num_slots
        rows = [
            self._ops.rows_and_pairs(ids, num_of_stage_rank, size * num_slots, num)[:, 0]
            for size, num in ((1, self._mesh.layout.ep), (within, self._mesh.ep_inter.size))
        ]
        return torch.cat(rows, dim=1)

    def _counts(self, gathered: Tensor) -> tuple[npt.NDArray[np.int64], list[int]]:
        """Tokens [N, M, N · M + N] from each rank with this etp_rank to each rank and node.

        Also the rows [etp] that each rank of the etp group will receive.
        """
        layout, at = self._mesh.layout, self._mesh.at
        counts = gathered.cpu().numpy().reshape(layout.ep, layout.etp, -1)
        of_etp_rank: list[int] = counts[:, :, at.ep_rank].sum(axis=0).tolist()
        shape = self._mesh.ep_inter.size, self._mesh.ep_intra.size, -1
        return counts[:, at.etp_rank].reshape(shape), of_etp_rank

    def _inter_hop(self, places: Tensor, counts: npt.NDArray[np.int64]) -> _Hop:
        node, own, ep = self._mesh.ep_inter.rank, self._mesh.ep_intra.rank, self._mesh.layout.ep
        return _Hop(
            send=counts[node, own, ep:].tolist(),
            receive=counts[:, own, ep + node].tolist(),
            places=places,
        )

    def _intra_hop(self, places: Tensor, counts: npt.NDArray[np.int64]) -> _Hop:
        own, size = self._mesh.ep_intra.rank, self._mesh.ep_intra.size
        first = self._mesh.ep_inter.rank * size
        return _Hop(
            send=counts[:, own, first : first + size].sum(axis=0).tolist(),
            receive=counts[:, :, first + own].sum(axis=0).tolist(),
            places=places,
        )

    def combine(self, sent: Forwarded, results: Tensor) -> Steps[Tensor]:
        """Sum each token's results per rank, then per node, then on its own rank."""
        mesh, ops = self._mesh, self._ops
        hops = [(mesh.ep_inter, sent.inter)]
        if sent.intra is not None:
            hops.insert(0, (mesh.ep_intra, sent.intra))
        groups: list[Group | None] = [group for group, _ in hops]
        first = mesh.etp if mesh.layout.etp > 1 else hops[0][0]
        out = first.empty(len(sent.places), results.shape[1], results)
        partial = ops.gather_sum(results, sent.places, sent.weights, out)
        if mesh.layout.etp > 1:
            partial = yield from mesh.etp.reduced(partial, sent.rows_of_etp_rank)
        for (group, hop), following in zip(hops, [*groups[1:], None], strict=True):

            def add_up(
                back: RowParts, hop: _Hop = hop, following: Group | None = following
            ) -> Tensor:
                size = len(hop.places), back.width
                out = None if following is None else following.empty(*size, results)
                return ops.gather_sum(back, hop.places, out=out)

            partial = yield from group.exchanged(partial, hop.receive, hop.send, finish=add_up)
        return partial
