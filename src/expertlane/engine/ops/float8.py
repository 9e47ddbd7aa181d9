"""Rows of values in float8 (e4m3), each with a power of two as its scale; products of such inputs.

A row is a token's key or value of one head, or a token's inputs of a product that share a scale.
Its scale is the smallest 2^n with which its largest magnitude is at most 448, stored as n + 127 in
a byte (e8m0 of OCP Microscaling Formats 1.0); 255 where a value is no number, so that none of the
row is one when it is read.
Widening a row is exact in every type that models compute in. Rounding moves a value by at most
2^-4 of itself, or 2^-10 of the scale where that is more; nothing overflows.

DeepSeek-V3's float8 matrices are made for inputs of which each 128 of a token share a scale
(arXiv:2412.19437, section 3.3), DeepSeek-V3.1's for powers of two. As widening is exact, any
product can take rounded inputs, and all backends compute one function. A token's rounding depends
on its own values alone.
"""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.ops.products import Linear
from expertlane.spec.deployment import INPUTS_OF_SCALE

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


def rounded_inputs(x: Tensor) -> Tensor:
    """x [num_rows, in_features] with each group of inputs rounded to float8 and widened again."""
    return from_float8(*inputs_to_float8(x), x.dtype).flatten(1)[:, : x.shape[1]]


def inputs_to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each group of inputs [num_rows, in_features] to float8; the last is padded with zeros.

    Returns:
        as `to_float8`, of [num_rows, num_groups, INPUTS_OF_SCALE].
    """
    num_rows, num_inputs = x.shape
    missing = -num_inputs % INPUTS_OF_SCALE
    padded = F.pad(x, (0, missing)) if missing else x
    num_groups = padded.shape[1] // INPUTS_OF_SCALE
    return to_float8(padded.reshape(num_rows, num_groups, INPUTS_OF_SCALE))


class RoundedLinear(Linear):
    """A linear whose inputs are rounded first.

    Args:
        inner: the linear that multiplies the rounded inputs.
    """

    is_packed = True

    def __init__(self, inner: Linear) -> None:
        self.inner = inner
        self.out_features, self.in_features = inner.out_features, inner.in_features
        self.itemsize, self.weight, self.bias = inner.itemsize, inner.weight, inner.bias

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrix; scales are not counted."""
        return self.inner.num_bytes

    def tensors(self) -> list[Tensor]:
        """Weight and bias of `inner`."""
        return self.inner.tensors()

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """A rounding linear around `inner` with other weights."""
        return type(self)(self.inner.with_tensors(tensors))

    def __call__(self, x: Tensor) -> Tensor:
        """x · Wᵀ + b [num_rows, out_features], of x [num_rows, in_features] rounded to float8."""
        return self.inner(rounded_inputs(x))
