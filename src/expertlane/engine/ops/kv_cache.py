"""The paged KV cache of a data-parallel rank, and the indices with which a batch reads it."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.ops.device import Array, to_device
from expertlane.engine.ops.float8 import from_float8, to_float8
from expertlane.schedule.plan import Batch


class KVCache:
    """One layer's cache: blocks of `block_size` positions, [num_blocks, heads, block_size, dim].

    In a block each head's keys, and its values, lie side by side: attention reads them in order.
    A slot is the index of a position in the cache, block × block_size + offset. With latent
    attention the one head's key is the latent and the rotated part; its value is the latent, a part
    of the key, so it is not stored again (`value_dim` 0).

    Attributes:
        dtype: dtype of keys and values as they are written and read.
        keys, values: as stored: of `dtype`, or uint8 (the bits of float8) if `is_float8`.
        key_scales, value_scales: None unless `is_float8`: [num_blocks, heads, block_size, 1] uint8,
            see `ops.float8`; the last size is 0 where there are no values.
    """

    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_local_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_float8: bool = False,
    ) -> None:
        self.dtype = dtype
        shape = (num_blocks, num_local_heads, block_size)
        stored = torch.uint8 if is_float8 else dtype
        # Zeros: a padded place is masked, but what is masked must still be a number.
        self.keys = _zeros((*shape, key_dim), stored, device)
        self.values = _zeros((*shape, value_dim), stored, device)
        if is_float8:
            self.key_scales = _zeros((*shape, min(1, key_dim)), stored, device)
            self.value_scales = _zeros((*shape, min(1, value_dim)), stored, device)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Self:
        """A cache in given tensors [num_blocks, heads, block_size, dim]."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.dtype = keys, values, keys.dtype
        return cache

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values together, with their scales."""
        return sum(each.nbytes for each in self._tensors)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one sequence."""
        row_bytes = sum(each.shape[-1] * each.itemsize for each in self._tensors)
        return self.num_heads * row_bytes

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys, values, and the scales of both, which are None unless the cache is float8."""
        return self.keys, self.values, self.key_scales, self.value_scales

    @property
    def _tensors(self) -> list[Tensor]:
        return [each for each in self.parts if each is not None]

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
            for each in self._tensors:
                each.index_fill_(0, blocks, 0)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens' keys and values.

        Args:
            slots: [num_tokens].
            keys, values: [num_tokens, num_local_heads, key_dim or value_dim].

        Returns:
            keys and values as they will be read: rounded if the cache is float8.
        """
        stored = self.store(slots, keys, values, to_float8)
        if self.key_scales is None:
            return keys, values
        rounded_keys, rounded_values = (
            from_float8(rows, scales, self.dtype) for rows, scales in stored
        )
        return rounded_keys, rounded_values

    def store(
        self,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        narrow: Callable[[Tensor], Sequence[Tensor]],
    ) -> list[Sequence[Tensor]]:
        """Store new tokens' keys and values; return both as stored, with their scales.

        Args:
            slots, keys, values: see `write`.
            narrow: rounds rows to float8, as `to_float8` does.
        """
        blocks, offsets = slots // self.block_size, slots % self.block_size
        stored: list[Sequence[Tensor]] = []
        for pages, rows in ((self.parts[::2], keys), (self.parts[1::2], values)):
            is_wide = pages[1] is None or not rows.shape[-1]
            stored.append((rows, rows) if is_wide else narrow(rows))
            for page, part in zip(pages, stored[-1], strict=True):
                if page is not None and rows.shape[-1]:
                    page.transpose(1, 2).index_put_((blocks, offsets), part)
        return stored

    def keys_at(self, slots: Tensor) -> Tensor:
        """Keys [num_slots, num_local_heads, key_dim] at some slots."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        keys = self.keys[blocks, :, offsets]
        if self.key_scales is None:
            return keys
        return from_float8(keys, self.key_scales[blocks, :, offsets], self.dtype)

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

        keys, values = gather(self.keys), gather(self.values)
        if self.key_scales is None or self.value_scales is None:
            return keys, values
        return (
            from_float8(keys, gather(self.key_scales), self.dtype),
            from_float8(values, gather(self.value_scales), self.dtype),
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, pages that take no memory until something is written to them."""
    if device.type != "cpu" or not prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


class AttentionParams(NamedTuple):
    """Parameters of a layer's attention that do not depend on the batch.

    Attributes:
        value_dim: width of a head's value; with latent attention, of the key's first part.
        scale: factor of the logits.
        window: how many latest positions a token sees; None for all.
        sinks: [num_heads] float32; logits that count in the softmax's sum alone.
    """

    value_dim: int
    scale: float
    window: int | None = None
    sinks: Tensor | None = None


class PagedSequences(NamedTuple):
    """Block tables and lengths of a batch's sequences; all int64.

    Attributes:
        block_tables: [num_seqs, num_blocks_per_seq].
        first_tokens: [num_seqs]; index in the batch of each sequence's first new token.
        num_scheduled: [num_seqs]; new tokens of each.
        lengths: [num_seqs]; positions of each, the new ones included.
    """

    block_tables: Tensor
    first_tokens: Tensor
    num_scheduled: Tensor
    lengths: Tensor


class AttentionBounds(NamedTuple):
    """Bounds of a batch's sequences that decide the grid of an attention kernel.

    Nothing else does, but for the numbers of tokens and of sequences.

    Attributes:
        most_new: the most new tokens of a sequence.
        longest: the most positions of a sequence, the new ones included.
        is_decode: token i is the one new token of sequence i.
    """

    most_new: int
    longest: int
    is_decode: bool


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


class PagedBatch:
    """Positions, slots and block tables of a batch's tokens, for attention of all layers.

    Each property is computed when it is first asked for: backends need different ones.

    Attributes:
        places: the structure that `ops.step.AttentionPart` makes of them and keeps here.
    """

    places: Any = None

    def __init__(self, batch: Batch, block_size: int, device: torch.device) -> None:
        self.batch, self.block_size, self._device = batch, block_size, device

    def columns(self) -> list[Array]:
        """The arrays that our kernels on a GPU read, for `take`; the widest last."""
        tables, *of_seqs = self._of_sequences()
        return [self._positions, self._slots, *of_seqs, tables]

    def take(self, columns: Sequence[Tensor]) -> None:
        """Take the arrays of `columns` that were copied to the device."""
        self.positions, self.slots, *of_seqs, tables = columns
        self.sequences = PagedSequences(tables, *of_seqs)

    @cached_property
    def positions(self) -> Tensor:
        """[num_tokens]; each token's position in its sequence."""
        return self._put(self._positions)

    @cached_property
    def slots(self) -> Tensor:
        """[num_tokens]; the cache's slot for each token's keys and values."""
        return self._put(self._slots)

    @cached_property
    def cached_slots(self) -> Tensor:
        """[num_cached]; slots of the positions before the new tokens, sequence after sequence."""
        cached = self.batch.num_computed_tokens
        positions = np.arange(cached.sum()) - np.repeat(np.cumsum(cached) - cached, cached)
        return self._put(
            self._slots_of(np.repeat(np.arange(self.batch.num_seqs), cached), positions)
        )

    def _put(self, array: Array) -> Tensor:
        return to_device([array], self._device)[0]

    @property
    def _slots(self) -> Array:
        seqs = np.repeat(np.arange(self.batch.num_seqs), self.batch.num_scheduled_tokens)
        return self._slots_of(seqs, self._positions)

    def _slots_of(self, seqs: npt.NDArray[np.intp], positions: npt.NDArray[np.int64]) -> Array:
        blocks = self.batch.block_tables[seqs, positions // self.block_size].astype(np.int64)
        slots: Array = blocks * self.block_size + positions % self.block_size
        return slots

    @cached_property
    def begun_blocks(self) -> Tensor:
        """Blocks that the batch begins and does not fill; they must be zeroed.

        Positions left there by another sequence are masked, but a masked NaN would still spread.
        """
        batch, size = self.batch, self.block_size
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens
        last = ends // size
        is_begun = (ends % size > 0) & (batch.num_computed_tokens <= last * size)
        seqs = np.flatnonzero(is_begun)
        return self._put(batch.block_tables[seqs, last[seqs]].astype(np.int64))

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
        """The batch's sequences in groups, each of which one call of attention takes."""
        return attention_groups(self.batch, self.block_size, self._device)

    @cached_property
    def bounds(self) -> AttentionBounds:
        """The bounds of this batch's sequences."""
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
        return PagedSequences(*to_device(self._of_sequences(), self._device))

    def _of_sequences(self) -> list[Array]:
        """Columns of `PagedSequences`."""
        batch = self.batch
        columns = (
            batch.block_tables,
            np.cumsum(batch.num_scheduled_tokens) - batch.num_scheduled_tokens,
            batch.num_scheduled_tokens,
            batch.num_computed_tokens + batch.num_scheduled_tokens,
        )
        return [np.ascontiguousarray(each, dtype=np.int64) for each in columns]
