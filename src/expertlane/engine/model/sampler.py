"""Chooses the next tokens of a rank's sequences, by the sampling parameters of each request.

Sequences of a step are sampled together, with their parameters in common tensors (`SampledBatch`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.model.draw import (
    draw,
    keep_likeliest,
    probabilities,
    token_logprobs,
    uniform_numbers,
)
from expertlane.engine.model.head import NO_TOKEN, ChosenLogprobs, likeliest
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.device import to_device
from expertlane.spec.sampling import SamplingParams, SamplingState, TokenLogprobs

_FLOAT32 = torch.finfo(torch.float32)
_CACHED_VALUES = 1 << 18  # logits a CPU works on at a time; several times as fast as on millions
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

        self._penalties = [
            kind(group) for kind, belongs in _PENALTIES.items() if (group := members(belongs))
        ]
        # In groups by the limits they need, so that none pays for limits of others.
        drawn = [members(partial(_is_drawn, kind, vocab_size)) for kind in _Kind]
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

    def logprobs(self, logits: Tensor, token_ids: Tensor) -> ChosenLogprobs | None:
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


_Penalty = _LogitBias | _RepetitionPenalty | _OutputPenalty | _HeldStops
_PENALTIES: dict[Callable[[_Members], _Penalty], Callable[[SamplingParams], bool]] = {
    _LogitBias: lambda params: bool(params.logit_bias),
    _RepetitionPenalty: lambda params: params.repetition_penalty != 1,
    _OutputPenalty: lambda params: params.counts_output,
    _HeldStops: lambda params: params.holds_stops,
}


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


def _is_drawn(kind: _Kind, vocab_size: int, params: SamplingParams) -> bool:
    if _top_k(params, vocab_size) < math.inf:
        own = _Kind.BY_RANK
    elif params.top_p < 1 or params.min_p > 0:
        own = _Kind.BY_SHARE
    else:
        own = _Kind.FREELY
    return own is kind and not params.is_greedy


@dataclass(eq=False)
class _TrackedSequence:
    """A sequence as it was admitted, and its committed tokens since.

    Attributes:
        sequence: its sampling state, tokens that are not committed included; made when a token is
            sampled.
    """

    state: SamplingState
    token_ids: list[int] = field(default_factory=list)
    sequence: SampledSequence | None = None

    def as_committed(self) -> SamplingState:
        """The state at admission, with the committed tokens since added to its output."""
        output = np.concatenate((self.state.output_token_ids, np.array(self.token_ids, np.int64)))
        return replace(self.state, output_token_ids=output)


@dataclass(eq=False)
class SamplerStep:
    """The changes of a step, which `Sampler.undo` takes back.

    Attributes:
        before: earlier states of sequences that it released or admitted; None of unknown ones.
        masks: by sequence id; see `plan.StepPlan.masks`.
        chosen: sequences, None for those that are not sampled, and their tokens.
    """

    before: dict[int, _TrackedSequence | None]
    masks: Mapping[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    chosen: list[tuple[list[_TrackedSequence | None], list[int]]] = field(default_factory=list)


class SampledTokens:
    """Tokens that were chosen, and their log-probabilities, on the device of the logits.

    Args:
        step: records the tokens when they are read.

    Attributes:
        tensors: to be copied to the host, and given to `read`.
    """

    def __init__(self, step: SamplerStep) -> None:
        self._step = step
        self._parts: list[
            tuple[list[int], list[_TrackedSequence | None], ChosenLogprobs | None]
        ] = []
        self.tensors: list[Tensor] = []

    def add(
        self,
        token_ids: Tensor,
        seq_ids: list[int],
        sequences: list[_TrackedSequence | None],
        logprobs: ChosenLogprobs | None,
    ) -> None:
        """Add the tokens of the next sequences.

        Args:
            token_ids: [num].
            seq_ids: [num].
            sequences: [num]; empty where none of them is sampled.
            logprobs: log-probabilities of the sequences that ask for them.
        """
        self._parts.append((seq_ids, sequences, logprobs))
        self.tensors.append(token_ids)
        if logprobs is not None:
            self.tensors += logprobs.columns

    def read(self, arrived: Iterator[Tensor]) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Read the tokens on the host, and record them in the step.

        Args:
            arrived: tensors on the host; the first are `tensors`, which are taken from it.

        Returns:
            The token ids, [num_seqs], `NO_TOKEN` where the greatest logit is not finite; and the
            log-probabilities by sequence id where asked for.
        """
        token_ids: list[int] = []
        found: dict[int, TokenLogprobs] = {}
        for seq_ids, sequences, logprobs in self._parts:
            of_part: list[int] = next(arrived).tolist()
            token_ids += of_part
            if sequences:
                self._step.chosen.append((sequences, of_part))
            if logprobs is not None:
                for row, each in logprobs.read(of_part, arrived):
                    found[seq_ids[row]] = each
        return token_ids, found


class Sampler:
    """Samples the sequences that were admitted here; all others are greedy.

    The random number for a request's token number i depends on its seed and i alone.

    Args:
        vocab_size: the model's number of token ids.
        device: device of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._admitted: dict[int, _TrackedSequence] = {}
        # Batches recur step after step. No sequence is in two: the batch has its changing state.
        self._batches: dict[
            tuple[int, ...], tuple[list[_TrackedSequence | None], SampledBatch]
        ] = {}
        self._step = SamplerStep({})

    def samples_any(self, seq_ids: Iterable[int]) -> bool:
        """True if any of these sequences is sampled, not plainly greedy."""
        return not self._admitted.keys().isdisjoint(seq_ids)

    def state(self, seq_id: int) -> SamplingState | None:
        """The state of a sequence at its admission; None of a greedy one."""
        admitted = self._admitted.get(seq_id)
        return None if admitted is None else admitted.state

    def begin_step(
        self,
        released: Iterable[int] = (),
        admitted: Mapping[int, SamplingState] | None = None,
        masks: Mapping[int, npt.NDArray[np.uint8]] | None = None,
    ) -> SamplerStep:
        """Begin a step, which is later committed in order, or undone, the newest first.

        Args:
            released: sequences to forget first; unknown ones are ignored.
            admitted: states of sequences to sample from now on; they replace earlier ones.
            masks: by sequence id, the tokens that this step may choose; see `plan.StepPlan.masks`.
        """
        admitted = admitted or {}
        changed = [*released, *admitted]
        before = {seq_id: self._admitted.get(seq_id) for seq_id in changed}
        self._step = SamplerStep(before, masks or {})
        for seq_id in changed:
            self._admitted.pop(seq_id, None)
        self._admitted |= {seq_id: _TrackedSequence(state) for seq_id, state in admitted.items()}
        self._drop_batches(changed)
        return self._step

    def commit(self, step: SamplerStep) -> None:
        """Make the tokens of the oldest step final."""
        for sequences, token_ids in step.chosen:
            for admitted, token_id in zip(sequences, token_ids, strict=True):
                if admitted is not None:
                    admitted.token_ids.append(max(token_id, 0))

    def undo(self, step: SamplerStep) -> None:
        """Take back the newest step."""
        for seq_id, before in step.before.items():
            if before is None:
                self._admitted.pop(seq_id, None)
            else:
                self._admitted[seq_id] = before
        for admitted in self._admitted.values():
            admitted.sequence = None  # it has counted tokens of this step
        self._batches.clear()

    def checksum(self, seq_ids: Iterable[int], of_tensor: Callable[[Tensor], int]) -> int:
        """Checksum of the sampling state of some sequences.

        Args:
            of_tensor: gives the checksum of a tensor.
        """
        counted: list[Any] = []
        for seq_id in seq_ids:
            admitted = self._admitted.get(seq_id)
            if admitted is not None:
                counted.append((seq_id, len(admitted.token_ids), admitted.token_ids[-1:]))
                if (own := admitted.sequence) is not None:
                    counts = own.num_output_tokens, own.num_held, own.repetition, own.counts
                    counted.append((own.seed, *map(of_tensor, counts)))
        return crc32(repr(counted).encode())

    def sample(self, seq_ids: list[int], logits: Tensor) -> SampledTokens:
        """Choose the next token of each sequence, and count it as output.

        Args:
            seq_ids: [num_seqs]; none twice.
            logits: [num_seqs, vocab_size] float32; some may be -inf.
        """
        sampled = SampledTokens(self._step)
        if not self.samples_any(seq_ids):
            sampled.add(likeliest(logits), seq_ids, [], None)
            return sampled
        for part in self._parts(len(seq_ids)):
            own_ids, own_logits = seq_ids[part], logits[part]
            sequences, batch = self._batch(tuple(own_ids))
            chosen = batch.choose(own_logits, self._masks_of(own_ids))
            sampled.add(chosen, own_ids, sequences, batch.logprobs(own_logits, chosen))
        return sampled

    def _masks_of(self, seq_ids: list[int]) -> dict[int, npt.NDArray[np.uint8]]:
        """The step's masks of these sequences, by row."""
        masks = self._step.masks
        if not masks:
            return {}
        return {row: masks[seq_id] for row, seq_id in enumerate(seq_ids) if seq_id in masks}

    def _parts(self, num_seqs: int) -> list[slice]:
        step = num_seqs
        if self._device.type == "cpu":
            step = max(1, _CACHED_VALUES // self._vocab_size)
        return [slice(start, start + step) for start in range(0, num_seqs, step)]

    def _batch(
        self, seq_ids: tuple[int, ...]
    ) -> tuple[list[_TrackedSequence | None], SampledBatch]:
        if seq_ids not in self._batches:
            self._drop_batches(seq_ids)
            admitted = [self._admitted.get(seq_id) for seq_id in seq_ids]
            sequences = [None if each is None else self._sequence(each) for each in admitted]
            batch = SampledBatch(sequences, self._vocab_size, self._device)
            self._batches[seq_ids] = admitted, batch
        return self._batches[seq_ids]

    def _sequence(self, admitted: _TrackedSequence) -> SampledSequence:
        if admitted.sequence is None:
            state = admitted.as_committed()
            admitted.sequence = SampledSequence(state, self._vocab_size, self._device)
        return admitted.sequence

    def _drop_batches(self, seq_ids: Iterable[int]) -> None:
        members = set(seq_ids)
        for key in [key for key in self._batches if not members.isdisjoint(key)]:
            del self._batches[key]
