"""Sequences of a batch that torch's attention takes as one, padded to one length."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.schedule.plan import Batch

_FEW_BLOCKS = 8  # below this width another call costs more than the padding it saves


class AttentionGroup:
    """Sequences of a batch with equally many new tokens.

    Attributes:
        tokens: their new tokens among the batch's, sequence after sequence.
        num_seqs, num_scheduled: sequences, and new tokens of each.
        num_positions: the most positions that any of them has, the new ones included.
        is_fresh: nothing is cached of any, so the new keys and values are all there are.
        block_tables: [num_seqs, num_blocks_per_seq]; rows are padded with the sequence's
            own first block: what is masked must not come from another sequence, if ever it is NaN.

    Args:
        seqs: the group's sequences in the batch.
        first_tokens: [num_seqs]; where each begins among the batch's tokens.
    """

    def __init__(
        self,
        batch: Batch,
        seqs: npt.NDArray[np.intp],
        first_tokens: npt.NDArray[np.int64],
        block_size: int,
        device: torch.device,
    ) -> None:
        self.num_seqs = len(seqs)
        self.num_scheduled = int(batch.num_scheduled_tokens[seqs[0]])
        self._computed = batch.num_computed_tokens[seqs]
        self.num_positions = int(self._computed.max()) + self.num_scheduled
        self.is_fresh = self.num_scheduled > 1 and not self._computed.any()
        tokens = first_tokens[:, None] + np.arange(self.num_scheduled)
        self.tokens = torch.from_numpy(tokens.reshape(-1)).to(device)
        width = -(-self.num_positions // block_size)
        tables = batch.block_tables[seqs, :width]
        tables = np.where(tables < 0, tables[:, :1], tables).astype(np.int64)
        self.block_tables = torch.from_numpy(tables).to(device)
        self._device = device
        self._masks: dict[tuple[int | None, torch.dtype], Tensor | None] = {}

    def is_causal(self, window: int | None) -> bool:
        """Whether plain causality says what each token sees: no mask is needed."""
        return self.is_fresh and (window is None or window >= self.num_positions)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What each new token may see, as addends to the logits: 0 or -inf.

        Args:
            window: how many latest positions a token sees, its own among them; None for all.

        Returns:
            [num_seqs, 1, num_scheduled, num_positions], its first size 1 if it is the same for
            all sequences; None if every token sees everything.
        """
        key = (window, dtype)
        if key not in self._masks:
            self._masks[key] = self._mask(window, dtype)
        return self._masks[key]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        computed = self._computed
        if (computed == computed[0]).all():
            computed = computed[:1]
        own = computed[:, None] + np.arange(self.num_scheduled)  # the tokens' own positions
        positions = np.arange(self.num_positions)
        visible = positions <= own[..., None]
        if window is not None:
            visible &= positions > own[..., None] - window
        if visible.all():
            return None
        mask = torch.zeros(visible.shape, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(~visible), -torch.inf)
        return mask[:, None].to(self._device)

    def by_head(self, x: Tensor) -> Tensor:
        """[num_seqs, num_heads, num_scheduled, …] of the group's tokens [num_tokens, heads, …]."""
        return x.view(self.num_seqs, self.num_scheduled, *x.shape[1:]).transpose(1, 2)


def attention_groups(batch: Batch, block_size: int, device: torch.device) -> list[AttentionGroup]:
    """The batch's sequences in few groups.

    Those with one new token go by the width of their block tables, to powers of two, so that less
    than half of what is gathered is padding. Longer chunks go with those of equal lengths.
    """
    if not batch.num_seqs:
        return []
    first_tokens = np.cumsum(batch.num_scheduled_tokens) - batch.num_scheduled_tokens
    return [
        AttentionGroup(batch, seqs, first_tokens[seqs], block_size, device)
        for seqs in _equal_sequences(batch, block_size)
    ]


def _equal_sequences(batch: Batch, block_size: int) -> Iterator[npt.NDArray[np.intp]]:
    scheduled, computed = batch.num_scheduled_tokens, batch.num_computed_tokens
    width = np.maximum(computed // block_size + 1, _FEW_BLOCKS)
    bucket = np.ceil(np.log2(width)).astype(np.int64)
    keys = np.stack([scheduled, np.where(scheduled == 1, bucket, computed)], axis=1)
    if (keys == keys[0]).all():
        yield np.arange(batch.num_seqs)
        return
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    for number in range(int(group.max()) + 1):
        yield np.flatnonzero(group == number)
