"""The output head: the likeliest tokens or logits, and log-probabilities of prompt tokens."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.draw import token_logprobs
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.weights import WeightSource
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.device import to_device
from expertlane.schedule.plan import Batch
from expertlane.spec.layout import partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.sampling import PromptPart, SamplingState, TokenLogprobs
from expertlane.spec.tensors import FINAL_NORM, HEAD

NO_TOKEN = -1  # in place of a choice: the greatest logit is NaN or infinite

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


class HeadResult(NamedTuple):
    """The output head's result for a batch.

    Attributes:
        token_ids: [num_seqs]; the likeliest tokens, the same on all tensor-parallel ranks, or
            `NO_TOKEN` where the greatest logit is not finite; None where `all_logits` is given.
        logits: [num_seqs, num_local_vocab] float32; this rank's part of the vocabulary.
        all_logits: [num_seqs, vocab_size] float32; None unless needed.
        prompt_logprobs: by sequence id, where asked for.
    """

    token_ids: Tensor | None
    logits: Tensor
    all_logits: Tensor | None
    prompt_logprobs: Mapping[int, PromptPart] = MappingProxyType({})


class ChosenLogprobs(NamedTuple):
    """Log-probabilities of chosen tokens and of the likeliest, on the device.

    Attributes:
        rows: rows of the sequences that ask for them.
        nums: how many of the likeliest each asks for.
        columns: the result of `token_logprobs` for these rows.
    """

    rows: list[int]
    nums: list[int]
    columns: tuple[Tensor, ...]

    def read(
        self, token_ids: list[int], arrived: Iterator[Tensor]
    ) -> Iterator[tuple[int, TokenLogprobs]]:
        """Pairs of row and log-probabilities; rows with `NO_TOKEN` are left out.

        Args:
            token_ids: [num_seqs]; the chosen tokens.
            arrived: tensors on the host; the first are `columns`, which are taken from it.
        """
        lists = [next(arrived).tolist() for _ in self.columns]
        for row, num, logprob, ids, values in zip(self.rows, self.nums, *lists, strict=True):
            if (token_id := token_ids[row]) != NO_TOKEN:
                top = tuple(zip(ids[:num], values[:num], strict=True))
                yield row, TokenLogprobs(token_id, logprob, top)


def likeliest(logits: Tensor) -> Tensor:
    """The token of the greatest logit, the lowest id of equals; `NO_TOKEN` where it is not finite.

    A NaN or inf counts as its row's greatest; -inf may stand beside finite logits.

    Args:
        logits: [num_rows, vocab_size].

    Returns:
        [num_rows].
    """
    token_ids = logits.argmax(1, keepdim=True)
    is_finite = logits.gather(1, token_ids).isfinite()
    return token_ids.where(is_finite, NO_TOKEN).squeeze(1)


class OutputHead:
    """Final norm, a rank's rows of the output head, and the choice of the likeliest token."""

    def __init__(self, model: ModelConfig, source: WeightSource, mesh: ParallelMesh) -> None:
        parts = partition(model.vocab_size, mesh.layout.tp)
        own = parts[mesh.at.tp_rank]
        self._vocab_of_tp_rank = [len(part) for part in parts]
        self._first_token_id = own.start
        self._mesh, self._recorder = mesh, mesh.recorder
        self._ops = backend_for(source.device)
        self._eps = model.hidden_norm_eps
        self._norm = source.once(
            None,
            FINAL_NORM,
            lambda: source.take(FINAL_NORM, dtype=torch.float32) / model.logits_scaling,
        )
        self._head = source.linear(None, HEAD, own)
        in_part = self._norm if mesh.tp.size == 1 else None
        self._part = self._ops.head_part(self._head, in_part, self._eps, source.dtype)

    def tensors(self) -> list[Tensor]:
        """All weights, for checksums."""
        return [self._norm, *self._head.tensors()]

    def forward(self, x: Tensor, batch: ForwardBatch, needs_logits: bool) -> Steps[HeadResult]:
        """The next token of every sequence of the batch that yields one.

        Args:
            x: [num_owned, hidden_size].
            needs_logits: give logits of the whole vocabulary, not the likeliest tokens.
        """
        enter, tp = self._recorder.enter, self._mesh.tp
        enter(Stage.HEAD)
        last = batch.last_tokens
        if tp.size == 1 and self._part is not None and self._part.takes(x):
            token_ids = None if needs_logits else last.new_empty(len(last))
            logits = self._part(x, last, token_ids)
            self._count(len(last))
            return HeadResult(token_ids, logits, logits if needs_logits else None)
        hidden = yield from self._normed(x, last, batch.last_tokens_of_tp_rank)
        best: Tensor | None = None
        if tp.size > 1 and self._part is not None and self._part.takes(hidden):
            best = torch.empty(len(hidden), 2, dtype=torch.float64)
            logits = self._part(hidden, None, None, best)
        else:
            logits = self._head(hidden).float()
        self._count(len(hidden))
        if needs_logits:
            return HeadResult(None, logits, (yield from self.whole(logits)))
        if tp.size == 1:
            return HeadResult(likeliest(logits), logits, None)
        best = self._best(logits) if best is None else best
        token_ids = yield from self._likeliest(best)
        return HeadResult(token_ids, logits, None)

    def score(
        self, x: Tensor, batch: ForwardBatch, scored: ScoredPrompts
    ) -> Steps[dict[int, PromptPart]]:
        """Log-probabilities of prompt tokens by sequence id, alike on all tensor-parallel ranks.

        Args:
            x: [num_owned, hidden_size].
        """
        found = []
        self._recorder.enter(Stage.HEAD)
        for chunk in scored.chunks(sum(self._vocab_of_tp_rank)):
            of_tp_rank = batch.owned(scored.rows[chunk])
            (own,) = to_device([of_tp_rank[self._mesh.at.tp_rank]], x.device)
            hidden = yield from self._normed(x, own, list(map(len, of_tp_rank)))
            logits = self._head(hidden).float()
            self._count(len(hidden))
            found.append(scored.score((yield from self.whole(logits)), chunk))
        return scored.parts(found)

    def _normed(self, x: Tensor, own: Tensor, num_of_tp_rank: list[int]) -> Steps[Tensor]:
        """Normed rows [num_rows, hidden_size] of all tensor-parallel ranks; `own` are this rank's.

        Args:
            own: indices of this rank's rows in x.
            num_of_tp_rank: [tp]; rows of each rank.
        """
        hidden = self._ops.rms_norm(x[own], self._norm, self._eps)
        if self._mesh.tp.size > 1:
            hidden = yield from self._gathered(hidden, num_of_tp_rank)
        return hidden

    def _gathered(self, rows: Tensor, num_of: list[int], metadata_bytes: int = 0) -> Steps[Tensor]:
        self._recorder.enter(Stage.COLLECTIVES)
        gathered = yield from self._mesh.tp.gathered(rows, num_of, metadata_bytes=metadata_bytes)
        self._recorder.enter(Stage.HEAD)
        return gathered

    def _count(self, num_seqs: int) -> None:
        if self._recorder.is_recording:
            num_bytes = self._head.num_bytes if num_seqs else 0
            self._recorder.count_compute(2 * num_seqs * self._head.num_weights, num_bytes)

    def whole(self, logits: Tensor) -> Steps[Tensor]:
        """Logits [num_seqs, vocab_size], gathered from every rank's part of the vocabulary."""
        if self._mesh.tp.size == 1:
            return logits
        # Ranks hold parts of the vocabulary, so it must be the rows of the gather.
        own = logits.t().contiguous()
        return (yield from self._gathered(own, self._vocab_of_tp_rank)).t()

    @staticmethod
    def _best(logits: Tensor) -> Tensor:
        """[num_seqs, 2] float64; this rank's greatest logit, and its index."""
        if logits.shape[1]:
            value, place = logits.max(dim=-1)
        else:  # more ranks than vocabulary
            place = logits.new_zeros(len(logits))
            value = place - torch.inf
        return torch.stack([value.double(), place.double()], 1)

    def _likeliest(self, candidates: Tensor) -> Steps[Tensor]:
        """The likeliest tokens over all ranks' parts of the vocabulary.

        Args:
            candidates: [num_seqs, 2] float64; of `_best`.
        """
        size, num_seqs = self._mesh.tp.size, len(candidates)
        candidates[:, 1] += self._first_token_id
        width = candidates.shape[1] * candidates.itemsize
        gathered = yield from self._gathered(candidates, [num_seqs] * size, width)
        by_rank = gathered.view(size, num_seqs, 2)
        best = by_rank[:, :, 0].argmax(dim=0)  # the first of equals: the lowest token id
        value, token_id = by_rank[best, torch.arange(num_seqs, device=best.device)].unbind(1)
        return token_id.where(value.isfinite(), NO_TOKEN).long()
