"""Chooses the next tokens of the sequences a rank finishes, each as its request asks."""

from collections.abc import Iterable

import torch
from torch import Tensor

from expertlane.model.draw import likeliest
from expertlane.model.sampled_batch import SampledBatch, SampledSequence
from expertlane.spec.sampling import SamplingState, TokenLogprobs

_CACHED_VALUES = 1 << 18  # logits a CPU works on at a time; several times as fast as on millions


class Sampler:
    """Samples the sequences it was told of; all others are greedy.

    The draw of a request's token number i depends on its seed and i alone.

    Args:
        vocab_size: of the model.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._states: dict[int, SamplingState] = {}
        # Made when a sequence is first sampled: only one of the ranks that are told of it does.
        self._sequences: dict[int, SampledSequence] = {}
        # Batches come again step after step. No sequence is in two: the batch has what changes.
        self._batches: dict[tuple[int, ...], SampledBatch] = {}

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._states

    def admit(self, seq_id: int, state: SamplingState) -> None:
        """Sample a sequence so from now on, whatever was known of it before."""
        self.forget([seq_id])
        self._states[seq_id] = state

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop what is known of sequences; unknown ones are passed over."""
        forgotten = list(seq_ids)
        for seq_id in forgotten:
            self._states.pop(seq_id, None)
            self._sequences.pop(seq_id, None)
        self._drop_batches(forgotten)

    def forget_all(self) -> None:
        """Know no sequence."""
        self.forget(list(self._states))

    def sample(
        self, seq_ids: list[int], logits: Tensor
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """The next token of each sequence, which is counted as part of its output.

        Args:
            seq_ids: [num_seqs]; none twice.
            logits: [num_seqs, vocab_size] float32; some may be -inf.

        Returns:
            The token ids, [num_seqs], `NO_TOKEN` where the greatest logit is not finite; and the
            log-probabilities by sequence id where asked for.
        """
        if self._states.keys().isdisjoint(seq_ids):
            return likeliest(logits).tolist(), {}
        token_ids: list[int] = []
        logprobs: dict[int, TokenLogprobs] = {}
        for part in self._parts(len(seq_ids)):
            own_ids, own_logits = seq_ids[part], logits[part]
            batch = self._batch(tuple(own_ids))
            chosen = batch.choose(own_logits)
            token_ids += chosen.tolist()
            for row, found in batch.logprobs(own_logits, chosen):
                logprobs[own_ids[row]] = found
        return token_ids, logprobs

    def _parts(self, num_seqs: int) -> list[slice]:
        step = num_seqs
        if self._device.type == "cpu":
            step = max(1, _CACHED_VALUES // self._vocab_size)
        return [slice(start, start + step) for start in range(0, num_seqs, step)]

    def _batch(self, seq_ids: tuple[int, ...]) -> SampledBatch:
        if seq_ids not in self._batches:
            self._drop_batches(seq_ids)
            sequences = [self._sequence(seq_id) for seq_id in seq_ids]
            self._batches[seq_ids] = SampledBatch(sequences, self._vocab_size, self._device)
        return self._batches[seq_ids]

    def _sequence(self, seq_id: int) -> SampledSequence | None:
        if seq_id not in self._sequences and seq_id in self._states:
            state = self._states[seq_id]
            self._sequences[seq_id] = SampledSequence(state, self._vocab_size, self._device)
        return self._sequences.get(seq_id)

    def _drop_batches(self, seq_ids: Iterable[int]) -> None:
        members = set(seq_ids)
        for key in [key for key in self._batches if not members.isdisjoint(key)]:
            del self._batches[key]
