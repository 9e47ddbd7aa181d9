"""All-gather dispatch: every rank of the stage gets all tokens, and computes its own experts.

It exchanges no counts, since the plan says how many tokens each rank has, and its shapes do not
depend on the routing. Balancing copies needs no further exchange either. Weighted partial sums come
back by reduce-scatter, in float32 and rank order. With `ep = 1`, where every rank has a slice of
every expert, all forms use this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from expertlane.engine.comm.collectives import Steps
from expertlane.engine.moe.dispatch import Dispatcher, RoutedTokens
from expertlane.engine.moe.payload import bytes_of, columns_of, unpack
from expertlane.engine.ops.products import PairGroups


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
