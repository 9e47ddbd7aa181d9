"""The next tokens of a step on a rank: chosen on the device, and brought to the host together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from expertlane.engine.commands import RankOutcome
from expertlane.model.draw import NO_TOKEN
from expertlane.model.sampler import Sampled, Sampler
from expertlane.model.transformer import HeadResult
from expertlane.ops.transfer import Fetched
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


class _Chosen(NamedTuple):
    """Tokens of a part of a step, on the device.

    Attributes:
        sampled: None where the likeliest were taken.
        tensors: to be brought to the host.
    """

    seq_ids: list[int]
    result: HeadResult
    sampled: Sampled | None
    tensors: list[Tensor]


class StepTokens:
    """Of all parts of a step; chosen on all ranks of a tensor-parallel group alike."""

    def __init__(self) -> None:
        self._parts: list[_Chosen] = []

    def choose(self, seq_ids: list[int], result: HeadResult, sampler: Sampler) -> None:
        """Choose those of a part.

        Args:
            seq_ids: of the sequences that yield one.
        """
        if result.token_ids is not None:
            self._parts.append(_Chosen(seq_ids, result, None, [result.token_ids]))
            return
        assert result.all_logits is not None, "one of both is given"
        sampled = sampler.sample(seq_ids, result.all_logits)
        self._parts.append(_Chosen(seq_ids, result, sampled, sampled.tensors))

    def fetch(
        self,
        outcome: RankOutcome | None,
        look: Callable[[Tensor, dict[int, int]], None],
        until: Callable[[Any], None],
    ) -> dict[int, int]:
        """Wait for the device; gives all tokens by sequence id, for the next step.

        Where there is none, the token is 0: a step that is under way goes on with any.

        Args:
            outcome: is told; None on all but one rank of a tensor-parallel group.
            look: is shown each part's logits of this rank, and its tokens.
            until: waits for an event of the device.
        """
        fetched = Fetched([tensor for part in self._parts for tensor in part.tensors])
        rest = iter(fetched.wait(until))
        of_all: dict[int, int] = {}
        for seq_ids, result, sampled, sent in self._parts:
            tensors = [next(rest) for _ in sent]
            logprobs: dict[int, TokenLogprobs] = {}
            if sampled is None:
                chosen = tensors[0].tolist()
            else:
                chosen, logprobs = sampled.read(tensors)
            tokens = dict(zip(seq_ids, chosen, strict=True))
            look(result.logits, tokens)
            failed = [seq for seq, token in tokens.items() if token == NO_TOKEN]
            if outcome is not None:
                outcome.token_ids |= {s: token for s, token in tokens.items() if token != NO_TOKEN}
                outcome.logprobs |= logprobs
                outcome.not_finite += failed
                outcome.prompt_logprobs |= result.prompt_logprobs
            of_all |= tokens | dict.fromkeys(failed, 0)
        return of_all
