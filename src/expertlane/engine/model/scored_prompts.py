"""Log-probabilities of prompt tokens: the tokens of a batch that need them, and their values."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.model.draw import token_logprobs
from expertlane.schedule.plan import Batch
from expertlane.spec.sampling import PromptPart, SamplingState

_LOGITS = 1 << 23  # computed at a time, 32 MiB: a prompt of 100,000 tokens has too many for memory


@dataclass(frozen=True, eq=False)
class ScoredPrompts:
    """Prompt tokens of a batch whose log-probabilities are asked for, in a part for each sequence.

    Attributes:
        rows: [num_scored], ascending; index in the batch of the token just before each.
        token_ids: [num_scored].
        seq_ids: [num_parts]; the sequence of each part.
        starts: [num_parts]; position of its first scored token in the prompt.
        borders: [num_parts + 1]; where each part begins among the scored tokens, and the end.
        num_top_of: [num_parts]; how many of the likeliest tokens each asks for.
    """

    rows: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    seq_ids: list[int]
    starts: list[int]
    borders: list[int]
    num_top_of: list[int]

    @classmethod
    def of_batch(
        cls, batch: Batch, state_of: Callable[[int], SamplingState | None]
    ) -> "ScoredPrompts | None":
        """The scored prompt tokens of a batch; None if no sequence asks for any.

        Args:
            state_of: gives the sampling state of a sequence by its id; None of a greedy one.
        """
        rows: list[npt.NDArray[np.int64]] = []
        tokens: list[npt.NDArray[np.int64]] = []
        seq_ids, starts, nums, borders = [], [], [], [0]
        # A single token that yields one is the last of its prompt, or no prompt.
        may_score = (batch.num_scheduled_tokens > 1) | ~batch.yields_token
        if not may_score.any():
            return None
        ends = np.cumsum(batch.num_scheduled_tokens)
        for seq in np.flatnonzero(may_score).tolist():
            seq_id, num = int(batch.seq_ids[seq]), int(batch.num_scheduled_tokens[seq])
            state = state_of(seq_id)
            if state is None or not state.scores_prompt:
                continue
            start = int(batch.num_computed_tokens[seq]) + 1
            targets = state.prompt_token_ids[start : start + num]
            if not len(targets):
                continue
            begin = int(ends[seq]) - num
            rows.append(np.arange(begin, begin + len(targets)))
            tokens.append(targets)
            seq_ids.append(seq_id)
            starts.append(start)
            borders.append(borders[-1] + len(targets))
            nums.append(state.params.prompt_logprobs or 0)
        if not seq_ids:
            return None
        return cls(np.concatenate(rows), np.concatenate(tokens), seq_ids, starts, borders, nums)

    def chunks(self, vocab_size: int) -> "list[slice]":
        """Slices of `rows`, each as many as a bound on memory for their logits allows."""
        size = max(1, _LOGITS // vocab_size)
        return [slice(start, start + size) for start in range(0, len(self.rows), size)]

    def score(self, logits: Tensor, chunk: slice) -> tuple[Tensor, ...]:
        """Log-probabilities, ranks and likeliest tokens of a chunk: columns of a `PromptPart`.

        Args:
            logits: [num_rows, vocab_size] float32.
        """
        token_ids = torch.from_numpy(self.token_ids[chunk]).to(logits.device)
        num_top = min(max(self.num_top_of), logits.shape[1])
        logprobs, top_ids, top = token_logprobs(logits, token_ids, num_top)
        own = logits.gather(1, token_ids[:, None])
        ranks = (logits > own).sum(1) + 1
        return logprobs.cpu(), ranks.int().cpu(), top_ids.int().cpu(), top.cpu()

    def parts(self, scored: list[tuple[Tensor, ...]]) -> dict[int, PromptPart]:
        """Parts by sequence id, from the columns of all chunks."""
        columns = [torch.cat(column).numpy() for column in zip(*scored, strict=True)]
        logprobs, ranks, top_ids, top = columns
        found = {}
        for seq_id, start, num_top, (begin, end) in zip(
            self.seq_ids, self.starts, self.num_top_of, pairwise(self.borders), strict=True
        ):
            found[seq_id] = PromptPart(
                start,
                logprobs[begin:end],
                ranks[begin:end],
                np.ascontiguousarray(top_ids[begin:end, :num_top]),
                np.ascontiguousarray(top[begin:end, :num_top]),
            )
        return found
