"""Two forms of dispatch whose shapes depend on the plan alone, not on the routing.

All-gather: every rank of the stage gets all tokens, and computes its own experts. Balancing copies
needs no further exchange. Weighted partial sums come back by reduce-scatter, in float32 and rank
order. With `ep = 1`, where every rank has a slice of every expert, all forms use this one.

Static: a rank sends each rank of its expert-parallel group a buffer with room for all of its
tokens, so none can be dropped. A token goes once to each rank that computes experts of it; in the
buffer real rows come first, then padding, whose ids are -1. So ranks exchange no counts, and the
host waits for none: a CUDA graph can hold all of it.

Weighted partial sums come back, one for each row and in the row's place; in float32 and rank order.
With a result for each pair, buffers and real rows would be several times as large.

A transport that sends whole buffers sends as many bytes as an all-gather, which is the better form
then; one that sends rows by counts on the device sends fewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlane.engine.comm.collectives import Steps
from expertlane.engine.moe.dispatch import Dispatcher, RoutedTokens, bytes_of, columns_of, unpack
from expertlane.engine.ops.products import PairGroups
from expertlane.engine.ops.row_parts import RowParts


@dataclass(frozen=True)
class Gathered:
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
    """Sends all tokens of the stage to all of its ranks."""

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, Gathered]]:
        """Gather all tokens of the stage."""
        num_of = tokens.num_of_stage_rank
        is_balanced = self._is_balanced(tokens)
        # Balanced copies are chosen after the gather, which brings the top-k ids of all ranks.
        ids = tokens.topk_ids.int() if is_balanced else self._choice.physical_ids(tokens.topk_ids)
        parts = [ids, tokens.topk_weights, *self._payload.encode(tokens.x)]
        columns = columns_of(parts)
        packed = yield from self._mesh.stage.gathered(
            self._pack(self._mesh.stage, parts), num_of, metadata_bytes=bytes_of(columns[:-1])
        )
        ids, weights, *hidden = unpack(packed, columns)
        if is_balanced:
            ids = self._choice.balanced(ids, num_of)
        rows = self._payload.decode(hidden, tokens.x.dtype)
        first_id = self._mesh.at.ep_rank * self._choice.num_slots
        pairs = self._pairs(ids, first_id)
        return rows, pairs, Gathered(pairs.numbers, weights, num_of)

    def combine(self, sent: Gathered, results: Tensor) -> Steps[Tensor]:
        """Add up all ranks' weighted partial sums."""
        out = self._mesh.stage.empty(sent.places.shape[0], results.shape[1], results)
        partial = self._ops.gather_sum(results, sent.places, sent.weights, out)
        return (yield from self._mesh.stage.reduced(partial, sent.num_of_stage_rank))


@dataclass(frozen=True)
class Placed:
    """The handle of a static dispatch for `combine`.

    Attributes:
        home: [T, ep]; the row of each token among the buffers for all ranks, -1 for none.
        places: [R, K]; index of each pair's result, for the rows that arrived; -1 for pairs of
            other ranks, and for padding.
        weights: [R, K] float32; top-k weights.
        room_from: [ep]; rows of the buffer from each rank with this etp_rank.
        room_of_etp_rank: [etp]; rows, with padding, that each rank of the etp group received.
    """

    home: Tensor
    places: Tensor
    weights: Tensor
    room_from: list[int]
    room_of_etp_rank: list[int]


class StaticDispatcher(Dispatcher):
    """Sends a copy of each token to every rank that it reaches, in buffers for all tokens."""

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, Placed]]:
        """Send a copy of each token to every rank it reaches, padded to all tokens."""
        mesh, etp, num_of = self._mesh, self._mesh.etp.size, tokens.num_of_stage_rank
        if self._is_balanced(tokens):
            of_stage = self._choice.balanced((yield self._tell_choices(tokens)), num_of)
            ids = self._choice.own_of(of_stage, num_of)
        else:
            ids = self._choice.physical_ids(tokens.topk_ids)
        leaving = self._ops.rows_by_peer(ids, self._choice.num_slots, mesh.ep.size, padded=True)
        by_token = [tokens.topk_weights, *self._payload.encode(tokens.x)]
        columns = columns_of([leaving.ids, *by_token])
        packed = self._pack(mesh.ep, [leaving.ids], by_token, leaving.tokens)
        metadata_bytes = bytes_of(columns[:-1])
        room_to = [ids.shape[0]] * mesh.ep.size
        room_from = [*num_of[mesh.at.etp_rank :: etp]]
        room_of_etp_rank = [sum(num_of[place::etp]) for place in range(etp)]
        packed = yield from mesh.ep.exchanged(
            packed, room_to, room_from, metadata_bytes, num_real=leaving.counts.tolist
        )
        if etp > 1:
            here = unpack(packed, columns)[0]
            packed = yield from mesh.etp.gathered(
                packed,
                room_of_etp_rank,
                metadata_bytes,
                num_real=lambda: _num_real(here, [here.shape[0]]) * etp,
            )
        arrived, weights, *hidden = unpack(packed, columns)
        rows = self._payload.decode(hidden, tokens.x.dtype)
        pairs = self._pairs(arrived, 0)
        sent = Placed(leaving.places, pairs.numbers, weights, room_from, room_of_etp_rank)
        return rows, pairs, sent

    def is_row(self, sent: Placed) -> Tensor:
        """Whether each row that arrived, [R], is no padding."""
        return (sent.places >= 0).any(1)

    def combine(self, sent: Placed, results: Tensor) -> Steps[Tensor]:
        """Sum each token's results per rank, then on its own rank."""
        mesh, etp, places = self._mesh, self._mesh.etp, sent.places
        group = etp if etp.size > 1 else mesh.ep
        out = group.empty(places.shape[0], results.shape[1], results)
        partial = self._ops.gather_sum(results, places, sent.weights, out)
        own = torch.split(places, sent.room_of_etp_rank)[etp.rank]
        if etp.size > 1:
            partial = yield from etp.reduced(
                partial,
                sent.room_of_etp_rank,
                num_real=lambda: _num_real(places, sent.room_of_etp_rank),
            )

        def add_up(back: RowParts) -> Tensor:
            return self._ops.gather_sum(back, sent.home)

        return (
            yield from mesh.ep.exchanged(
                partial,
                sent.room_from,
                [sent.home.shape[0]] * mesh.ep.size,
                finish=add_up,
                num_real=lambda: _num_real(own, sent.room_from),
            )
        )


def _num_real(places: Tensor, room: Sequence[int]) -> list[int]:
    """Rows of each part that are no padding: those with a value above -1 in [R, K]."""
    return [int(part.any(1).sum()) for part in torch.split(places >= 0, list(room))]
