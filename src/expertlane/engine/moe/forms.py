"""The dispatch forms: none, flat all-to-all, all-gather, static buffers, and by nodes.

Sums are taken in float32, in the order of a token's top-k ids (flat) or of ranks (all others).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.engine.comm.collectives import Group, Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.moe.dispatch import (
    CheckedDispatcher,
    CopyChooser,
    Dispatcher,
    Payload,
    RoutedTokens,
    TaggedPayload,
    bytes_of,
    columns_of,
    unpack,
)
from expertlane.engine.ops.bookkeeping import PeerRows, RowParts
from expertlane.engine.ops.products import PairGroups
from expertlane.spec.deployment import DispatchForm, form_on

_ROWS, _PAIRS = 0, 1


@dataclass(frozen=True)
class LocalHandle:
    """The handle for `combine` where nothing was sent.

    Attributes:
        places: [T, K]; index of each pair's result.
        weights: [T, K] float32; top-k weights.
    """

    places: Tensor
    weights: Tensor


class LocalDispatcher(Dispatcher):
    """The dispatcher of a rank that holds all experts and all tokens: nothing is sent."""

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, LocalHandle]]:
        """Group tokens by expert."""
        ids = tokens.topk_ids.int()
        pairs = self._ops.group_pairs(ids, 0, 1, self._num_local_experts, ids.numel())
        return tokens.x, pairs, LocalHandle(pairs.numbers, tokens.topk_weights)
        yield  # a generator like the others, though it never waits

    def combine(self, sent: LocalHandle, results: Tensor) -> Steps[Tensor]:
        """Sum the outputs of each token's experts."""
        return self._ops.gather_sum(results, sent.places, sent.weights)
        yield


@dataclass(frozen=True)
class AllToAllHandle:
    """The handle of a flat all-to-all for `combine`.

    Attributes:
        weights: [T, K] float32; top-k weights.
        returns_to_etp_rank: [etp]; results that go back to each rank of the etp group.
        pairs_from: [ep]; pairs that this rank received itself from each ep rank.
        pairs_to: [ep]; pairs that this rank sent to each ep rank.
        places: [T, K]; index of each pair's result among those that come back.
    """

    weights: Tensor
    returns_to_etp_rank: list[int]
    pairs_from: list[int]
    pairs_to: list[int]
    places: Tensor


class AllToAllDispatcher(Dispatcher):
    """Sends a copy of each token once to every rank that computes experts of it.

    Of the ranks that share those experts it goes to the one with the sender's etp_rank, and is then
    gathered over the expert tensor-parallel group. Expert outputs take the same way back, one row
    for every token-expert pair, and the token's own rank sums them in the order of its top-k ids.
    So the sum does not depend on which rank computed which expert.
    """

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, AllToAllHandle]]:
        """Send a copy of each token to every rank it reaches."""
        mesh, at, ep = self._mesh, self._mesh.at, self._mesh.ep.size
        leaving = self._choice.outgoing(tokens.topk_ids)
        telling = self._tell_all(leaving.counts)
        hidden = self._payload.encode(tokens.x)  # while counts travel
        columns = columns_of([leaving.ids_there, *hidden])
        packed = self._pack(mesh.ep, [leaving.ids_there], hidden, leaving.tokens)
        counts = (yield telling).view(-1, 2, ep).cpu().numpy()
        packed = yield from self._send(packed, counts, bytes_of(columns[:-1]))
        slots, *hidden = unpack(packed, columns)
        rows = self._payload.decode(hidden, tokens.x.dtype)
        came = counts[:, _PAIRS, at.ep_rank].reshape(ep, mesh.etp.size)
        pairs = self._ops.group_pairs(slots, 0, 1, self._num_local_experts, int(came.sum()))
        sent = AllToAllHandle(
            weights=tokens.topk_weights,
            returns_to_etp_rank=came.sum(axis=0).tolist(),
            pairs_from=came[:, at.etp_rank].tolist(),
            pairs_to=counts[mesh.stage.rank, _PAIRS].tolist(),
            places=leaving.places,
        )
        return rows, pairs, sent

    def _send(
        self, packed: Tensor, counts: npt.NDArray[np.int64], metadata_bytes: int
    ) -> Steps[Tensor]:
        """Send packed rows, and get those that arrive at this rank.

        Args:
            counts: [dp·tp, 2, ep]; rows and pairs from each rank of the stage to each ep rank.
        """
        mesh, at, etp = self._mesh, self._mesh.at, self._mesh.etp.size
        arriving = counts[:, _ROWS, at.ep_rank].reshape(-1, etp)
        packed = yield from mesh.ep.exchanged(
            packed,
            counts[mesh.stage.rank, _ROWS].tolist(),
            arriving[:, at.etp_rank].tolist(),
            metadata_bytes=metadata_bytes,
        )
        if etp > 1:
            packed = yield from mesh.etp.gathered(
                packed, arriving.sum(axis=0).tolist(), metadata_bytes=metadata_bytes
            )
        return packed

    def result_buffer(self, num_pairs: int, rows: Tensor) -> Tensor | None:
        """A buffer for results [P, H] in the memory of the group that sends them."""
        group = self._mesh.etp if self._mesh.etp.size > 1 else self._mesh.ep
        return group.empty(num_pairs, rows.shape[1], rows)

    def combine(self, sent: AllToAllHandle, results: Tensor) -> Steps[Tensor]:
        """Return a row for every pair, and sum the rows of each token on its own rank."""
        mesh = self._mesh
        if mesh.etp.size > 1:
            results = yield from mesh.etp.reduced(results, sent.returns_to_etp_rank)

        def add_up(arrived: RowParts) -> Tensor:
            return self._ops.gather_sum(arrived, sent.places, sent.weights)

        return (
            yield from mesh.ep.exchanged(results, sent.pairs_from, sent.pairs_to, finish=add_up)
        )


@dataclass(frozen=True)
class AllGatherHandle:
    """The handle of an all-gather for `combine`.

    Attributes:
        places: [N, K]; index of each pair's result, for the stage's N tokens; -1 for pairs of
            other ranks.
        weights: [N, K] float32; top-k weights.
        num_of_stage_rank: [dp·tp]; tokens of each rank of the stage.
    """

    places: Tensor
    weights: Tensor
    num_of_stage_rank: Sequence[int]


class AllGatherDispatcher(Dispatcher):
    """Sends all tokens of the stage to all of its ranks, each of which computes its own experts.

    Its shapes depend on the plan alone. Weighted partial sums come back by reduce-scatter. With
    `ep = 1`, where every rank has a slice of every expert, all forms use this one.
    """

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, AllGatherHandle]]:
        """Gather all tokens of the stage."""
        num_of = tokens.num_of_stage_rank
        ids = self._choice.physical_ids(tokens.topk_ids)
        parts = [ids, tokens.topk_weights, *self._payload.encode(tokens.x)]
        columns = columns_of(parts)
        packed = yield from self._mesh.stage.gathered(
            self._pack(self._mesh.stage, parts), num_of, metadata_bytes=bytes_of(columns[:-1])
        )
        ids, weights, *hidden = unpack(packed, columns)
        rows = self._payload.decode(hidden, tokens.x.dtype)
        first_id = self._mesh.at.ep_rank * self._choice.num_slots
        pairs = self._pairs(ids, first_id)
        return rows, pairs, AllGatherHandle(pairs.numbers, weights, num_of)

    def combine(self, sent: AllGatherHandle, results: Tensor) -> Steps[Tensor]:
        """Add up all ranks' weighted partial sums."""
        out = self._mesh.stage.empty(sent.places.shape[0], results.shape[1], results)
        partial = self._ops.gather_sum(results, sent.places, sent.weights, out)
        return (yield from self._mesh.stage.reduced(partial, sent.num_of_stage_rank))


@dataclass(frozen=True)
class StaticHandle:
    """The handle of a static dispatch for `combine`.

    Attributes:
        home: [T, ep]; the row of each token among the buffers for all ranks, -1 for none.
        places: [R, K]; index of each pair's result, for the rows that arrived; -1 for pairs of
            other ranks, and for padding.
        weights: [R, K] float32; top-k weights.
        rows_from: [ep]; rows of the buffer from each rank with this etp_rank.
        rows_of_etp_rank: [etp]; rows, with padding, that each rank of the etp group received.
    """

    home: Tensor
    places: Tensor
    weights: Tensor
    rows_from: list[int]
    rows_of_etp_rank: list[int]


class StaticDispatcher(Dispatcher):
    """Sends a copy of each token to every rank that it reaches, in buffers for all tokens.

    So none can be dropped, ranks exchange no counts, and the host waits for none: a CUDA graph can
    hold all of it. In a buffer real rows come first, then padding, whose ids are -1. Weighted
    partial sums come back, one for each row and in the row's place. With a result for each pair,
    buffers and real rows would be several times as large.

    A transport that sends whole buffers sends as many bytes as an all-gather, which is the better
    form then; one that sends rows by counts on the device sends fewer.
    """

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, StaticHandle]]:
        """Send a copy of each token to every rank it reaches, padded to all tokens."""
        mesh, etp, num_of = self._mesh, self._mesh.etp.size, tokens.num_of_stage_rank
        ids = self._choice.physical_ids(tokens.topk_ids)
        leaving = self._ops.rows_by_peer(ids, self._choice.num_slots, mesh.ep.size, padded=True)
        by_token = [tokens.topk_weights, *self._payload.encode(tokens.x)]
        columns = columns_of([leaving.ids, *by_token])
        packed = self._pack(mesh.ep, [leaving.ids], by_token, leaving.tokens)
        metadata_bytes = bytes_of(columns[:-1])
        rows_to = [ids.shape[0]] * mesh.ep.size
        rows_from = [*num_of[mesh.at.etp_rank :: etp]]
        rows_of_etp_rank = [sum(num_of[place::etp]) for place in range(etp)]
        packed = yield from mesh.ep.exchanged(
            packed, rows_to, rows_from, metadata_bytes, num_real=leaving.counts.tolist
        )
        if etp > 1:
            here = unpack(packed, columns)[0]
            packed = yield from mesh.etp.gathered(
                packed,
                rows_of_etp_rank,
                metadata_bytes,
                num_real=lambda: _num_real(here, [here.shape[0]]) * etp,
            )
        arrived, weights, *hidden = unpack(packed, columns)
        rows = self._payload.decode(hidden, tokens.x.dtype)
        pairs = self._pairs(arrived, 0)
        sent = StaticHandle(leaving.places, pairs.numbers, weights, rows_from, rows_of_etp_rank)
        return rows, pairs, sent

    def is_row(self, sent: StaticHandle) -> Tensor:
        """[R]; True for rows that arrived and are no padding."""
        return (sent.places >= 0).any(1)

    def combine(self, sent: StaticHandle, results: Tensor) -> Steps[Tensor]:
        """Sum each token's results per rank, then on its own rank."""
        mesh, etp, places = self._mesh, self._mesh.etp, sent.places
        group = etp if etp.size > 1 else mesh.ep
        out = group.empty(places.shape[0], results.shape[1], results)
        partial = self._ops.gather_sum(results, places, sent.weights, out)
        own = torch.split(places, sent.rows_of_etp_rank)[etp.rank]
        if etp.size > 1:
            partial = yield from etp.reduced(
                partial,
                sent.rows_of_etp_rank,
                num_real=lambda: _num_real(places, sent.rows_of_etp_rank),
            )

        def add_up(back: RowParts) -> Tensor:
            return self._ops.gather_sum(back, sent.home)

        return (
            yield from mesh.ep.exchanged(
                partial,
                sent.rows_from,
                [sent.home.shape[0]] * mesh.ep.size,
                finish=add_up,
                num_real=lambda: _num_real(own, sent.rows_from),
            )
        )


def _num_real(places: Tensor, num_rows: Sequence[int]) -> list[int]:
    """Rows of each part that are no padding: those with a value above -1 in [R, K]."""
    return [int(part.any(1).sum()) for part in torch.split(places >= 0, list(num_rows))]


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
class HierarchicalHandle:
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
    """Sends a copy of each token once to every node that it reaches, where it is forwarded.

    It goes to the rank with the sender's own place on that node, which forwards it to those of the
    node's ranks that compute its experts. Partial sums come back: of each rank to the one that
    forwarded, of each node to the sender. The idea is that of DeepSeek-V3's dispatch
    (arXiv:2412.19437, section 3.2.2): links between nodes are the slower ones.

    N nodes with M expert-parallel ranks each. The numbers of tokens that every rank sends to every
    rank and node are exchanged once, and give all sizes of both hops.
    """

    def dispatch(
        self, tokens: RoutedTokens
    ) -> Steps[tuple[Tensor, PairGroups, HierarchicalHandle]]:
        """Send one copy of each token to every node it reaches, and forward what arrives."""
        mesh, num_slots = self._mesh, self._choice.num_slots
        between, within = mesh.ep_inter, mesh.ep_intra
        ids = self._choice.physical_ids(tokens.topk_ids)
        to_nodes = self._to_nodes(ids)
        to_ranks = self._ops.rows_by_peer(ids, num_slots, mesh.layout.ep)
        telling = self._tell_all(torch.cat([to_ranks.counts, to_nodes.counts]))
        # While counts travel:
        travelling = [tokens.topk_weights, *self._payload.encode(tokens.x)]
        columns = columns_of([to_nodes.ids, *travelling])
        packed = self._pack(between, [to_nodes.ids], travelling, to_nodes.tokens)
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
        return rows, pairs, HierarchicalHandle(inter, intra, pairs.numbers, weights, of_etp_rank)

    def _to_nodes(self, ids: Tensor) -> PeerRows:
        node_slots = self._mesh.ep_intra.size * self._choice.num_slots
        return self._ops.rows_by_peer(ids, node_slots, self._mesh.ep_inter.size)

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

    def combine(self, sent: HierarchicalHandle, results: Tensor) -> Steps[Tensor]:
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
