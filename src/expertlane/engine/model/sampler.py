"""Chooses the next tokens of a rank's sequences, by the sampling parameters of each request."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.model.draw import likeliest
from expertlane.engine.model.sampled_batch import ChosenLogprobs, SampledBatch, SampledSequence
from expertlane.spec.sampling import SamplingState, TokenLogprobs

_CACHED_VALUES = 1 << 18  # logits a CPU works on at a time; several times as fast as on millions


@dataclass(eq=False)
class _Admitted:
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

    before: dict[int, _Admitted | None]
    masks: Mapping[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    chosen: list[tuple[list[_Admitted | None], list[int]]] = field(default_factory=list)


class Sampled:
    """Tokens that were chosen, and their log-probabilities, on the device of the logits.

    Args:
        step: records the tokens when they are read.

    Attributes:
        tensors: to be copied to the host, and given to `read`.
    """

    def __init__(self, step: SamplerStep) -> None:
        self._step = step
        self._parts: list[tuple[list[int], list[_Admitted | None], ChosenLogprobs | None]] = []
        self.tensors: list[Tensor] = []

    def add(
        self,
        token_ids: Tensor,
        seq_ids: list[int],
        sequences: list[_Admitted | None],
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
        self._admitted: dict[int, _Admitted] = {}
        # Batches recur step after step. No sequence is in two: the batch has its changing state.
        self._batches: dict[tuple[int, ...], tuple[list[_Admitted | None], SampledBatch]] = {}
        self._step = SamplerStep({})

    def samples_any(self, seq_ids: Iterable[int]) -> bool:
        """Whether any of these sequences is sampled, not plainly greedy."""
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
        self._admitted |= {seq_id: _Admitted(state) for seq_id, state in admitted.items()}
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

    def sample(self, seq_ids: list[int], logits: Tensor) -> "Sampled":
        """Choose the next token of each sequence, and count it as output.

        Args:
            seq_ids: [num_seqs]; none twice.
            logits: [num_seqs, vocab_size] float32; some may be -inf.
        """
        sampled = Sampled(self._step)
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

    def _batch(self, seq_ids: tuple[int, ...]) -> tuple[list[_Admitted | None], SampledBatch]:
        if seq_ids not in self._batches:
            self._drop_batches(seq_ids)
            admitted = [self._admitted.get(seq_id) for seq_id in seq_ids]
            sequences = [None if each is None else self._sequence(each) for each in admitted]
            batch = SampledBatch(sequences, self._vocab_size, self._device)
            self._batches[seq_ids] = admitted, batch
        return self._batches[seq_ids]

    def _sequence(self, admitted: _Admitted) -> SampledSequence:
        if admitted.sequence is None:
            state = admitted.as_committed()
            admitted.sequence = SampledSequence(state, self._vocab_size, self._device)
        return admitted.sequence

    def _drop_batches(self, seq_ids: Iterable[int]) -> None:
        members = set(seq_ids)
        for key in [key for key in self._batches if not members.isdisjoint(key)]:
            del self._batches[key]
