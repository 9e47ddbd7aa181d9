"""Steps that are alike, so that they are counted, priced and replayed once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertlane.cost.pricing import StageWork
from expertlane.cost.step.program import StepProgram
from expertlane.cost.timeline import FromRest
from expertlane.schedule.plan import Batch, StepPlan

_KEPT_RANKS = 1 << 15  # of all steps kept together: what a step takes grows with its ranks
_FEWEST_KEPT = 64


@dataclass(eq=False)
class KnownWork:
    """A step as it was counted and priced.

    Attributes:
        work: [num_stages][num_micro_batches].
        from_rest: how it went when all ranks were at rest before; None if that did not come yet.
    """

    program: StepProgram
    work: Sequence[Sequence[StageWork]]
    from_rest: FromRest | None = None


class StepSharing:
    """The steps of one deployment, for runners that may share it.

    A step takes the work of an earlier one whose sequences are as many on every data-parallel rank
    and micro-batch, and about as long: of those with one new token, the positions of a rank,
    summed up, round to the same multiple of `context_step` a sequence, or of `few_positions` where
    that is more; of the others, new and cached positions of each to one of `context_step`. So it
    also takes that step's routing, a sample of the same distribution, and its counters. The steps
    used least lately are forgotten.

    Args:
        num_ranks: of a replica.
        few_positions: of a rank, which take next to no time beside the rest of a step.
    """

    def __init__(self, context_step: int, num_ranks: int, few_positions: int = 1) -> None:
        self._context_step = context_step
        self._few_positions = few_positions
        self._most_kept = max(_FEWEST_KEPT, _KEPT_RANKS // num_ranks)
        self._known: OrderedDict[object, KnownWork] = OrderedDict()

    def find(self, plan: StepPlan, make: Callable[[], KnownWork]) -> KnownWork:
        """The work of a step like this one; made where there was none."""
        key = plan.replica, tuple([tuple(map(self._size, part)) for part in plan.micro_batches])
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = make()
            if len(self._known) > self._most_kept:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return known

    def _size(self, batch: Batch) -> object:
        """What batches that are alike have in common."""
        if not batch.num_seqs:
            return None
        step, num_computed = self._context_step, batch.num_computed_tokens
        num_chunks = 0
        chunks: tuple[tuple[int, int, bool], ...] = ()
        if batch.num_tokens > batch.num_seqs:
            is_chunk = batch.num_scheduled_tokens > 1
            chunks = tuple(
                sorted(
                    (round(new / step), round(cached / step), yields)
                    for new, cached, yields in zip(
                        batch.num_scheduled_tokens[is_chunk].tolist(),
                        num_computed[is_chunk].tolist(),
                        batch.yields_token[is_chunk].tolist(),
                        strict=True,
                    )
                )
            )
            num_chunks, num_computed = len(chunks), num_computed[~is_chunk]
        num_decodes = batch.num_seqs - num_chunks
        alike = max(num_decodes * step, self._few_positions)
        return num_decodes, round(int(num_computed.sum()) / alike), chunks
