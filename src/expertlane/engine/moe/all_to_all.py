"""Flat all-to-all dispatch: a token is sent once to each rank that computes experts of it.

Of the ranks that share those experts it goes to the one with the sender's etp_rank, and is then
gathered over the expert tensor-parallel group. Expert outputs take the same way back, one row for
every token-expert pair, and the token's own rank sums them in float32 in the order of its top-k
ids. So the sum does not depend on which rank computed which expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expertlane.engine.comm.collectives import Steps
from expertlane.engine.moe.dispatch import Dispatcher, RoutedTokens, bytes_of, columns_of, unpack
from expertlane.engine.ops.bookkeeping import Outgoing
from expertlane.engine.ops.products import PairGroups
from expertlane.engine.ops.row_parts import RowParts

_ROWS, _PAIRS = 0, 1


@dataclass(frozen=True)
class Exchanged:
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
    """Sends a copy of each token to every rank that it reaches."""

    def dispatch(self, tokens: RoutedTokens) -> Steps[tuple[Tensor, PairGroups, Exchanged]]:
        """Send a copy of each token to every rank it reaches."""
        mesh, at, ep = self._mesh, self._mesh.at, self._mesh.ep.size
        is_balanced = self._is_balanced(tokens)
        if is_balanced:
            telling = self._tell_choices(tokens)
        else:
            leaving = self._choice.outgoing(tokens.topk_ids)
            telling = self._tell_all(leaving.counts)
        hidden = self._payload.encode(tokens.x)  # while choices or counts travel
        if is_balanced:
            leaving, of_stage = self._leaving((yield telling), tokens.num_of_stage_rank)
        columns = columns_of([leaving.ids_there, *hidden])
        packed = self._pack(mesh.ep, [leaving.ids_there], hidden, leaving.tokens)
        if not is_balanced:
            of_stage = yield telling
        counts = of_stage.view(-1, 2, ep).cpu().numpy()
        packed = yield from self._send(packed, counts, bytes_of(columns[:-1]))
        slots, *hidden = unpack(packed, columns)
        rows = self._payload.decode(hidden, tokens.x.dtype)
        came = counts[:, _PAIRS, at.ep_rank].reshape(ep, mesh.etp.size)
        pairs = self._ops.group_pairs(slots, 0, 1, self._num_local_experts, int(came.sum()))
        sent = Exchanged(
            weights=tokens.topk_weights,
            returns_to_etp_rank=came.sum(axis=0).tolist(),
            pairs_from=came[:, at.etp_rank].tolist(),
            pairs_to=counts[mesh.stage.rank, _PAIRS].tolist(),
            places=leaving.places,
        )
        return rows, pairs, sent

    def _leaving(
        self, topk_ids: Tensor, num_of_stage_rank: Sequence[int]
    ) -> tuple[Outgoing, Tensor]:
        """Rows for each rank with balanced copies, and the counts of rows and pairs of all ranks.

        Args:
            topk_ids: [N, K] int32; of all tokens of the stage.
        """
        sizes = self._choice.num_slots, self._mesh.ep.size
        ids = self._choice.balanced(topk_ids, num_of_stage_rank)
        own = self._choice.own_of(ids, num_of_stage_rank)
        counts = self._ops.rows_and_pairs(ids, num_of_stage_rank, *sizes)
        return self._ops.leaving(own, *sizes), counts

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

    def room(self, num_pairs: int, rows: Tensor) -> Tensor | None:
        """A buffer for results [P, H] in the memory of the group that sends them."""
        group = self._mesh.etp if self._mesh.etp.size > 1 else self._mesh.ep
        return group.empty(num_pairs, rows.shape[1], rows)

    def combine(self, sent: Exchanged, results: Tensor) -> Steps[Tensor]:
        """Return a row for every pair, and sum the rows of each token on its own rank."""
        mesh = self._mesh
        if mesh.etp.size > 1:
            results = yield from mesh.etp.reduced(results, sent.returns_to_etp_rank)

        def add_up(arrived: RowParts) -> Tensor:
            return self._ops.gather_sum(arrived, sent.places, sent.weights)

        return (
            yield from mesh.ep.exchanged(results, sent.pairs_from, sent.pairs_to, finish=add_up)
        )
