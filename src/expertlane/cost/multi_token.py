"""Multi-token prediction: several tokens a step, guessed by one more layer and then verified.

With N drafts a decode step takes 1 + N tokens of a sequence through the model and the head: its
last token and what was guessed to follow. Then N passes of one more layer, as wide as the model's
last, and of the head guess anew, each from the one before; the first of them takes all of the
step's tokens. Guesses are right with the same probability P each, and count up to the first wrong
one, so that a step yields 1 + P + P² + … + P^N tokens on average. P depends on the
text: bounds have it lower and higher by `ACCEPTANCE_UNSURE`.

How many tokens a step yields is taken as that average, for every sequence in every step: what
chance does to single steps is not modelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from expertlane.cost.laws.execution import BOUNDS, LIKELY
from expertlane.cost.step.operation import Floats
from expertlane.errors import SpecError
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.model import ModelConfig

_MOST_DRAFTS = 16
ACCEPTANCE_UNSURE = 0.1  # an assumption: texts differ about so much


@dataclass(frozen=True)
class MultiToken:
    """Number of drafts, and the probability that one is accepted.

    Raises:
        SpecError: no such number or probability.
    """

    num_drafts: int = 0
    acceptance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.num_drafts <= _MOST_DRAFTS:
            raise SpecError(f"{self.num_drafts} drafts per step; valid: 0 to {_MOST_DRAFTS}")
        if not 0 <= self.acceptance <= 1:  # NaN neither
            raise SpecError(f"acceptance {self.acceptance:g}; valid: 0 to 1")

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a decoding sequence in a step, on average; 1 without drafts."""
        return sum(self.acceptance**place for place in range(self.num_drafts + 1))

    def at(self, bound: int) -> "MultiToken":
        """The same with the acceptance of a bound of time: the highest with the low one.

        Args:
            bound: place in `BOUNDS`.
        """
        moved = self.acceptance + (LIKELY - bound) * ACCEPTANCE_UNSURE
        return replace(self, acceptance=min(max(moved, 0.0), 1.0))

    @property
    def tokens_bounds(self) -> Floats:
        """[3]; `tokens_per_step` of the low, likely and high time."""
        return np.array([self.at(bound).tokens_per_step for bound in range(len(BOUNDS))])

    def num_steps(self, output_len: int) -> int:
        """Steps that give a sequence a token, the one that ends its prompt among them."""
        return 1 + ceil(round((output_len - 1) / self.tokens_per_step, 6))


class MultiTokenAdapter:
    """Corrects positions in plans: schedulers count one token a decode, drafts yield more."""

    def __init__(self, multi_token: MultiToken) -> None:
        self._extra = multi_token.tokens_per_step - 1
        self._num_decodes: Floats = np.zeros(1024)  # by sequence

    def adapt(self, plan: StepPlan) -> StepPlan:
        """The plan with the positions that its decodes have reached."""
        parts = tuple(tuple(map(self._batch, part)) for part in plan.micro_batches)
        return replace(plan, micro_batches=parts)

    def _batch(self, batch: Batch) -> Batch:
        if not batch.num_seqs:
            return batch
        most = int(batch.seq_ids.max())
        if most >= len(self._num_decodes):
            self._num_decodes = np.concatenate([self._num_decodes, np.zeros(most + 1)])
        is_decode = batch.yields_token & (batch.num_scheduled_tokens == 1)
        further = np.round(self._extra * self._num_decodes[batch.seq_ids]) * is_decode
        self._num_decodes[batch.seq_ids[is_decode]] += 1
        return replace(batch, num_computed_tokens=batch.num_computed_tokens + further.astype(int))


def with_drafting_layer(model: ModelConfig, num_drafts: int) -> ModelConfig:
    """The model with one more layer, as ranks that draft hold it."""
    if not num_drafts:
        return model
    window: Sequence[int | None] = model.sliding_window[-1:]
    return replace(
        model,
        num_hidden_layers=model.num_hidden_layers + 1,
        sliding_window=(*model.sliding_window, *window),
    )
