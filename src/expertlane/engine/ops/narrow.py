"""Weights of one byte with scales, and products that widen them as they read them (`narrow.cpp`).

A weight is value · scale, computed in float32. Values are int8, or float8 (e4m3); a scale is shared
by a group of a row's inputs: all of them, or a fixed number.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from expertlane.engine.ops.mxfp4 import Mxfp4Weight
from expertlane.engine.ops.products import Activation, Expert, Experts, Linear, PairGroups
from expertlane.errors import SpecError
from expertlane.spec.deployment import INPUTS_OF_SCALE

_INT8_MAX = 127
_BLOCK = 16  # outputs that are packed together


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
        groups, step = places // self.group, max(1, _WIDENED_AT_A_TIME // max(1, len(places)))
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] = self.values[rows].float() * self.scales[rows][:, groups]
        return out


_WIDENED_AT_A_TIME = 4_194_304


@dataclass(frozen=True, eq=False)
class Float8Inputs:
    """A matrix, narrow or widened, whose products take inputs in float8 (`engine/ops/rounded.py`).

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


class ScaledLinear(Linear):
    """A linear whose weight has scales.

    Attributes:
        weight, scales: in the layout that the product reads.
        group, first, rows: see `NarrowWeight`.
        takes_float8: it rounds its inputs itself, as `engine/ops/rounded.py` does.
    """

    scales: Tensor
    group: int
    first: int
    rows = 1
    takes_float8 = False

    def tensors(self) -> list[Tensor]:
        """Values, scales and bias."""
        return [self.weight, self.scales, *([] if self.bias is None else [self.bias])]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """A copy of this linear with other weights of the same shape, which are not copied.

        Args:
            tensors: values, scales and bias, as `tensors` gives them.
        """
        other = copy(self)
        other.weight, other.scales = tensors[:2]
        other.bias = tensors[2] if len(tensors) > 2 else None
        return other


class NarrowLinear(ScaledLinear):
    """A linear whose narrow weight our C++ kernel reads: [n / 16, k, 16] bytes, n padded.

    Args:
        bias: [n] float32.
        function: the kernel.

    Attributes:
        scales: [n / 16, num_groups, 16] float32, n padded.
    """

    is_packed = True

    def __init__(self, weight: NarrowWeight, bias: Tensor | None, function: Any) -> None:
        self.out_features, self.in_features = weight.values.shape
        self.itemsize = weight.values.itemsize
        self.weight, self.scales = _packed(weight.values.view(torch.uint8)), _packed(weight.scales)
        self.bias = bias
        self.group, self.first = weight.group, weight.first
        self.is_float8 = weight.values.dtype is not torch.int8
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        """x · Wᵀ + b [num_rows, out_features], of x [num_rows, in_features] float32 or bfloat16."""
        m, k = x.shape
        out = x.new_empty(m, self.out_features)
        if m:
            x = x if x.stride(1) == 1 else x.contiguous()
            self._function(
                *(self.is_float8, x.dtype is torch.bfloat16, x.data_ptr(), x.stride(0), m),
                *(self.weight.data_ptr(), self.scales.data_ptr(), self.out_features, k),
                *(self.group, self.first, None if self.bias is None else self.bias.data_ptr()),
                out.data_ptr(),
            )
        return out


def _packed(rows: Tensor) -> Tensor:
    """Rows [n, columns] in blocks of 16: [n / 16, columns, 16], n padded with zeros."""
    missing = -len(rows) % _BLOCK
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    return rows.view(-1, _BLOCK, rows.shape[1]).transpose(1, 2).contiguous()


class NarrowExperts(Experts):
    """Experts with narrow weights in one kernel call.

    It computes SiLU(gate) · up, or GELU(up) without a gate; then down.

    Args:
        function: the kernel.
    """

    def __init__(self, held: Sequence[Expert], activation: Activation, function: Any) -> None:
        super().__init__(held, activation)  # whose weights stay alive
        self._function = function
        *gates, ups, downs = (
            _matrices(linears) for linears in zip(*(each.linears for each in held), strict=True)
        )
        self.matrices = (gates[0] if gates else None, ups, downs)

    @staticmethod
    def suits(held: Sequence[Expert], activation: Activation) -> bool:
        """Whether the kernel takes these: matrices narrow alike, no biases, a plain activation."""
        parts = [(place, each) for expert in held for place, each in enumerate(expert.linears)]
        last = len(held[0].linears) - 1
        kinds = {
            (place == last, each.is_float8, each.group, each.first)
            for place, each in parts
            if isinstance(each, NarrowLinear) and each.bias is None
        }
        return (
            all(isinstance(each, NarrowLinear) and each.bias is None for _, each in parts)
            and len(kinds) == 2
            and len({is_float8 for _, is_float8, _, _ in kinds}) == 1
            and activation.is_plain(is_gated=held[0].gate is not None)
        )

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        """Results [P, H]; see `Experts`."""
        num_pairs, hidden = len(pairs.rows), rows.shape[1]
        out = rows.new_empty(num_pairs, hidden) if out is None else out
        if num_pairs:
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            ends, up, down = pairs.counts.cumsum(0), self.held[0].up, self.held[0].down
            assert isinstance(up, NarrowLinear)
            assert isinstance(down, NarrowLinear)
            self._function(
                *(up.is_float8, rows.dtype is torch.bfloat16, rows.data_ptr(), rows.stride(0)),
                *(pairs.rows.data_ptr(), pairs.order.data_ptr(), ends.data_ptr(), len(ends)),
                *(*self.matrices, hidden, up.out_features, up.group, down.group, down.first),
                out.data_ptr(),
            )
        return out


def _matrices(linears: Sequence[Linear]) -> Any:
    """[2 · num_linears]; addresses of each linear's values and scales."""
    places = [tensor.data_ptr() for each in linears for tensor in each.tensors()[:2]]
    return (ctypes.c_void_p * len(places))(*places)
