"""Products of rows with one matrix, or of groups of rows with a matrix each.

A program computes a tile of one group's rows with some columns of its matrix. Which rows belong to
which matrix is found on the device, from counts. A row is read where it lies and a result written
where it belongs, so nothing is permuted in memory. Where tiles are too few for the card, inputs are
split over programs, whose partial sums `_sum_kernel` adds up in order.

Weights of one byte, or of four bits, are widened in registers, unless inputs are in float8 too
(`float8.py`). One-byte values are multiplied without their scales, and the sums over a group
of inputs that share a scale are multiplied by it in float32: no product of a weight and its scale
is rounded. With four bits (MXFP4) that product is exact.

Limits: in decode memory, the weights of all matrices that have a row over the card's bandwidth; in
prompts arithmetic, 2 · rows · weights of a matrix over its peak.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertlane.engine.ops.cuda.compiled import inputs_to_float8
from expertlane.engine.ops.cuda.float8 import product_in_float8
from expertlane.engine.ops.cuda.launch import (
    adjacent,
    is_padding,
    launch,
    num_multiprocessors,
    share_of,
    stages_within,
)
from expertlane.engine.ops.cuda.matrices import Matrices
from expertlane.engine.ops.float8 import FLOAT8
from expertlane.spec.deployment import INPUTS_OF_SCALE

_LEAST_STEPS = 4  # of a split
_MOST_SPLITS = 8
_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_kernel(
    x, x_scales, weight, scales, bias, counts, from_rows, to_rows, out,
    x_row, out_row, out_split, num_rows, num_matrices, out_features, in_features,
    num_groups, group, first, low,
    BITS: tl.constexpr, INPUTS: tl.constexpr, IS_ONE: tl.constexpr, IS_SHARED: tl.constexpr,
    IS_SPLIT: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, MATRICES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile, of_columns = _tiles_of_program(ROWS)
    matrix, begin, end = 0, tile * ROWS, num_rows
    if counts is not None:
        matrix, begin, end = _place_of_tile(tile, counts, num_matrices, MATRICES, ROWS)
    if begin >= end:
        return
    pair = begin + tl.arange(0, ROWS)
    is_pair = pair < end
    row = pair.to(tl.int64)
    if from_rows is not None:
        row = tl.load(from_rows + pair, mask=is_pair, other=0)
    column = of_columns * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < out_features
    place = (matrix * out_features + column).to(tl.int64)  # among all matrices' columns
    high, split = in_features, tl.program_id(2)
    if IS_SPLIT:
        low, high = share_of(low, high, split, tl.num_programs(2), DEPTH)
    of_row = x + row * x_row
    if INPUTS > 0:
        total = product_in_float8(
            of_row, is_pair, x_scales + row * ((in_features + INPUTS - 1) // INPUTS),
            weight, scales, matrix * out_features + of_columns * COLUMNS, is_column,
            low, high, in_features, num_groups, group, first,
            WEIGHTS_FIRST, IS_ONE, IS_SHARED, INPUTS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    elif BITS == 4:
        total = _product_of_blocks(
            of_row, is_pair, weight, scales, place, is_column, low, high, in_features,
            WEIGHTS_FIRST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    elif BITS == 8:
        total = _product_of_groups(
            of_row, is_pair, weight, scales + place * num_groups, place, is_column,
            low, high, in_features, group, first,
            WEIGHTS_FIRST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    else:
        total = _plain_product(
            of_row, is_pair, weight, place, is_column, low, high, in_features,
            ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    if bias is not None:
        shift = tl.load(bias + place, mask=is_column, other=0.0).to(tl.float32)
        total += tl.where(split == 0, shift, 0.0)[None, :]
    to = pair.to(tl.int64)
    if to_rows is not None:
        to = tl.load(to_rows + pair, mask=is_pair, other=0)
    to = out + split.to(tl.int64) * out_split + to[:, None] * out_row + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=is_pair[:, None] & is_column[None, :])


@triton.jit
def _tiles_of_program(ROWS: tl.constexpr):
    """The numbers of a program's tiles of rows and of columns.

    With many rows, programs that run together share them: 8 tiles of rows and some of columns.
    """
    tile, of_columns = tl.program_id(1), tl.program_id(0)
    if ROWS >= 64:
        num_tiles, num_columns = tl.num_programs(1), tl.num_programs(0)
        tile, of_columns = tl.swizzle2d(tile, of_columns, num_tiles, num_columns, 8)
    return tile, of_columns


@triton.jit
def _place_of_tile(tile, counts, num_matrices, MATRICES: tl.constexpr, ROWS: tl.constexpr):
    """The tile's matrix, its first row, and where the matrix's rows end; no row beyond the last.

    Tiles of all matrices follow one another.
    """
    numbers = tl.arange(0, MATRICES)
    held = tl.load(counts + numbers, mask=numbers < num_matrices, other=0).to(tl.int32)
    tiles = (held + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(tiles, axis=0)
    matrix = tl.sum((tile_ends <= tile).to(tl.int32), axis=0)
    before = numbers < matrix
    begin = tl.sum(tl.where(before, held, 0), axis=0)
    end = begin + tl.sum(tl.where(numbers == matrix, held, 0), axis=0)
    return matrix, begin + (tile - tl.sum(tl.where(before, tiles, 0), axis=0)) * ROWS, end


@triton.jit
def _plain_product(
    of_row, is_row, weight, place, is_column, low, high, in_features,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, COLUMNS] float32 over inputs from low to high; weights have no scales."""
    depth = tl.arange(0, DEPTH)
    of_row = of_row[:, None] + depth[None, :]
    of_column = (weight + place * in_features)[None, :] + depth[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(low, high, DEPTH):
        is_input = depth < in_features - start
        a = tl.load(of_row + start, is_row[:, None] & is_input[None, :], 0.0)
        b = tl.load(of_column + start, is_column[None, :] & is_input[:, None], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _product_of_groups(
    of_row, is_row, weight, of_scale, place, is_column, low, high, in_features, group, first,
    WEIGHTS_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, COLUMNS] float32 with one-byte weights; every step lies in one group."""
    depth = tl.arange(0, DEPTH)
    of_row = of_row[:, None] + depth[None, :]
    of_column = (weight + place * in_features)[:, None] + depth[None, :]
    total = _zeros(WEIGHTS_FIRST, ROWS, COLUMNS)
    for start in range(low, high, DEPTH):
        is_input = (depth >= -start) & (depth < in_features - start)
        a = tl.load(of_row + start, is_row[:, None] & is_input[None, :], 0.0)
        b = tl.load(of_column + start, is_column[:, None] & is_input[None, :], 0.0)
        scale = tl.load(of_scale + (start + first) // group, is_column, 0.0)
        if WEIGHTS_FIRST:
            sums = tl.dot(b.to(a.dtype), tl.trans(a), input_precision="ieee")
            total += sums * scale[:, None]
        else:
            sums = tl.dot(a, tl.trans(b.to(a.dtype)), input_precision="ieee")
            total += sums * scale[None, :]
    return tl.trans(total) if WEIGHTS_FIRST else total


@triton.jit
def _product_of_blocks(
    of_row, is_row, weight, scales, place, is_column, low, high, in_features,
    WEIGHTS_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, COLUMNS] float32 with MXFP4 weights; in_features is a multiple of 32."""
    depth, byte, block = tl.arange(0, DEPTH), tl.arange(0, DEPTH // 2), tl.arange(0, DEPTH // 32)
    of_row = of_row[:, None] + depth[None, :]
    of_byte = (weight + place * (in_features // 2))[:, None] + byte[None, :]
    of_scale = (scales + place * (in_features // 32))[:, None] + block[None, :]
    total = _zeros(WEIGHTS_FIRST, ROWS, COLUMNS)
    for start in range(low, high, DEPTH):
        rest = in_features - start
        a = tl.load(of_row + start, is_row[:, None] & (depth < rest)[None, :], 0.0)
        is_byte = is_column[:, None] & (byte < rest // 2)[None, :]
        codes = tl.load(of_byte + start // 2, is_byte, 0)
        is_block = is_column[:, None] & (block < rest // 32)[None, :]
        exponents = tl.load(of_scale + start // 32, is_block, 0)
        b = _widened(codes, exponents, COLUMNS, DEPTH).to(a.dtype)
        if WEIGHTS_FIRST:
            total = tl.dot(b, tl.trans(a), total, input_precision="ieee")
        else:
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return tl.trans(total) if WEIGHTS_FIRST else total


@triton.jit
def _widened(codes, exponents, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """MXFP4 weights as float32 [COLUMNS, DEPTH]: two e2m1 values a byte, a power of two for 32.

    An e2m1's bits, put at the lowest of float32's exponent and the highest of its mantissa, are its
    value · 2^-126.
    """
    code = tl.interleave(codes & 15, codes >> 4).to(tl.uint32)
    value = (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True)
    exponent = exponents.to(tl.uint32)
    power = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    power = tl.broadcast_to(power[:, :, None], (COLUMNS, DEPTH // 32, 32))
    return value * 8.507059173023462e37 * power.reshape(COLUMNS, DEPTH)


@triton.jit
def _zeros(WEIGHTS_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeroed sums [ROWS, COLUMNS]; [COLUMNS, ROWS] where weights are the first operand."""
    if WEIGHTS_FIRST:
        return tl.zeros([COLUMNS, ROWS], tl.float32)
    else:
        return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def _sum_kernel(
    partial, counts, to_rows, out, num_splits, num_rows, num_matrices, out_row, width,
    MATRICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if counts is not None:  # noqa: SIM102 - of constants alone
        if is_padding(row, counts, num_matrices, MATRICES):
            return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        of_row = partial + (split * num_rows + row) * width
        total += tl.load(of_row + columns, mask=columns < width, other=0.0)
    to = row
    if to_rows is not None:
        to = tl.load(to_rows + row)
    tl.store(out + to * out_row + columns, total.to(out.dtype.element_ty), mask=columns < width)


class Tile(NamedTuple):
    """The sizes of a program's tile.

    Attributes:
        depth: inputs in a step of its loop.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, num_rows: int, matrices: Matrices, itemsize: int) -> "Tile":
        """The tile for the mean number of rows of a matrix, and its kind of weights."""
        if itemsize == 4:  # float32, for parity: multiplied without tensor cores
            return cls(16, 32, 32, 4, 2)
        mean = triton.next_power_of_2(num_rows // max(1, matrices.num))
        rows = min(128, max(16, mean))
        depth = 64 if rows == 128 else 128
        if matrices.takes_float8:
            depth = INPUTS_OF_SCALE
            if matrices.num_groups > 1:
                depth = math.gcd(depth, matrices.group)
                if matrices.rows % 128:  # a scale for each column takes registers
                    return cls(min(rows, 64), 128, depth, 4 if rows <= 32 else 8, 4)
            return cls(rows, 128, depth, 4 if rows <= 64 else 8, 4)
        if matrices.bits < 16:
            is_one = matrices.bits == 4 or matrices.num_groups == 1
            depth = depth if is_one else math.gcd(depth, matrices.group)
            return cls(rows, 128, depth, 4 if rows <= 32 else 8, 3 if rows == 64 else 4)
        if rows <= 32:
            return cls(rows, 128, 128, 4, 4)
        if mean > 128:  # wider, since loads from the L2 cache would bound products
            return cls(rows, 256, 64, 8, 4)
        return cls(rows, 128, 64, 8 if rows == 128 else 4, 4)

    def stage_bytes(self, bits: int, itemsize: int) -> int:
        """Bytes of shared memory of a stage of its loop: rows, and weights of `bits` each."""
        return self.depth * (self.rows * itemsize + self.columns * bits // 8)


def grouped_product(
    x: Tensor,
    matrices: Matrices,
    counts: Tensor | None,
    num_rows: int,
    *,
    from_rows: Tensor | None = None,
    to_rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ + b of each row with its matrix; rows are sorted by matrix.

    Args:
        x: [num_rows, in_features]; or [any, in_features] and `from_rows`.
        counts: [num]; rows of each matrix. None where there is one matrix.
        num_rows: at least the sum of counts; results beyond that sum are not written.
        from_rows: [num_rows]; index in x of each row.
        to_rows: [num_rows]; index in `out` of each result.
        out: [num_rows, out_features]; filled and returned, if given.
    """
    out = x.new_empty(num_rows, matrices.out_features) if out is None else out
    x = adjacent(x)
    tile = Tile.of(num_rows, matrices, x.itemsize)
    num_splits = _num_splits(num_rows, matrices, tile, x.device)
    if num_splits == 1:
        _multiply(x, matrices, counts, num_rows, tile, 1, from_rows, to_rows, out)
        return out
    sums = out.new_empty(num_splits * num_rows, matrices.out_features, dtype=torch.float32)
    _multiply(x, matrices, counts, num_rows, tile, num_splits, from_rows, None, sums)
    launch(
        _sum_kernel,
        (num_rows, triton.cdiv(matrices.out_features, _SUM_BLOCK)),
        *(sums, counts, to_rows, out, num_splits, num_rows, matrices.num),
        *(out.stride(0), matrices.out_features),
        MATRICES=triton.next_power_of_2(matrices.num),
        BLOCK=_SUM_BLOCK,
    )
    return out


def _multiply(
    x: Tensor,
    matrices: Matrices,
    counts: Tensor | None,
    num_rows: int,
    tile: Tile,
    num_splits: int,
    from_rows: Tensor | None,
    to_rows: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out` [num_splits · num_rows, out_features] with each split's products."""
    stage_bytes = tile.stage_bytes(matrices.bits, x.itemsize)
    num_tiles = triton.cdiv(num_rows, tile.rows)
    if counts is not None and num_rows:
        num_tiles = min(num_rows, matrices.num) + num_rows // tile.rows
    x_scales = None
    if matrices.takes_float8:
        values, x_scales = inputs_to_float8(x)
        x = values.flatten(1).view(FLOAT8)
    launch(
        _grouped_kernel,
        (triton.cdiv(matrices.out_features, tile.columns), num_tiles, num_splits),
        *(x, x_scales, matrices.weight, matrices.scales, matrices.bias, counts),
        *(from_rows, to_rows, out, x.stride(0), out.stride(0), num_rows * matrices.out_features),
        *(num_rows, matrices.num, matrices.out_features, matrices.in_features),
        *(matrices.num_groups, matrices.group, matrices.first),
        -(matrices.first % tile.depth),  # so that a step has one group
        BITS=matrices.bits,
        INPUTS=INPUTS_OF_SCALE if matrices.takes_float8 else 0,
        IS_ONE=matrices.num_groups == 1,
        IS_SHARED=matrices.num_groups > 1 and matrices.rows % tile.columns == 0,
        IS_SPLIT=num_splits > 1,
        WEIGHTS_FIRST=(tile.rows >= 64) != matrices.takes_float8,  # else registers spill
        MATRICES=triton.next_power_of_2(matrices.num),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.num_warps,
        num_stages=stages_within(tile.num_stages, stage_bytes, x.device),
    )


def _num_splits(num_rows: int, matrices: Matrices, tile: Tile, device: torch.device) -> int:
    """Splits of inputs that give each multiprocessor a program, if rows are spread evenly."""
    num_tiles = max(min(num_rows, matrices.num), num_rows // tile.rows)
    num_programs = triton.cdiv(matrices.out_features, tile.columns) * num_tiles
    wanted = num_multiprocessors(device) // max(1, num_programs)
    num_steps = matrices.in_features // tile.depth
    return int(max(1, min(wanted, num_steps // _LEAST_STEPS, _MOST_SPLITS)))
