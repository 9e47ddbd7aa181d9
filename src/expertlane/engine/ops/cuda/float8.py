"""Rounding of rows to float8 and widening inside kernels, exactly as in `ops.float8`."""

import triton
import triton.language as tl


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
