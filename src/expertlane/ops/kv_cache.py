"""Paged keys and values of a data-parallel rank's sequences, and what of them a batch reads."""

from collections.abc import Iterator
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.schedule.plan import Batch

_FEW_BLOCKS = 8  # below this width another call costs more than the padding it saves


class KVCache:
    """One layer's cache: blocks of `block_size` positions, [num_blocks, heads, block_size, dim].

    In a block each head's keys, and its values, lie side by side: attention reads them in order.
    A slot is a position's place, block × block_size + offset. With latent attention the one
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
        shape = (num_blocks, num_local_heads, block_size)
        # Zeros: a padded place is masked, but what is masked must still be a number.
        self.keys = _zeros((*shape, key_dim), dtype, device)
        self.values = _zeros((*shape, value_dim), dtype, device)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Self:
        """One that lies in given tensors, [num_blocks, heads, block_size, dim]."""
        cache = cls.__new__(cls)
        cache.keys, cache.values = keys, values
        return cache

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values together."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one sequence."""
        width = self.keys.shape[-1] + self.values.shape[-1]
        return self.num_heads * width * self.keys.itemsize

    @property
    def num_heads(self) -> int:
        """Key and value heads that this rank holds."""
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        """Positions of a block."""
        return self.keys.shape[2]

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
        blocks, offsets = slots // self.block_size, slots % self.block_size
        self.keys[blocks, :, offsets] = keys
        if values.shape[-1]:
            self.values[blocks, :, offsets] = values

    def keys_at(self, slots: Tensor) -> Tensor:
        """[num_slots, num_local_heads, key_dim]."""
        return self.keys[slots // self.block_size, :, slots % self.block_size]

    def read(self, block_tables: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Gather the first positions of some sequences.

        Args:
            block_tables: [num_seqs, num_blocks_per_seq].

        Returns:
            keys, values: [num_seqs, num_local_heads, num_positions, key_dim or value_dim].
        """
        num_seqs, width = block_tables.shape
        heads = torch.arange(self.num_heads, device=block_tables.device)[:, None]
        parts = (block_tables[:, None] * self.num_heads + heads).flatten()  # by sequence, then head

        def gather(paged: Tensor) -> Tensor:
            of_heads = paged.flatten(0, 1).index_select(0, parts)
            shape = num_seqs, self.num_heads, width * self.block_size, paged.shape[-1]
            return of_heads.view(shape)[:, :, :num_positions]

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


class AttentionBounds(NamedTuple):
    """What a launch of attention depends on, beside numbers of tokens and of sequences.

    Attributes:
        most_new: new tokens of a sequence, at most.
        longest: positions of a sequence, at most, the new ones included.
        is_decode: token i is the one new token of sequence i.
    """

    most_new: int
    longest: int
    is_decode: bool


class PagedBatch:
    """Where a batch's tokens stand in their sequences and in the cache; the same in all layers.

    Each property is made when it is first asked for: backends need different ones.

    Attributes:
        places: all of it as `ops.step.AttentionPart` takes it, once that has made it.
    """

    places: Any = None

    def __init__(self, batch: Batch, block_size: int, device: torch.device) -> None:
        self.batch, self.block_size, self._device = batch, block_size, device

    @cached_property
    def positions(self) -> Tensor:
        """[num_tokens]; the position of each token in its sequence."""
        return torch.from_numpy(self._positions).to(self._device)

    @cached_property
    def slots(self) -> Tensor:
        """[num_tokens]; where the cache keeps each token's keys and values."""
        seqs = np.repeat(np.arange(self.batch.num_seqs), self.batch.num_scheduled_tokens)
        return self._slots_of(seqs, self._positions)

    @cached_property
    def cached_slots(self) -> Tensor:
        """[num_cached]; where the positions before the new tokens are, sequence after sequence."""
        cached = self.batch.num_computed_tokens
        positions = np.arange(cached.sum()) - np.repeat(np.cumsum(cached) - cached, cached)
        return self._slots_of(np.repeat(np.arange(self.batch.num_seqs), cached), positions)

    def _slots_of(self, seqs: npt.NDArray[np.intp], positions: npt.NDArray[np.int64]) -> Tensor:
        blocks = self.batch.block_tables[seqs, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        return torch.from_numpy(slots).to(self._device)

    @cached_property
    def begun_blocks(self) -> Tensor:
        """Blocks that the batch begins and does not fill.

        What another sequence left there is masked, but where it was NaN, masked is not enough.
        """
        batch, size = self.batch, self.block_size
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens
        last = ends // size
        is_begun = (ends % size > 0) & (batch.num_computed_tokens <= last * size)
        seqs = np.flatnonzero(is_begun)
        blocks = batch.block_tables[seqs, last[seqs]].astype(np.int64)
        return torch.from_numpy(blocks).to(self._device)

    @cached_property
    def _positions(self) -> npt.NDArray[np.int64]:
        batch = self.batch
        scheduled = batch.num_scheduled_tokens
        if batch.num_tokens == batch.num_seqs:
            return batch.num_computed_tokens
        before = batch.num_computed_tokens - (np.cumsum(scheduled) - scheduled)
        positions: npt.NDArray[np.int64] = np.repeat(before, scheduled)
        return positions + np.arange(batch.num_tokens)

    @cached_property
    def groups(self) -> list[AttentionGroup]:
        """The batch's sequences, put together where attention can take them as one."""
        return attention_groups(self.batch, self.block_size, self._device)

    @cached_property
    def bounds(self) -> AttentionBounds:
        """Of this batch's own sizes."""
        batch = self.batch
        if not batch.num_seqs:
            return AttentionBounds(0, 0, is_decode=False)
        most_new = int(batch.num_scheduled_tokens.max())
        longest = int((batch.num_computed_tokens + batch.num_scheduled_tokens).max())
        is_decode = most_new == 1 and batch.num_tokens == batch.num_seqs
        return AttentionBounds(most_new, longest, is_decode)

    @cached_property
    def sequences(self) -> PagedSequences:
        """The batch's sequences one by one, in one transfer to the device."""
        batch = self.batch
        columns = (
            batch.block_tables,
            np.cumsum(batch.num_scheduled_tokens) - batch.num_scheduled_tokens,
            batch.num_scheduled_tokens,
            batch.num_computed_tokens + batch.num_scheduled_tokens,
        )
        parts = [np.asarray(each, dtype=np.int64) for each in columns]
        on_device = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        pieces = torch.split(on_device.to(self._device), [part.size for part in parts])
        return PagedSequences(*(x.view(y.shape) for x, y in zip(pieces, parts, strict=True)))
