"""The next tokens of a step on a rank: chosen on the device, and brought to the host together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from expertlane.engine.model.draw import NO_TOKEN
from expertlane.engine.model.sampler import Sampled, Sampler
from expertlane.engine.model.transformer import HeadResult
from expertlane.engine.ops.transfer import to_host
from expertlane.engine.ranks.commands import RankOutcome
from expertlane.schedule.plan import UNKNOWN, Batch
from expertlane.spec.sampling import TokenLogprobs


def with_chosen(batch: Batch, chosen: dict[int, int]) -> Batch:
    """The batch with the tokens that the scheduler did not know: those of the step before."""
    is_unknown = batch.token_ids == UNKNOWN
    if not is_unknown.any():
        return batch
    token_ids = batch.token_ids.copy()
    seq_ids = np.repeat(batch.seq_ids, batch.num_scheduled_tokens)[is_unknown]
    token_ids[is_unknown] = [chosen[seq] for seq in seq_ids.tolist()]
    return replace(batch, token_ids=token_ids)


class StepTokens:
    """Of all parts of a step; chosen on all ranks of a tensor-parallel group alike."""

    def __init__(self) -> None:
        # None for what was sampled where the likeliest were taken.
        self._parts: list[tuple[list[int], HeadResult, Sampled | None]] = []
        self._tensors: list[Tensor] = []  # of all parts, to be brought to the host

    def choose(self, seq_ids: list[int], result: HeadResult, sampler: Sampler) -> None:
        """Choose those of a part.

        Args:
            seq_ids: of the sequences that yield one.
        """
        if result.token_ids is not None:
            self._parts.append((seq_ids, result, None))
            self._tensors.append(result.token_ids)
            return
        assert result.all_logits is not None, "one of both is given"
        sampled = sampler.sample(seq_ids, result.all_logits)
        self._parts.append((seq_ids, result, sampled))
        self._tensors += sampled.tensors

    def fetch(
        self,
        outcome: RankOutcome | None,
        look: Callable[[Tensor, dict[int, int]], None] | None,
        until: Callable[[Any], None],
    ) -> dict[int, int]:
        """Wait for the device; gives all tokens by sequence id, for the next step.

        Where there is none, the token is 0: a step that is under way goes on with any.

        Args:
            outcome: is told; None on all but one rank of a tensor-parallel group.
            look: is shown each part's logits of this rank, and its tokens; None for nobody.
            until: waits for an event of the device.
        """
        arrived = iter(to_host(self._tensors, until))
        of_all: dict[int, int] = {}
        for seq_ids, result, sampled in self._parts:
            logprobs: dict[int, TokenLogprobs] = {}
            if sampled is None:
                chosen = next(arrived).tolist()
            else:
                chosen, logprobs = sampled.read(arrived)
            tokens = dict(zip(seq_ids, chosen, strict=True))
            if look is not None:
                look(result.logits, tokens)
            of_all |= tokens
            if outcome is not None:
                outcome.token_ids |= tokens
                outcome.logprobs |= logprobs
                outcome.prompt_logprobs |= result.prompt_logprobs
            if NO_TOKEN in chosen:
                failed = [seq for seq, token in tokens.items() if token == NO_TOKEN]
                of_all |= dict.fromkeys(failed, 0)
                if outcome is not None:
                    outcome.not_finite += failed
                    for seq in failed:
                        del outcome.token_ids[seq]
        return of_all
