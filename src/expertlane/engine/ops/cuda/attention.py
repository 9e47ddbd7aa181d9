"""Causal attention over the paged cache, of prompts and decode steps in one kernel.

A program takes a tile of query rows of one sequence and one key/value head: its new tokens, and of
each all heads that share the key/value head, so that a key is read once for all of them. It reads
keys and values where they lie in their blocks; nothing is gathered or copied. Of wide heads several
programs have a part of the values each, and all logits. Where tiles are too few for the card,
positions are split over programs, whose partial sums `_combine_kernel` adds up.
What is launched depends on the batch's `bounds` and on numbers of tokens and sequences alone.

Limits: in decode memory, length · kv_heads · (key_dim + value_dim) · b bytes a sequence over the
card's bandwidth (values that are a part of keys are read once); in prompts arithmetic,
2 · pairs · heads · (key_dim + value_dim) FLOPs over its peak.

Sources: the softmax over blocks is that of Milakov & Gimelshein (2018) and Dao et al. (2022), the
split over positions that of Flash-Decoding (Dao et al. 2023); sequences are found as in vLLM's
unified attention: tiles of sequence s begin at ⌊rows before it / rows of a tile⌋ + s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertlane.engine.ops.cuda.float8 import widened
from expertlane.engine.ops.cuda.launch import (
    adjacent,
    architecture,
    launch,
    num_multiprocessors,
    share_of,
    shared_bytes,
)
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch

_LOG2_E = 1.4426950408889634
_LEAST_SPLIT = 256  # positions
_PART = 256  # values of a head of a program that shares it


@triton.jit(do_not_specialize=["table_width", "num_seqs", "num_tokens"])
def _attention_kernel(
    query, keys, values, key_scales, value_scales, tables, first_tokens, num_scheduled, lengths,
    sinks, out, partial, maxima, sums,
    query_token, query_head, key_block, key_head, value_block, value_head,
    table_width, num_seqs, num_tokens, window, scale,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, IS_DECODE: tl.constexpr,
    IS_SPLIT: tl.constexpr, VALUES_IN_KEYS: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, VALUE_PARTS: tl.constexpr,
):  # fmt: skip
    # Tokens of the batch: first to first + new. Rows of the sequence: token · GROUP + head.
    kv_head, split = tl.program_id(1) // VALUE_PARTS, tl.program_id(2)
    num_kv_heads = tl.num_programs(1) // VALUE_PARTS
    column = tl.program_id(1) % VALUE_PARTS * VALUE_BLOCK  # the first of the program's values
    seq, row = _place_of_tile(tl.program_id(0), first_tokens, num_seqs, GROUP, ROWS, IS_DECODE)
    new = tl.load(num_scheduled + seq).to(tl.int32)
    if row >= new * GROUP:
        return
    first, length = tl.load(first_tokens + seq), tl.load(lengths + seq).to(tl.int32)
    rows = row + tl.arange(0, ROWS)
    is_row = rows < new * GROUP
    head = kv_head * GROUP + rows % GROUP
    begin, end = 0, length - new + (tl.minimum(row + ROWS, new * GROUP) - 1) // GROUP + 1
    if HAS_WINDOW:
        begin = tl.maximum(length - new + row // GROUP - window + 1, 0)
    if IS_SPLIT:
        begin, end = share_of(begin, end, split, tl.num_programs(2), POSITIONS)

    of_row = query + (first + rows // GROUP) * query_token + head * query_head
    query_main = _columns_of(of_row, is_row, 0, KEY_DIM, MAIN)
    query_rest = _columns_of(of_row, is_row, MAIN, KEY_DIM, REST) if REST > 0 else query_main
    greatest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None and not IS_SPLIT:
        greatest = tl.load(sinks + head, mask=is_row, other=0.0) * 1.4426950408889634
        total += 1.0
    if key_scales is not None:
        key_scales += kv_head * BLOCK_SIZE
        value_scales += kv_head * BLOCK_SIZE
    sum_of_values, greatest, total = _attend_positions(
        query_main, query_rest, length - new + rows // GROUP, greatest, total,
        keys + kv_head * key_head, values + kv_head * value_head, key_scales, value_scales,
        tables + seq.to(tl.int64) * table_width, key_block, value_block,
        num_kv_heads * BLOCK_SIZE, begin, end, window, scale, column,
        KEY_DIM, VALUE_DIM, BLOCK_SIZE, HAS_WINDOW, VALUES_IN_KEYS,
        ROWS, POSITIONS, MAIN, REST, VALUE_BLOCK,
    )  # fmt: skip

    num_heads = GROUP * num_kv_heads
    place = (first + rows // GROUP) * num_heads + head  # among all tokens' heads
    if IS_SPLIT:
        place += split.to(tl.int64) * num_tokens * num_heads
        _store_rows(partial, place, is_row, sum_of_values, column, VALUE_DIM, VALUE_BLOCK)
        tl.store(maxima + place, greatest, mask=is_row)  # the same from all parts of values
        tl.store(sums + place, total, mask=is_row)
    else:
        total = tl.where(is_row, total, 1.0)
        sum_of_values /= total[:, None]
        _store_rows(out, place, is_row, sum_of_values, column, VALUE_DIM, VALUE_BLOCK)


@triton.jit
def _attend_positions(
    query_main, query_rest, own, greatest, total, keys, values, key_scales, value_scales,
    table, key_block, value_block, scale_block, begin, end, window, scale, column,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, VALUES_IN_KEYS: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of values weighted by exponentials, of one head's positions from begin to end.

    `own` are the rows' own positions; greatest logits and sums of weights go on from those given.
    """
    sum_of_values = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for start in range(begin, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        is_there = position < end
        block = tl.load(table + position // BLOCK_SIZE, is_there, 0).to(tl.int64)
        offset = position % BLOCK_SIZE
        key = keys + block * key_block + offset * KEY_DIM
        of_scales = block * scale_block + offset
        key_main = _columns_of(key, is_there, 0, KEY_DIM, MAIN)
        if key_scales is not None:
            key_scale = tl.load(key_scales + of_scales, is_there, 1)[:, None]
            key_main = widened(key_main, key_scale).to(query_main.dtype)
        logits = tl.dot(query_main, tl.trans(key_main), input_precision="ieee")
        if REST > 0:
            key_rest = _columns_of(key, is_there, MAIN, KEY_DIM, REST)
            if key_scales is not None:
                key_rest = widened(key_rest, key_scale).to(query_main.dtype)
            logits = tl.dot(query_rest, tl.trans(key_rest), logits, input_precision="ieee")
        is_seen = is_there[None, :] & (position[None, :] <= own[:, None])
        if HAS_WINDOW:
            is_seen &= position[None, :] > own[:, None] - window
        logits = tl.where(is_seen, logits * scale, -float("inf"))
        weights, shrunk, greatest = _weights_of(logits, greatest)
        total = total * shrunk + tl.sum(weights, axis=1)
        if not VALUES_IN_KEYS:
            of_value = values + block * value_block + offset * VALUE_DIM
            value = _columns_of(of_value, is_there, column, VALUE_DIM, VALUE_BLOCK)
            if key_scales is not None:
                value_scale = tl.load(value_scales + of_scales, is_there, 1)[:, None]
                value = widened(value, value_scale).to(query_main.dtype)
        elif VALUE_BLOCK == MAIN and VALUE_DIM <= MAIN:  # so no other program has some of them
            value = key_main
        else:
            value = _columns_of(key, is_there, column, VALUE_DIM, VALUE_BLOCK)
            if key_scales is not None:
                value = widened(value, key_scale).to(query_main.dtype)
        scaled = sum_of_values * shrunk[:, None]
        sum_of_values = tl.dot(weights.to(value.dtype), value, scaled, input_precision="ieee")
    return sum_of_values, greatest, total


@triton.jit
def _store_rows(to, place, is_row, rows, first, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Store rows [rows, COLUMNS] in rows `place` of a matrix [places, DIM], from column `first`."""
    columns = first + tl.arange(0, COLUMNS)
    mask = is_row[:, None] & (columns < DIM)[None, :]
    tl.store(to + place[:, None] * DIM + columns[None, :], rows.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _columns_of(rows, is_there, first, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Load [rows, COLUMNS] from column `first` on; zeros where there is no row or column."""
    columns = first + tl.arange(0, COLUMNS)
    mask = is_there[:, None] & (columns < DIM)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0)


@triton.jit
def _weights_of(logits, greatest):
    """Exponentials of logits, the factor that rescales earlier sums, and the new maximum."""
    raised = tl.maximum(greatest, tl.max(logits, axis=1))
    base = tl.where(raised == -float("inf"), 0.0, raised)  # of rows that have seen nothing yet
    return tl.exp2(logits - base[:, None]), tl.exp2(greatest - base), raised


@triton.jit
def _place_of_tile(
    tile, first_tokens, num_seqs,
    GROUP: tl.constexpr, ROWS: tl.constexpr, IS_DECODE: tl.constexpr,
):  # fmt: skip
    """The tile's sequence, and its first row there."""
    TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS  # of a token
    seq = tile // TILES
    row = (tile % TILES) * ROWS
    if not IS_DECODE:
        low, high = 0, num_seqs
        while low < high:  # the last sequence whose tiles begin here or before
            middle = (low + high) // 2
            begin = (tl.load(first_tokens + middle) * GROUP // ROWS).to(tl.int32) + middle
            if begin <= tile:
                low = middle + 1
            else:
                high = middle
        seq = low - 1
        row = (tile - (tl.load(first_tokens + seq) * GROUP // ROWS).to(tl.int32) - seq) * ROWS
    return seq, row


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def _combine_kernel(
    partial, maxima, sums, sinks, out, num_splits, num_rows,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, VALUE_BLOCK)
    places = splits.to(tl.int64) * num_rows + row
    greatest = tl.load(maxima + places, mask=splits < num_splits, other=-float("inf"))
    base = tl.max(greatest, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + row % NUM_HEADS) * 1.4426950408889634
        base = tl.maximum(base, sink)
    parts = tl.load(sums + places, mask=splits < num_splits, other=0.0)
    total = tl.sum(tl.exp2(greatest - base) * parts, axis=0)
    if sinks is not None:
        total += tl.exp2(sink - base)
    result = tl.zeros([VALUE_BLOCK], tl.float32)
    for split in range(num_splits):
        place = split * num_rows + row
        share = tl.exp2(tl.load(maxima + place) - base)
        values = tl.load(partial + place * VALUE_DIM + columns, mask=columns < VALUE_DIM, other=0.0)
        result += values * share
    to = out + row * VALUE_DIM + columns
    tl.store(to, (result / total).to(out.dtype.element_ty), mask=columns < VALUE_DIM)


class Tile(NamedTuple):
    """The sizes of a program's tile.

    Attributes:
        rows, positions: query rows, and positions a step of its loop.
        value_parts: programs that share a head's values; each has all of its logits.
    """

    rows: int
    positions: int
    num_warps: int
    num_stages: int
    value_parts: int = 1

    @classmethod
    def of(cls, rows_of_seq: int, dim: int, itemsize: int, *, widens: bool = False) -> "Tile":
        """The tile of most batches.

        The sums of values, rows · dim float32, lie in registers; keys and values of each stage in
        shared memory. Where they are widened, as float32 first, that takes registers too.

        Args:
            rows_of_seq: query rows of the sequence with the most new tokens.
            dim: the wider of keys and values.
            widens: the cache is float8.
        """
        most = 16 if itemsize == 4 else 32 if dim > 256 else 64 if dim > 128 else 128
        rows = min(most, max(16, triton.next_power_of_2(rows_of_seq)))
        if itemsize == 4:  # float32, for parity: multiplied without tensor cores
            return cls(rows, 16, 8, 1) if dim > 256 else cls(rows, 16, 4, 2)
        if dim > 256:
            return cls(rows, 32, 8 if rows > 16 or widens else 4, 2)
        return cls(rows, 64 if dim <= 128 else 32, 8 if rows * dim >= 128 * 128 else 4, 3)

    @classmethod
    def wide(
        cls, rows_of_seq: int, key_dim: int, value_dim: int, itemsize: int, device: torch.device
    ) -> "Tile | None":
        """The tile for more than 64 query rows of 16 bits with heads of 320 or wider; else None.

        Groups of warps multiply that many rows; sums of 256 values stay in registers. None, too,
        where queries and two stages do not fit into shared memory.
        """
        if itemsize != 2 or rows_of_seq <= 64 or max(key_dim, value_dim) < 320:
            return None
        key_columns, parts = sum(_blocks(key_dim)), triton.cdiv(value_dim, _PART)
        rows = 128 if architecture() < 100 else 64  # more spill there
        for positions in (32, 16):
            stages = 2 * positions * (key_columns + _PART)
            if 2 * (rows * key_columns + stages) <= shared_bytes(device):
                return cls(rows, positions, 8, 2, parts)
        return None


def _blocks(key_dim: int) -> tuple[int, int]:
    """A key's width as two powers of two, main and rest; the rest may be 0."""
    main = 1 << (key_dim.bit_length() - 1)
    if main < 16 or key_dim == main:
        return max(16, triton.next_power_of_2(key_dim)), 0
    return main, max(16, triton.next_power_of_2(key_dim - main))


def _num_splits(num_programs: int, longest: int, device: torch.device) -> int:
    """Splits of positions that give each multiprocessor two programs."""
    wanted = 2 * num_multiprocessors(device) // max(1, num_programs)
    return max(1, min(wanted, longest // _LEAST_SPLIT, 64))


def attend(query: Tensor, cache: KVCache, batch: PagedBatch, params: AttentionParams) -> Tensor:
    """Causal attention of a batch's new tokens, whose keys and values are in the cache already.

    Args:
        query: [num_tokens, num_heads, key_dim].

    Returns:
        [num_tokens, num_heads, value_dim].
    """
    (num_tokens, num_heads, key_dim), value_dim = query.shape, params.value_dim
    out = query.new_empty(num_tokens, num_heads, value_dim)
    if not num_tokens or not num_heads:
        return out
    seqs, bounds = batch.sequences, batch.bounds
    num_seqs, group = seqs.lengths.shape[0], num_heads // cache.num_heads
    longest = bounds.longest
    if params.window is not None:
        longest = min(longest, params.window + bounds.most_new)
    dim, is_float8 = max(key_dim, value_dim) // 64 * 64 or 64, cache.key_scales is not None
    rows_of_seq, itemsize = group * bounds.most_new, query.itemsize
    tile = Tile.wide(rows_of_seq, key_dim, value_dim, itemsize, query.device)
    tile = tile or Tile.of(rows_of_seq, dim, itemsize, widens=is_float8)
    num_tiles = num_tokens * group // tile.rows + num_seqs
    if bounds.is_decode:
        num_tiles = num_seqs * triton.cdiv(group, tile.rows)
    num_heads_parts = cache.num_heads * tile.value_parts
    num_splits = _num_splits(num_tiles * num_heads_parts, longest, query.device)
    parts = _room_for_parts(out, num_splits)
    main, rest = _blocks(key_dim)
    value_block = max(16, triton.next_power_of_2(triton.cdiv(value_dim, tile.value_parts)))
    query = adjacent(query)
    launch(
        _attention_kernel,
        (num_tiles, num_heads_parts, num_splits),
        *(query, *cache.parts, seqs.block_tables, seqs.first_tokens),
        *(seqs.num_scheduled, seqs.lengths, params.sinks, out, *parts, *query.stride()[:2]),
        *(*cache.keys.stride()[:2], *cache.values.stride()[:2], seqs.block_tables.shape[1]),
        *(num_seqs, num_tokens, params.window or 0, params.scale * _LOG2_E),
        GROUP=group,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_SIZE=cache.block_size,
        HAS_WINDOW=params.window is not None,
        IS_DECODE=bounds.is_decode,
        IS_SPLIT=num_splits > 1,
        VALUES_IN_KEYS=cache.values.shape[-1] == 0,
        ROWS=tile.rows,
        POSITIONS=tile.positions,
        MAIN=main,
        REST=rest,
        VALUE_BLOCK=value_block,
        VALUE_PARTS=tile.value_parts,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        _add_up(parts, params.sinks, out)
    return out


def _add_up(parts: tuple[Tensor, Tensor, Tensor], sinks: Tensor | None, out: Tensor) -> None:
    """Combine the splits' results into `out`."""
    num_tokens, num_heads, value_dim = out.shape
    num_splits, num_rows = parts[1].shape[0], num_tokens * num_heads
    value_block = max(16, triton.next_power_of_2(value_dim))
    launch(
        _combine_kernel,
        (num_rows,),
        *(*parts, sinks, out, num_splits, num_rows),
        NUM_HEADS=num_heads,
        VALUE_DIM=value_dim,
        VALUE_BLOCK=value_block,
        SPLITS=triton.next_power_of_2(num_splits),
        num_warps=max(1, value_block // 128),
    )


def _room_for_parts(out: Tensor, num_splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of values, maximal logits and sums of weights of each split; none for one split."""
    shape = (num_splits, *out.shape[:2]) if num_splits > 1 else (0, 0, 0)
    partial = out.new_empty(*shape, out.shape[2], dtype=torch.float32)
    maxima, sums = (out.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return partial, maxima, sums
