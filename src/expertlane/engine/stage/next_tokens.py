"""The next tokens of a step on a rank: chosen on the device, and copied to the host together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from expertlane.engine.model.draw import NO_TOKEN
from expertlane.engine.model.head import HeadResult
from expertlane.engine.model.sampler import Sampled, Sampler
from expertlane.engine.ops.transfer import to_host
from expertlane.engine.ranks.commands import RankOutcome
from expertlane.schedule.plan import UNKNOWN, Batch
from expertlane.spec.sampling import TokenLogprobs


def with_chosen(batch: Batch, chosen: dict[int, int]) -> Batch:
    """Fill in the tokens that the scheduler did not know: those of the step before.

    Args:
        chosen: tokens of that step, by sequence id.
    """
    is_unknown = batch.token_ids == UNKNOWN
    if not is_unknown.any():
        return batch
    token_ids = batch.token_ids.copy()
    seq_ids = np.repeat(batch.seq_ids, batch.num_scheduled_tokens)[is_unknown]
    token_ids[is_unknown] = [chosen[seq] for seq in seq_ids.tolist()]
    return replace(batch, token_ids=token_ids)


class StepTokens:
    """Chooses the next tokens of a step's parts, alike on all ranks of a tensor-parallel group."""

    def __init__(self) -> None:
        # `Sampled` is None where the likeliest tokens are taken.
        self._parts: list[tuple[list[int], HeadResult, Sampled | None]] = []
        self._tensors: list[Tensor] = []  # of all parts, to be copied to the host

    def choose(self, seq_ids: list[int], result: HeadResult, sampler: Sampler) -> None:
        """Choose the next tokens of a part.

        Args:
            seq_ids: [num_seqs]; the sequences that yield a token.
            result: the head's result for them.
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
        """Wait for the device, and give all tokens by sequence id, for the next step.

        A sequence without a next token gets 0: a step that is under way goes on with any token.

        Args:
            outcome: gets the tokens and log-probabilities; None on all but one rank of a
                tensor-parallel group.
            look: called with each part's logits on this rank, and its tokens; None without checks.
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
