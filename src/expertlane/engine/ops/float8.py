"""Rows of values in float8 (e4m3), each with a power of two as its scale.

A row is a token's key or value of one head, or a token's inputs of a product that share a scale.
Its scale is the smallest 2^n with which its largest magnitude is at most 448, stored as n + 127 in
a byte (e8m0 of OCP Microscaling Formats 1.0); 255 where a value is no number, so that none of the
row is one when it is read.
Widening a row is exact in every type that models compute in. Rounding moves a value by at most
2^-4 of itself, or 2^-10 of the scale where that is more; nothing overflows.
"""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_MANTISSA_BITS, _MAGNITUDE, _INFINITE = 23, 0x7FFFFFFF, 0x7F800000  # of float32's bits
_ABOVE_448 = 0x1FFFFF  # what carries a mantissa above that of 448, 1.75 · 2^8, into the exponent
_EXPONENT_OF_448 = 8


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to float8.

    Args:
        rows: [..., dim]; dim at least 1.

    Returns:
        [..., dim] uint8, the bits of float8; and scales [..., 1] uint8.
    """
    wide = rows.float()
    largest = (wide.view(torch.int32) & _MAGNITUDE).amax(dim=-1, keepdim=True)
    scales = (((largest + _ABOVE_448) >> _MANTISSA_BITS) - _EXPONENT_OF_448).clamp(min=1)
    scales.masked_fill_(largest >= _INFINITE, 255)
    values = (wide * _power(254 - scales)).to(FLOAT8)
    return values.view(torch.uint8), scales.to(torch.uint8)


def from_float8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Widen rows [..., dim] from the values and scales of `to_float8`."""
    return (values.view(FLOAT8).float() * _power(scales.int())).to(dtype)


def _power(biased: Tensor) -> Tensor:
    """2^(biased - 127) of int32; 0 of 0, and infinite of 255."""
    return (biased << _MANTISSA_BITS).view(torch.float32)
