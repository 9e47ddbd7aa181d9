"""Sampling of several sequences together, with their parameters in common tensors."""

import math
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, auto
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.model.draw import (
    NO_TOKEN,
    draw,
    keep_likeliest,
    likeliest,
    probabilities,
    token_logprobs,
    uniform_numbers,
)
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.device import to_device
from expertlane.spec.sampling import SamplingParams, SamplingState, TokenLogprobs

_FLOAT32 = torch.finfo(torch.float32)
_MIN_TOP_P = 1e-9  # keeps one token, as any less would, and is not lost in rounding


class SampledSequence:
    """Sampling parameters of a sequence, and the state that its next token depends on.

    Attributes:
        num_output_tokens: [1]; output tokens so far.
        repetition: [1, vocab_size]; the repetition penalty for tokens seen, 1 for all others; or
            [1, 0] without the penalty.
        counts: [1, vocab_size]; how often each token is in the output; or [1, 0] if not needed.
        num_held: [1]; next tokens that may not be one of `stop_token_ids`.

    All four are views of the tensors of the batch that the sequence was last in, which updates
    them.
    """

    def __init__(self, state: SamplingState, vocab_size: int, device: torch.device) -> None:
        params, output = state.params, state.output_token_ids
        self.params = params
        self.seed = state.seed
        self.num_output_tokens = torch.tensor([len(output)])
        self.stop_token_ids = [each for each in state.stop_token_ids if each < vocab_size]
        num_held = np.array([max(0, params.min_tokens - len(output))])
        factors = counts = np.empty((1, 0), dtype=np.float32)
        if params.repetition_penalty != 1:
            factors = np.ones((1, vocab_size), dtype=np.float32)
            seen = np.concatenate((state.prompt_token_ids, output))
            factors[0, seen] = params.repetition_penalty
        if params.counts_output:
            counts = np.bincount(output, minlength=vocab_size).astype(np.float32)[None]
        columns = to_device([num_held, factors, counts], device)
        self.num_held, self.repetition, self.counts = columns


class SampledBatch:
    """The sequences of a step, sampled together; later steps with the same ones reuse it.

    Args:
        sequences: [num_seqs]; None for a plain greedy one.
    """

    def __init__(
        self, sequences: list[SampledSequence | None], vocab_size: int, device: torch.device
    ) -> None:
        def members(belongs: Callable[[SamplingParams], bool]) -> _Members:
            return _Members(sequences, belongs, device)

        self._penalties: list[_LogitBias | _RepetitionPenalty | _OutputPenalty | _HeldStops] = []
        if biased := members(lambda params: bool(params.logit_bias)):
            self._penalties.append(_LogitBias(biased))
        if repeated := members(lambda params: params.repetition_penalty != 1):
            self._penalties.append(_RepetitionPenalty(repeated))
        if counted := members(lambda params: params.counts_output):
            self._penalties.append(_OutputPenalty(counted))
        if held := members(lambda params: params.holds_stops):
            self._penalties.append(_HeldStops(held))
        # In groups by the limits they need, so that none pays for limits of others.
        drawn = [members(partial(_is_drawn, kind=kind, vocab_size=vocab_size)) for kind in _Kind]
        self._draws = [_Draws(group, vocab_size) for group in drawn if group]
        self._all_drawn = sum(map(len, drawn)) == len(sequences)
        self._logprobs = members(lambda params: params.logprobs is not None)

    def choose(
        self, logits: Tensor, masks: Mapping[int, npt.NDArray[np.uint8]] | None = None
    ) -> Tensor:
        """Choose the next tokens, and count them as output.

        Args:
            logits: [num_seqs, vocab_size] float32; not changed.
            masks: by row, the tokens that may be chosen; see `plan.StepPlan.masks`.

        Returns:
            [num_seqs]; `NO_TOKEN` where the greatest score is not finite.
        """
        scores = logits.clone() if self._penalties or masks else logits
        for penalty in self._penalties:
            penalty.apply(scores)
        if masks:
            _mask_out(scores, masks)
        if self._all_drawn:
            token_ids = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
        else:
            token_ids = likeliest(scores)
        for group in self._draws:
            token_ids[group.rows] = group.choose(scores[group.rows])
        if self._penalties:
            counted = token_ids.clamp(min=0)
            for penalty in self._penalties:
                penalty.count(counted)
        return token_ids

    def logprobs(self, logits: Tensor, token_ids: Tensor) -> "ChosenLogprobs | None":
        """Log-probabilities by the model's own distribution; None if no sequence asks for any.

        Args:
            logits: [num_seqs, vocab_size] float32.
            token_ids: [num_seqs]; the chosen tokens.
        """
        members = self._logprobs
        if not members:
            return None
        own, chosen = logits[members.rows], token_ids[members.rows].clamp(min=0)
        nums = [sequence.params.logprobs or 0 for sequence in members.sequences]
        columns = token_logprobs(own, chosen, min(max(nums), own.shape[1]))
        return ChosenLogprobs(members.numbers, nums, columns)


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


class _Members:
    """The sequences of a batch that belong to a group.

    Attributes:
        numbers: [num_members]; their rows in the batch.
        rows: `numbers` as an index; a slice if that is the whole batch, which saves copies.
    """

    def __init__(
        self,
        sequences: list[SampledSequence | None],
        belongs: Callable[[SamplingParams], bool],
        device: torch.device,
    ) -> None:
        found = [
            (number, sequence)
            for number, sequence in enumerate(sequences)
            if sequence is not None and belongs(sequence.params)
        ]
        self.numbers = [number for number, _ in found]
        self.sequences = [sequence for _, sequence in found]
        self.rows: Tensor | slice = slice(None)
        if len(found) < len(sequences):
            (self.rows,) = to_device([np.array(self.numbers, dtype=np.int64)], device)
        self.device = device

    def __len__(self) -> int:
        return len(self.numbers)

    def column(
        self, value: Callable[[SamplingParams], float], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A parameter of each member: [num_members, 1]."""
        values = [value(sequence.params) for sequence in self.sequences]
        (column,) = to_device([np.array(values, dtype=np.float64)], self.device)
        return column.to(dtype)[:, None]

    def join(self, name: str) -> Tensor:
        """Join an attribute of the members to [num_members, …]; each keeps a view of it."""
        joined = torch.cat([getattr(sequence, name) for sequence in self.sequences])
        for sequence, row in zip(self.sequences, joined[:, None].unbind(), strict=True):
            setattr(sequence, name, row)
        return joined


class _LogitBias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, members: _Members) -> None:
        biases = [sequence.params.logit_bias for sequence in members.sequences]
        rows = [row for row, pairs in zip(members.numbers, biases, strict=True) for _ in pairs]
        tokens = [token for pairs in biases for token, _ in pairs]
        values = [value for pairs in biases for _, value in pairs]
        columns = np.array([rows, tokens]), np.array(values, dtype=np.float32)
        places, self._values = to_device(columns, members.device)
        self._places = places.unbind()

    def apply(self, scores: Tensor) -> None:
        """Add to scores, [num_seqs, vocab_size], in place."""
        scores[self._places] += self._values

    def count(self, token_ids: Tensor) -> None:
        """Do nothing: biases do not depend on the output."""


class _HeldStops:
    """Forbids stop tokens while an output is shorter than `min_tokens`."""

    def __init__(self, members: _Members) -> None:
        self._num_held = members.join("num_held")
        places = [
            (member, row, token)
            for member, (row, sequence) in enumerate(
                zip(members.numbers, members.sequences, strict=True)
            )
            for token in sequence.stop_token_ids
        ]
        columns = np.array(places, dtype=np.int64).reshape(-1, 3).T
        self._places = to_device([np.ascontiguousarray(columns)], members.device)[0].unbind()

    def apply(self, scores: Tensor) -> None:
        """Set their scores to -inf, [num_seqs, vocab_size], in place."""
        members, *places = self._places
        own = scores[places[0], places[1]]
        scores[places[0], places[1]] = own.masked_fill(self._num_held[members] > 0, -math.inf)

    def count(self, token_ids: Tensor) -> None:
        """Count one token more, whichever it is."""
        self._num_held -= 1


class _RepetitionPenalty:
    """Makes tokens of prompt and output less likely, however often they occur."""

    def __init__(self, members: _Members) -> None:
        self._rows = members.rows
        self._factors = members.join("repetition")
        self._penalty = members.column(lambda params: params.repetition_penalty)

    def apply(self, scores: Tensor) -> None:
        """Divide positive scores, [num_seqs, vocab_size], multiply negative ones; in place."""
        own = scores[self._rows]
        positive = own.clamp(min=0).div_(self._factors)
        scores[self._rows] = own.clamp(max=0).mul_(self._factors).add_(positive)

    def count(self, token_ids: Tensor) -> None:
        """Add the chosen tokens, [num_seqs], to those seen."""
        self._factors.scatter_(1, token_ids[self._rows][:, None], self._penalty)


class _OutputPenalty:
    """Subtracts the presence penalty from tokens in the output, the frequency penalty each time."""

    def __init__(self, members: _Members) -> None:
        self._rows = members.rows
        self._counts = members.join("counts")
        self._presence = members.column(lambda params: params.presence_penalty)
        self._frequency = members.column(lambda params: params.frequency_penalty)
        self._one = torch.ones_like(self._presence)

    def apply(self, scores: Tensor) -> None:
        """Subtract from scores, [num_seqs, vocab_size], in place."""
        penalty = self._counts.clamp(max=1).mul_(self._presence)
        penalty.addcmul_(self._counts, self._frequency)
        scores[self._rows] -= penalty

    def count(self, token_ids: Tensor) -> None:
        """Add the chosen tokens, [num_seqs], to the counts."""
        self._counts.scatter_add_(1, token_ids[self._rows][:, None], self._one)


class _Kind(Enum):
    """The limits on the tokens that may be drawn."""

    FREELY = auto()  # none
    BY_SHARE = auto()  # top-p or min-p
    BY_RANK = auto()  # top-k, perhaps with the others


class _Draws:
    """Sequences of one kind whose tokens are drawn, with their seeds and limits."""

    def __init__(self, members: _Members, vocab_size: int) -> None:
        self.rows, self._ops = members.rows, backend_for(members.device)
        self._seeds = np.array([sequence.seed for sequence in members.sequences], dtype=np.uint64)
        self._num_output_tokens = members.join("num_output_tokens")
        # A temperature that float32 rounds to 0 or to infinity would make NaNs.
        self._temperature = members.column(
            lambda params: min(max(params.temperature, _FLOAT32.tiny), _FLOAT32.max)
        )
        some = [sequence.params for sequence in members.sequences]
        self._top_k = self._top_p = self._min_p = None
        if any(_top_k(params, vocab_size) < math.inf for params in some):
            self._top_k = members.column(lambda params: _top_k(params, vocab_size), torch.float64)
        if any(params.top_p < 1 for params in some):
            self._top_p = members.column(_top_p, torch.float64)
        if any(params.min_p > 0 for params in some):
            self._min_p = members.column(lambda params: params.min_p)

    def choose(self, scores: Tensor) -> Tensor:
        """Draw token ids [num_members] from scores [num_members, vocab_size]."""
        limits = self._top_k, self._top_p, self._min_p
        drawn = self._ops.draw_tokens(
            scores, self._temperature, limits, self._seeds, self._num_output_tokens
        )
        if drawn is not None:
            return drawn
        greatest = scores.amax(1, keepdim=True)
        is_finite = greatest.isfinite()
        # Rows that are not finite are drawn from too, so that no row's number changes; on a GPU
        # they are masked without asking whether there are any.
        if scores.device.type != "cpu" or not is_finite.all():
            scores = scores.masked_fill(~is_finite, 0)
            greatest = greatest.masked_fill(~is_finite, 0)
        p = probabilities(scores, greatest, self._temperature)
        p = keep_likeliest(p, *limits)
        uniform = uniform_numbers(self._seeds, self._num_output_tokens.numpy())
        self._num_output_tokens += 1
        token_ids = draw(p, *to_device([uniform], p.device))
        return token_ids.where(is_finite.squeeze(1), NO_TOKEN)


def _mask_out(scores: Tensor, masks: Mapping[int, npt.NDArray[np.uint8]]) -> None:
    """Set the scores of tokens outside the masks to -inf, [num_seqs, vocab_size], in place."""
    bits = np.invert(np.stack(list(masks.values())))
    is_out = np.unpackbits(bits, axis=1, count=scores.shape[1], bitorder="little")
    (of_rows,) = to_device([is_out.view(np.bool_)], scores.device)
    for row, of_row in zip(masks, of_rows, strict=True):
        scores[row].masked_fill_(of_row, -math.inf)


def _top_k(params: SamplingParams, vocab_size: int) -> float:
    return params.top_k if 0 < params.top_k < vocab_size else math.inf


def _top_p(params: SamplingParams) -> float:
    return max(params.top_p, _MIN_TOP_P) if params.top_p < 1 else math.inf


def _is_drawn(params: SamplingParams, kind: _Kind, vocab_size: int) -> bool:
    if _top_k(params, vocab_size) < math.inf:
        own = _Kind.BY_RANK
    elif params.top_p < 1 or params.min_p > 0:
        own = _Kind.BY_SHARE
    else:
        own = _Kind.FREELY
    return own is kind and not params.is_greedy
