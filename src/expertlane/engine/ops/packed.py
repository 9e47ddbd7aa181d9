"""Linears and experts of our C++ kernels.

Of bfloat16 with packed weights, of float32 for few rows, and with weights of one byte, which are
widened as they are read (`narrow.cpp`). `engine/ops/cpu.py` chooses them; shapes as in
`engine/ops/products.py`.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertlane.engine.ops.narrow import NarrowWeight
from expertlane.engine.ops.products import (
    Activation,
    Expert,
    Experts,
    HeadsLinear,
    Linear,
    PairGroups,
    ScaledLinear,
)

LANES = 16  # outputs of a packed block
FEW_ROWS = 32  # in float32: with more, torch's own products are faster


def _whole_blocks(rows: Tensor) -> Tensor:
    """Rows [n, columns], n padded with zeros to whole blocks."""
    missing = -len(rows) % LANES
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows


def _blocks(rows: Tensor) -> Tensor:
    """Rows [n, columns] in blocks: [n / 16, columns, 16], n padded with zeros."""
    return _whole_blocks(rows).view(-1, LANES, rows.shape[1]).transpose(1, 2).contiguous()


class PackedLinear(Linear):
    """A bfloat16 linear; weight [n, k], k even, is packed as [n / 16, k / 2, 16, 2], n padded.

    Args:
        bias: [n] float32.
        kernel: the C++ function.
    """

    is_packed = True

    def __init__(self, weight: Tensor, bias: Tensor | None, kernel: Any) -> None:
        super().__init__(weight, bias)
        self._kernel = kernel

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        pairs = weight.shape[1] // 2
        return _whole_blocks(weight).view(-1, LANES, pairs, 2).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        m, k = x.shape
        out = x.new_empty(m, self.out_features)
        if m:
            x = x if x.stride(1) == 1 else x.contiguous()
            self._kernel(
                *(x.data_ptr(), x.stride(0), m, self.weight.data_ptr(), self.out_features, k),
                *(None if self.bias is None else self.bias.data_ptr(), out.data_ptr()),
            )
        return out


class FewRowsLinear(PackedLinear):
    """A float32 linear, not packed: our kernel for few rows, torch's product for more."""

    is_packed = False
    pack = staticmethod(Linear.pack)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > FEW_ROWS or x.stride(1) != 1 or x.dtype is not torch.float32:
            return Linear.__call__(self, x)
        return super().__call__(x)


class NarrowLinear(ScaledLinear):
    """A linear whose narrow weight our C++ reads: [n / 16, k, 16] bytes, n padded.

    Args:
        bias: [n] float32.
        kernel: the C++ function.

    Attributes:
        scales: [n / 16, num_groups, 16] float32, n padded.
    """

    is_packed = True

    def __init__(self, weight: NarrowWeight, bias: Tensor | None, kernel: Any) -> None:
        self.out_features, self.in_features = weight.values.shape
        self.itemsize = weight.values.itemsize
        self.weight, self.scales = _blocks(weight.values.view(torch.uint8)), _blocks(weight.scales)
        self.bias = bias
        self.group, self.first = weight.group, weight.first
        self.is_float8 = weight.values.dtype is not torch.int8
        self._kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        """x · Wᵀ + b [num_rows, out_features], of x [num_rows, in_features] float32 or bfloat16."""
        m, k = x.shape
        out = x.new_empty(m, self.out_features)
        if m:
            x = x if x.stride(1) == 1 else x.contiguous()
            self._kernel(
                *(self.is_float8, x.dtype is torch.bfloat16, x.data_ptr(), x.stride(0), m),
                *(self.weight.data_ptr(), self.scales.data_ptr(), self.out_features, k),
                *(self.group, self.first, None if self.bias is None else self.bias.data_ptr()),
                out.data_ptr(),
            )
        return out


class PackedHeadsLinear(HeadsLinear):
    """A matrix for each head, each packed as in `PackedLinear`; in_features is even.

    Args:
        kernel: the C++ function.
    """

    def __init__(self, weight: Tensor, kernel: Any) -> None:
        super().__init__(weight)
        self._kernel = kernel

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        return torch.stack([PackedLinear.pack(each) for each in weight])

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        assert x.stride(2) == out.stride(2) == 1, "values of a head lie side by side"
        self._kernel(
            *(x.data_ptr(), x.stride(0), x.stride(1), x.shape[0], self.weight.data_ptr()),
            *(self.num_heads, self.out_features, self.in_features),
            *(out.data_ptr(), out.stride(0), out.stride(1)),
        )
        return out


class CompiledExperts(Experts):
    """Experts in one call: SiLU(gate) · up, or GELU(up) without a gate; then down.

    Args:
        held: experts whose linears have no biases, and are all read by one kernel.
        kernel: the C++ function.

    Attributes:
        matrices: arrays of addresses of gates (None without gates), ups and downs, each with its
            scales, if it has any.
    """

    def __init__(self, held: Sequence[Expert], activation: Activation, kernel: Any) -> None:
        super().__init__(held, activation)  # whose weights stay alive
        self._kernel, self._inner = kernel, held[0].up.out_features
        *gates, ups, downs = (
            _addresses(linears) for linears in zip(*(each.linears for each in held), strict=True)
        )
        self.matrices = (gates[0] if gates else None, ups, downs)


class PackedExperts(CompiledExperts):
    """Experts of `PackedLinear`; their inner width is a multiple of 32."""

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        num_pairs, hidden = pairs.rows.shape[0], rows.shape[1]
        out = rows.new_empty(num_pairs, hidden) if out is None else out
        if num_pairs:
            scratch, ends = rows.new_empty(num_pairs, self._inner), pairs.ends
            self._kernel(
                *(rows.data_ptr(), rows.stride(0), pairs.rows.data_ptr()),
                *(pairs.order.data_ptr(), ends.data_ptr(), ends.shape[0], *self.matrices),
                *(hidden, self._inner, scratch.data_ptr(), out.data_ptr()),
            )
        return out


class FewRowsExperts(PackedExperts):
    """Experts of `FewRowsLinear`, in one call while every expert has few pairs.

    Args:
        many: computes larger batches.
    """

    def __init__(self, many: Experts, kernel: Any) -> None:
        super().__init__(many.held, many.activation, kernel)
        self._many = many

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        num_pairs = pairs.rows.shape[0]
        most = int(pairs.counts.max()) if num_pairs > FEW_ROWS else num_pairs
        if most > FEW_ROWS or rows.stride(1) != 1:
            return self._many(rows, pairs, out)
        return super().__call__(rows, pairs, out)


class NarrowExperts(CompiledExperts):
    """Experts of `NarrowLinear`."""

    @staticmethod
    def suits(held: Sequence[Expert]) -> bool:
        """Whether gates and ups have scales for the same inputs, and downs, too."""

        def kinds(linears: Sequence[Linear]) -> set[tuple[bool, int, int]]:
            narrow = [each for each in linears if isinstance(each, NarrowLinear)]
            return {(each.is_float8, each.group, each.first) for each in narrow}

        inner = kinds([linear for expert in held for linear in expert.linears[:-1]])
        down = kinds([expert.down for expert in held])
        return len(inner) == len(down) == 1 and inner.pop()[0] == down.pop()[0]

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        num_pairs, hidden = len(pairs.rows), rows.shape[1]
        out = rows.new_empty(num_pairs, hidden) if out is None else out
        if num_pairs:
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            ends, up, down = pairs.ends, self.held[0].up, self.held[0].down
            assert isinstance(up, NarrowLinear)
            assert isinstance(down, NarrowLinear)
            self._kernel(
                *(up.is_float8, rows.dtype is torch.bfloat16, rows.data_ptr(), rows.stride(0)),
                *(pairs.rows.data_ptr(), pairs.order.data_ptr(), ends.data_ptr(), len(ends)),
                *(*self.matrices, hidden, self._inner, up.group, down.group, down.first),
                out.data_ptr(),
            )
        return out


def _addresses(linears: Sequence[Linear]) -> Any:
    """An array of the addresses of the linears' weights, each followed by that of its scales."""
    places = [
        tensor.data_ptr()
        for each in linears
        for tensor in each.tensors()[: 2 if isinstance(each, ScaledLinear) else 1]
    ]
    return (ctypes.c_void_p * len(places))(*places)
