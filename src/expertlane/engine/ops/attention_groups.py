"""Groups of a batch's sequences that one call of torch's attention takes, padded to one length."""

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
        tokens: indices of the group's new tokens in the batch, sequence after sequence.
        num_seqs, num_scheduled: sequences, and new tokens of each.
        num_positions: the longest sequence's positions, the new ones included.
        is_fresh: no sequence has cached positions (and each has several new tokens), so the new
            keys and values are all that attention reads.
        block_tables: [num_seqs, num_blocks_per_seq]; rows are padded with the sequence's own first
            block, since a masked NaN of another sequence would still spread.

    Args:
        seqs: indices of the group's sequences in the batch.
        first_tokens: [num_seqs]; index of each sequence's first new token in the batch.
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
        """Whether attention is plainly causal over the new tokens alone, so needs no mask."""
        return self.is_fresh and (window is None or window >= self.num_positions)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The mask of attention: addends to the logits, 0 or -inf.

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
        """[num_seqs, num_heads, num_scheduled, …], of the group's tokens [num_tokens, heads, …]."""
        return x.view(self.num_seqs, self.num_scheduled, *x.shape[1:]).transpose(1, 2)


def attention_groups(batch: Batch, block_size: int, device: torch.device) -> list[AttentionGroup]:
    """Divide the batch's sequences into few groups.

    Sequences with one new token are grouped by the width of their block tables, rounded up to a
    power of two, so that less than half of what is gathered is padding. Those with more are grouped
    by equal numbers of new and of cached tokens.
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
