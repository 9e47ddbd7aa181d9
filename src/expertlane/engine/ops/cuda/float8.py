"""Rounding of rows to float8 and widening inside kernels, exactly as in `ops.float8`; products.

Float8 tensor cores of Hopper keep few bits of their sums. So the products of one group of inputs
are summed there, and its sum is multiplied by the group's two scales and added up in float32
(DeepSeek-AI 2024, V3, section 3.3.2).

Limits: rounding moves 1 + b bytes a value, where the model's have b; products take at least half of
what they take with 16-bit inputs, since float8's peak is twice as high. Never run on a GPU
(docs/validation.md).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertlane.engine.ops.cuda.launch import is_padding, launch
from expertlane.engine.ops.float8 import FLOAT8
from expertlane.spec.deployment import INPUTS_OF_SCALE

_GROUPS = 8  # of a program


@triton.jit
def largest_of(rows):
    """Bits (int32) of the largest magnitude of each row [rows, columns], or of one row."""
    return tl.max(rows.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=-1)


@triton.jit
def scale_of(largest):
    """Stored scales (int32) of rows, from the bits of their largest magnitudes."""
    scale = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    return tl.where(largest < 0x7F800000, scale, 255)


@triton.jit
def rounded(rows, scales):
    """Bits of rows rounded to float8, with the scales of `scale_of`.

    By hand: no GPU before sm_89 converts to float8, and Triton's interpreter rounds otherwise.
    """
    inverse = ((254 - scales) << 23).to(tl.float32, bitcast=True)
    scaled = rows.to(tl.float32) * inverse
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 there are multiples of 2^-9: those of a sum with 2^14.
    small = (tl.abs(scaled) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < (121 << 23), small, tl.minimum(code, 0x7F))
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def widened(rows, scales):
    """Rows in float32, from the stored bits of their values and scales."""
    powers = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return rows.to(tl.float8e4nv, bitcast=True).to(tl.float32) * powers


class Float8Rows(NamedTuple):
    """Rows rounded to float8.

    Attributes:
        values: [num_rows, in_features] float8.
        scales: [num_rows, num_groups] uint8; exponents, see `ops.float8`.
    """

    values: Tensor
    scales: Tensor


@triton.jit
def _round_kernel(
    x, counts, values, scales, x_row, in_features, num_groups, num_counts,
    COUNTS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if counts is not None:  # noqa: SIM102 - of constants alone
        if is_padding(row, counts, num_counts, COUNTS):
            return
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_there = place < in_features
    inputs = tl.load(x + row * x_row + place, mask=is_there, other=0.0)
    scale = scale_of(largest_of(inputs))
    tl.store(values + row * in_features + place, rounded(inputs, scale[:, None]), mask=is_there)
    to = scales + row * num_groups + group
    tl.store(to, scale.to(tl.uint8), mask=group < num_groups)


def in_float8(x: Tensor, counts: Tensor | None = None) -> Float8Rows:
    """Round inputs [num_rows, in_features] to float8.

    Args:
        counts: [any]; rows from their sum on are padding, and are left out.
    """
    num_rows, in_features = x.shape
    num_groups = triton.cdiv(in_features, INPUTS_OF_SCALE)
    values = torch.empty(num_rows, in_features, dtype=torch.uint8, device=x.device)
    scales = torch.empty(num_rows, num_groups, dtype=torch.uint8, device=x.device)
    num_counts = 0 if counts is None else counts.shape[0]
    launch(
        _round_kernel,
        (num_rows, triton.cdiv(num_groups, _GROUPS)),
        *(x, counts, values, scales, x.stride(0), in_features, num_groups, num_counts),
        COUNTS=triton.next_power_of_2(max(1, num_counts)),
        GROUPS=_GROUPS,
        GROUP=INPUTS_OF_SCALE,
    )
    return Float8Rows(values.view(FLOAT8), scales)


@triton.jit
def product_in_float8(
    of_row, is_row, of_row_scale, weight, scales, first_place, is_column, low, high, in_features,
    num_groups, group, first,
    WEIGHTS_FIRST: tl.constexpr, IS_ONE: tl.constexpr, IS_SHARED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, COLUMNS] float32 over inputs from low to high; a step lies in one group.

    Columns have one scale for all inputs (IS_ONE), or share each group's scale (IS_SHARED), or
    neither, which takes more registers.
    """
    depth, place = tl.arange(0, DEPTH), (first_place + tl.arange(0, COLUMNS)).to(tl.int64)
    of_row = of_row[:, None] + depth[None, :]
    of_column = (weight + place * in_features)[:, None] + depth[None, :]
    of_scale, shared = scales + place * num_groups, scales + first_place.to(tl.int64) * num_groups
    total = tl.zeros([COLUMNS, ROWS] if WEIGHTS_FIRST else [ROWS, COLUMNS], tl.float32)
    for start in range(low, high, DEPTH):
        is_input = depth < in_features - start
        a = tl.load(of_row + start, is_row[:, None] & is_input[None, :], 0.0)
        b = tl.load(of_column + start, is_column[:, None] & is_input[None, :], 0.0)
        exponent = tl.load(of_row_scale + start // GROUP, is_row, 0).to(tl.int32)
        factor = (exponent << 23).to(tl.float32, bitcast=True)
        if IS_SHARED:
            factor *= tl.load(shared + (start + first) // group)
        if WEIGHTS_FIRST:
            sums = tl.dot(b, tl.trans(a)) * factor[None, :]
        else:
            sums = tl.dot(a, tl.trans(b)) * factor[:, None]
        if not (IS_ONE or IS_SHARED):
            scale = tl.load(of_scale + (start + first) // group, is_column, 0.0)
            sums *= scale[:, None] if WEIGHTS_FIRST else scale[None, :]
        total += sums
    total = tl.trans(total) if WEIGHTS_FIRST else total
    return total * tl.load(of_scale, is_column, 0.0)[None, :] if IS_ONE else total
