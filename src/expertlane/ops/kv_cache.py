"""Paged keys and values of a data-parallel rank's sequences, and where a batch's tokens are."""

from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.ops.attention_group import AttentionGroup, attention_groups
from expertlane.schedule.plan import Batch


class KVCache:
    """Of one layer: blocks of `block_size` positions, [num_blocks, block_size, heads, dim].

    A slot is a position's place in it, block × block_size + offset. With latent attention the one
    head's key is the latent and the rotated part; its value is the latent, a part of the key, so
    it is not stored again (`value_dim` 0).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_local_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, num_local_heads)
        # Zeros: a padded place is masked, but what is masked must still be a number.
        self.keys = _zeros((*shape, key_dim), dtype, device)
        self.values = _zeros((*shape, value_dim), dtype, device)

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def position_bytes(self) -> int:
        """Of one position of one sequence."""
        width = self.keys.shape[-1] + self.values.shape[-1]
        return int(self.keys.shape[2] * width * self.keys.itemsize)

    def clear(self, blocks: Tensor) -> None:
        """Zero some blocks."""
        if len(blocks):
            self.keys.index_fill_(0, blocks, 0)
            self.values.index_fill_(0, blocks, 0)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store new tokens' keys and values.

        Args:
            slots: [num_tokens].
            keys, values: [num_tokens, num_local_heads, key_dim or value_dim].
        """
        self.keys.flatten(0, 1).index_copy_(0, slots, keys)
        if values.shape[-1]:
            self.values.flatten(0, 1).index_copy_(0, slots, values)

    def read(self, block_tables: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Gather the first positions of some sequences.

        Args:
            block_tables: [num_seqs, num_blocks_per_seq].

        Returns:
            keys, values: [num_seqs, num_local_heads, num_positions, key_dim or value_dim].
        """

        num_seqs, width = block_tables.shape

        def gather(paged: Tensor) -> Tensor:
            blocks = paged.index_select(0, block_tables.flatten())
            of_seqs = blocks.view(num_seqs, width * paged.shape[1], *paged.shape[2:])
            return of_seqs[:, :num_positions].transpose(1, 2)

        return gather(self.keys), gather(self.values)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, pages that take no memory until something is written to them."""
    if device.type != "cpu" or not prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


class AttentionParams(NamedTuple):
    """What a layer's attention is, whatever the batch.

    Attributes:
        value_dim: of a head's value; with latent attention, that many first ones of the key.
        scale: of the logits.
        window: the latest positions seen; None for all.
        sinks: [num_heads] float32; logits that take part in the softmax's sum alone.
    """

    value_dim: int
    scale: float
    window: int | None = None
    sinks: Tensor | None = None


class PagedSequences(NamedTuple):
    """Where sequences' new tokens are, and their blocks; all int64.

    Attributes:
        block_tables: [num_seqs, num_blocks_per_seq].
        first_tokens: [num_seqs]; where the new tokens of each begin.
        num_scheduled: [num_seqs]; how many new tokens each has.
        lengths: [num_seqs]; positions of each, the new ones included.
    """

    block_tables: Tensor
    first_tokens: Tensor
    num_scheduled: Tensor
    lengths: Tensor


class PagedBatch:
    """Where a batch's tokens stand in their sequences and in the cache; the same in all layers.

    Each property is made when it is first asked for: backends need different ones.
    """

    def __init__(self, batch: Batch, block_size: int, device: torch.device) -> None:
        self._batch, self._block_size, self._device = batch, block_size, device

    @cached_property
    def positions(self) -> Tensor:
        """[num_tokens]; the position of each token in its sequence."""
        return torch.from_numpy(self._positions).to(self._device)

    @cached_property
    def slots(self) -> Tensor:
        """[num_tokens]; where the cache keeps each token's keys and values."""
        batch, size = self._batch, self._block_size
        seqs = np.repeat(np.arange(batch.num_seqs), batch.num_scheduled_tokens)
        blocks = batch.block_tables[seqs, self._positions // size]
        slots = blocks.astype(np.int64) * size + self._positions % size
        return torch.from_numpy(slots).to(self._device)

    @cached_property
    def begun_blocks(self) -> Tensor:
        """Blocks that the batch begins and does not fill.

        What another sequence left there is masked, but where it was NaN, masked is not enough.
        """
        batch, size = self._batch, self._block_size
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens
        last = ends // size
        is_begun = (ends % size > 0) & (batch.num_computed_tokens <= last * size)
        seqs = np.flatnonzero(is_begun)
        blocks = batch.block_tables[seqs, last[seqs]].astype(np.int64)
        return torch.from_numpy(blocks).to(self._device)

    @cached_property
    def _positions(self) -> npt.NDArray[np.int64]:
        batch = self._batch
        scheduled = batch.num_scheduled_tokens
        if batch.num_tokens == batch.num_seqs:
            return batch.num_computed_tokens
        before = batch.num_computed_tokens - (np.cumsum(scheduled) - scheduled)
        positions: npt.NDArray[np.int64] = np.repeat(before, scheduled)
        return positions + np.arange(batch.num_tokens)

    @cached_property
    def groups(self) -> list[AttentionGroup]:
        """The batch's sequences, put together where attention can take them as one."""
        return attention_groups(self._batch, self._block_size, self._device)

    @cached_property
    def sequences(self) -> PagedSequences:
        """The batch's sequences one by one."""
        batch = self._batch
        ends = np.cumsum(batch.num_scheduled_tokens)
        columns = (
            batch.block_tables.astype(np.int64),
            ends - batch.num_scheduled_tokens,
            batch.num_scheduled_tokens,
            batch.num_computed_tokens + batch.num_scheduled_tokens,
        )
        return PagedSequences(*(torch.from_numpy(np.ascontiguousarray(c)) for c in columns))
