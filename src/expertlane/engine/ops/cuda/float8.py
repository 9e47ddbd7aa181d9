"""Widening of float8 inside kernels, exactly as in `ops.float8`; products of float8 with float8.

Float8 tensor cores of Hopper keep few bits of their sums. So the products of one group of inputs
are summed there, and its sum is multiplied by the group's two scales and added up in float32
(DeepSeek-AI 2024, V3, section 3.3.2).

Limit: at least half of the time of products with 16-bit inputs, since float8's peak is twice as
high. Never run on a GPU (docs/validation.md).
"""

import triton
import triton.language as tl


@triton.jit
def widened(rows, scales):
    """Rows in float32, from the stored bits of their values and scales."""
    powers = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return rows.to(tl.float8e4nv, bitcast=True).to(tl.float32) * powers


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
