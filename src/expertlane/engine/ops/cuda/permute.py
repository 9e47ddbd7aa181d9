"""Token-expert pairs sorted by expert, and weighted sums of their results.

The order is a stable counting sort: `_count_kernel` counts each group's pairs in each tile of
pairs, a cumulative sum over groups and tiles says where each tile's pairs of a group begin, and
`_place_kernel` writes every pair there. Counts stay on the device.

Limits: memory, and in decode steps launches. Of P pairs 4·P bytes are read twice and 24·P written;
the sum reads top_k rows of H values and writes one, (top_k + 1) · H · b bytes a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertlane.engine.ops.cuda.launch import adjacent, launch
from expertlane.engine.ops.products import PairGroups

_TILE = 128  # pairs, each compared with all others of its tile
_SUM_BLOCK = 1024


@triton.jit
def _group_of(ids, ids_row, pair, num_pairs, first, divisor, num_groups, TOP_K: tl.constexpr):
    """Each pair's group, and whether it has one; without one its group is `num_groups`."""
    is_there = pair < num_pairs
    place = pair // TOP_K
    found = tl.load(ids + place.to(tl.int64) * ids_row + pair % TOP_K, mask=is_there, other=-1)
    found = found - first
    group = found // divisor
    has_group = is_there & (found >= 0) & (group < num_groups)
    group = tl.where(has_group, group, num_groups)
    return tl.where(is_there, group, num_groups + 1), has_group


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _count_kernel(
    ids, counts, ids_row, num_pairs, num_tiles, first, divisor, num_groups,
    TOP_K: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    pair = tile * TILE + tl.arange(0, TILE)
    group, _ = _group_of(ids, ids_row, pair, num_pairs, first, divisor, num_groups, TOP_K)
    number = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    is_it = group[:, None] == number[None, :]
    to = counts + number.to(tl.int64) * num_tiles + tile
    tl.store(to, tl.sum(is_it.to(tl.int32), axis=0), mask=number <= num_groups)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "num_kept"])
def _place_kernel(
    ids, counts, ends, tile_ends, rows, order, numbers,
    ids_row, num_pairs, num_tiles, first, divisor, num_groups, num_kept,
    TOP_K: tl.constexpr, TILE: tl.constexpr, HAS_ALL: tl.constexpr,
):  # fmt: skip
    # `ends`: where pairs of each group and tile end; `tile_ends`: how many all tiles so far have,
    # those without a group left out.
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    pair = tile * TILE + lane
    group, has_group = _group_of(ids, ids_row, pair, num_pairs, first, divisor, num_groups, TOP_K)
    is_before = lane[None, :] < lane[:, None]
    rank = tl.sum((is_before & (group[None, :] == group[:, None])).to(tl.int32), axis=1)
    cell = group.to(tl.int64) * num_tiles + tile
    is_there = pair < num_pairs
    begin = tl.load(ends + cell, mask=is_there, other=0) - tl.load(counts + cell, is_there, 0)
    place = begin + rank
    number = pair
    if not HAS_ALL:
        counted = tl.sum(has_group.to(tl.int32), axis=0)
        number = (tl.load(tile_ends + tile) - counted).to(tl.int32)
        number += tl.sum((is_before & has_group[None, :]).to(tl.int32), axis=1)
        number = tl.where(has_group, number, place.to(tl.int32))
    is_kept = is_there & (place < num_kept)
    tl.store(rows + place, (pair // TOP_K).to(tl.int64), mask=is_kept)
    tl.store(order + place, number.to(tl.int64), mask=is_kept)
    number = tl.where(has_group, number, -1)
    tl.store(numbers + pair, number.to(tl.int64), mask=is_there)


def group_pairs(
    ids: Tensor, first: int, divisor: int, num_groups: int, num_pairs: int | None = None
) -> PairGroups:
    """Sort pairs by group, as `Bookkeeping.group_pairs` defines it.

    The host waits only for the number of pairs, and not if `num_pairs` is given.
    """
    num_rows, top_k = ids.shape
    ids = adjacent(ids)
    most = num_rows * top_k
    num_tiles, groups = triton.cdiv(most, _TILE), min(128, triton.next_power_of_2(num_groups + 1))
    counts = ids.new_empty(num_groups + 1, num_tiles, dtype=torch.int32)
    sizes = ids.stride(0), most, num_tiles, first, divisor, num_groups
    launch(
        _count_kernel, (num_tiles, triton.cdiv(num_groups + 1, groups)), *(ids, counts, *sizes),
        TOP_K=top_k, TILE=_TILE, GROUPS=groups,
    )  # fmt: skip
    ends = counts.view(-1).cumsum(0)
    grouped = counts.narrow(0, 0, num_groups)
    tile_ends = grouped.sum(0).cumsum(0) if num_pairs != most else ends
    if num_pairs is None:
        num_pairs = int(tile_ends[-1]) if most else 0
    rows, order = (ids.new_empty(num_pairs, dtype=torch.int64) for _ in range(2))
    numbers = ids.new_empty(num_rows, top_k, dtype=torch.int64)
    launch(
        _place_kernel, (num_tiles,), *(ids, counts, ends, tile_ends, rows, order, numbers, *sizes),
        num_pairs, TOP_K=top_k, TILE=_TILE, HAS_ALL=num_pairs == most,
    )  # fmt: skip
    return PairGroups(grouped.sum(1), rows, order, numbers)


@triton.jit
def _gather_sum_kernel(
    values, places, weights, out, value_row, places_row, weights_row, out_row, width,
    NUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(NUM):
        place = tl.load(places + row * places_row + number)
        if place >= 0:
            found = tl.load(values + place * value_row + columns, mask=columns < width, other=0.0)
            found = found.to(tl.float32)
            if weights is not None:
                found *= tl.load(weights + row * weights_row + number)
            total += found
    tl.store(out + row * out_row + columns, total.to(out.dtype.element_ty), mask=columns < width)


def gather_sum(
    values: Tensor, places: Tensor, weights: Tensor | None, out: Tensor | None
) -> Tensor:
    """Weighted sums of rows of `values`, as `TorchBackend.gather_sum` defines them."""
    (num_rows, num), width = places.shape, values.shape[1]
    out = values.new_empty(num_rows, width) if out is None else out
    values, places = adjacent(values), adjacent(places)
    weights = None if weights is None else adjacent(weights)
    block = min(_SUM_BLOCK, triton.next_power_of_2(max(16, width)))
    launch(
        _gather_sum_kernel,
        (num_rows, triton.cdiv(width, block)),
        *(values, places, weights, out, values.stride(0), places.stride(0)),
        *(0 if weights is None else weights.stride(0), out.stride(0), width),
        NUM=num,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return out
