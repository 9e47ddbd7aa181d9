"""Weights of one byte or of four bits, with scales.

A weight of one byte is value · scale, computed in float32. Values are int8, or float8 (e4m3); a
scale is shared by a group of a row's inputs: all of them, or a fixed number. Of weights of four
bits, scales are powers of two (OCP Microscaling Formats, version 1.0).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from expertlane.errors import SpecError
from expertlane.spec.deployment import INPUTS_OF_SCALE
from expertlane.spec.hf_config import MXFP4_BLOCK

_INT8_MAX = 127
_VALUES_AT_A_TIME = 4_194_304  # widened


@dataclass(frozen=True, eq=False)
class NarrowWeight:
    """A matrix of one-byte values with scales, or a slice of one.

    Attributes:
        values: [out_features, in_features] int8 or float8_e4m3fn.
        scales: [out_features, num_groups] float32.
        group: inputs that share a scale; the last group may have fewer.
        first: offset of the first input in its group: not 0 in a slice that begins within one.
        dtype: dtype of the widened weight.
        rows: outputs that share their scales: each `rows` consecutive ones, from the first on.
    """

    values: Tensor
    scales: Tensor
    group: int
    first: int
    dtype: torch.dtype
    rows: int = 1

    @classmethod
    def rounded(cls, weight: Tensor, dtype: torch.dtype) -> Self:
        """Round a weight to int8, symmetric: a group's scale is its largest magnitude / 127.

        Args:
            weight: [out_features, in_features] float32; its first input begins a group.
        """
        num_rows, num_columns = weight.shape
        num_groups = -(-num_columns // INPUTS_OF_SCALE)
        padded = torch.nn.functional.pad(weight, (0, num_groups * INPUTS_OF_SCALE - num_columns))
        padded = padded.view(num_rows, num_groups, INPUTS_OF_SCALE)
        scales = padded.abs().amax(-1) / _INT8_MAX
        divisors = scales.where(scales > 0, 1.0)
        values = (padded / divisors[..., None]).round_().clamp_(-_INT8_MAX, _INT8_MAX)
        whole = values.to(torch.int8).flatten(1)[:, :num_columns]
        return cls(whole, scales, INPUTS_OF_SCALE, 0, dtype)

    def columns(self, part: range) -> Self:
        """The slice of these inputs (columns)."""
        begin, end = self.first + part.start, self.first + part.stop
        groups = slice(begin // self.group, -(-end // self.group))
        first, values = begin % self.group, self.values[:, part.start : part.stop]
        return replace(self, values=values, scales=self.scales[:, groups], first=first)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> Self:
        """The weight on a device, contiguous."""
        values, scales = self.values.to(device).contiguous(), self.scales.to(device).contiguous()
        return replace(self, values=values, scales=scales)

    def widened(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [out_features, in_features]: value · scale in float32, then rounded to dtype.

        Args:
            dtype: dtype of the result; None for the weight's own.
        """
        places = torch.arange(self.values.shape[1], device=self.scales.device) + self.first
        dtype = dtype or self.dtype
        out = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        groups, step = places // self.group, max(1, _VALUES_AT_A_TIME // max(1, len(places)))
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] = self.values[rows].float() * self.scales[rows][:, groups]
        return out


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127


@dataclass(frozen=True, eq=False)
class Mxfp4Weight:
    """A matrix of MXFP4 values, or a slice of whole blocks of one.

    Attributes:
        blocks: [out_features, in_features / 2] uint8; two e2m1 values a byte, lower half first.
        scales: [out_features, in_features / 32] uint8; exponents with a bias of 127.
        dtype: dtype of the widened weight.
    """

    blocks: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        return self.scales.shape[0], self.scales.shape[1] * MXFP4_BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.blocks.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> Self:
        """The weight on a device, contiguous."""
        blocks, scales = self.blocks.to(device).contiguous(), self.scales.to(device).contiguous()
        return type(self)(blocks, scales, self.dtype)

    def widened(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [out_features, in_features]; of the weight's own dtype where dtype is None."""
        (num_rows, num_blocks), device = self.scales.shape, self.blocks.device
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        of_code = torch.tensor(_E2M1, device=device)
        step = max(1, _VALUES_AT_A_TIME // max(1, out.shape[1]))
        for start in range(0, num_rows, step):
            blocks = self.blocks[start : start + step]
            codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).view(
                len(blocks), num_blocks, MXFP4_BLOCK
            )
            exponents = self.scales[start : start + step].int()[:, :, None] - _E8M0_BIAS
            out[start : start + step] = torch.ldexp(of_code[codes.int()], exponents).flatten(1)
        return out


@dataclass(frozen=True, eq=False)
class Float8Inputs:
    """A matrix, narrow or widened, whose products take inputs in float8 (`engine/ops/float8.py`).

    Its first input begins a group of inputs that share a scale.
    """

    weight: Tensor | NarrowWeight


Weight = Tensor | NarrowWeight | Mxfp4Weight | Float8Inputs


def reordered(
    weight: Weight, order: Callable[[Tensor], Tensor]
) -> Tensor | NarrowWeight | Float8Inputs:
    """A matrix with its outputs reordered.

    Args:
        order: gives a tensor with its rows in the new order.
    """
    if isinstance(weight, Float8Inputs):
        return replace(weight, weight=_reordered(weight.weight, order))
    return _reordered(weight, order)


def _reordered(
    weight: Tensor | NarrowWeight | Mxfp4Weight, order: Callable[[Tensor], Tensor]
) -> Tensor | NarrowWeight:
    if isinstance(weight, NarrowWeight):
        values = order(weight.values.view(torch.uint8)).view(weight.values.dtype)
        return replace(weight, values=values, scales=order(weight.scales), rows=1)
    return order(weight if isinstance(weight, Tensor) else weight.widened())


def side_by_side(weights: Sequence[Weight]) -> Tensor | NarrowWeight | Float8Inputs:
    """Matrices with the same inputs as one, outputs after outputs.

    It is narrow if all are, with the same groups and type of values; else it is widened.

    Raises:
        SpecError: some take inputs in float8, and others do not.
    """
    rounding = [each.weight for each in weights if isinstance(each, Float8Inputs)]
    others = [each for each in weights if not isinstance(each, Float8Inputs)]
    if rounding and others:
        raise SpecError(
            f"{len(rounding)} of {len(weights)} matrices with the same inputs are stored in "
            "float8; activations in float8 need all of them to be, or none"
        )
    return Float8Inputs(_side_by_side(rounding)) if rounding else _side_by_side(others)


def _side_by_side(weights: Sequence[Tensor | NarrowWeight | Mxfp4Weight]) -> Tensor | NarrowWeight:
    narrow = [each for each in weights if isinstance(each, NarrowWeight)]
    first = narrow[0] if narrow else None
    if first is not None and len(narrow) == len(weights):
        kinds = {(each.group, each.first, each.values.dtype) for each in narrow}
        if len(kinds) == 1:
            parts = [each.values.view(torch.uint8) for each in narrow]
            values, scales = torch.cat(parts), torch.cat([each.scales for each in narrow])
            values = values.view(first.values.dtype)
            rows = shared_rows(math.gcd(*(each.rows for each in narrow)), [len(v) for v in parts])
            return replace(first, values=values, scales=scales, rows=rows)
    return torch.cat([each if isinstance(each, Tensor) else each.widened() for each in weights])


def shared_rows(rows: int, out_features: Sequence[int]) -> int:
    """`NarrowWeight.rows` of concatenated matrices with `out_features` each."""
    return math.gcd(rows, *out_features[:-1])
