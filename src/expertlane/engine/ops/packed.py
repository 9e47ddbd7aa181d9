"""Linears and experts of our C++ kernels: bfloat16 with packed weights, float32 for few rows.

`engine/ops/vector.py` chooses them; shapes as in `engine/ops/products.py`.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertlane.engine.ops.products import (
    Activation,
    Expert,
    Experts,
    HeadsLinear,
    Linear,
    PairGroups,
)

LANES = 16  # outputs of a packed block
FEW_ROWS = 32  # in float32: with more, torch's own products are faster


class PackedLinear(Linear):
    """A bfloat16 linear; weight [n, k], k even, is packed as [n / 16, k / 2, 16, 2], n padded.

    Args:
        bias: [n] float32.
        function: the kernel.
    """

    is_packed = True

    def __init__(self, weight: Tensor, bias: Tensor | None, function: Any) -> None:
        super().__init__(weight, bias)
        self._function = function

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        n, k = weight.shape
        missing = -n % LANES
        if missing:
            weight = torch.cat([weight, weight.new_zeros(missing, k)])
        return weight.view(-1, LANES, k // 2, 2).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        m, k = x.shape
        out = x.new_empty(m, self.out_features)
        if m:
            x = x if x.stride(1) == 1 else x.contiguous()
            shift = None if self.bias is None else self.bias.data_ptr()
            self._function(
                *(x.data_ptr(), x.stride(0), m, self.weight.data_ptr(), self.out_features, k),
                *(shift, out.data_ptr()),
            )
        return out


class PackedHeadsLinear(HeadsLinear):
    """A matrix for each head, each packed as in `PackedLinear`; in_features is even.

    Args:
        function: the kernel.
    """

    def __init__(self, weight: Tensor, function: Any) -> None:
        super().__init__(weight)
        self._function = function

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        return torch.stack([PackedLinear.pack(each) for each in weight])

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        assert x.stride(2) == out.stride(2) == 1, "values of a head lie side by side"
        self._function(
            *(x.data_ptr(), x.stride(0), x.stride(1), x.shape[0], self.weight.data_ptr()),
            *(self.num_heads, self.out_features, self.in_features),
            *(out.data_ptr(), out.stride(0), out.stride(1)),
        )
        return out


class PackedExperts(Experts):
    """Experts with packed weights in one kernel call.

    It computes SiLU(gate) · up, or GELU(up) without a gate; then down.

    Args:
        held: experts of packed weights without biases, their inner width a multiple of 32.
        function: the kernel.
    """

    def __init__(self, held: Sequence[Expert], activation: Activation, function: Any) -> None:
        super().__init__(held, activation)  # whose weights stay alive
        self._function = function
        self._inner = held[0].up.out_features
        self.matrices = _matrices(held)

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        num_pairs, hidden = pairs.rows.shape[0], rows.shape[1]
        out = rows.new_empty(num_pairs, hidden) if out is None else out
        scratch = rows.new_empty(num_pairs, self._inner)
        if num_pairs:
            ends = pairs.ends
            self._function(
                *(rows.data_ptr(), rows.stride(0), pairs.rows.data_ptr()),
                *(pairs.order.data_ptr(), ends.data_ptr(), ends.shape[0], *self.matrices),
                *(hidden, self._inner, scratch.data_ptr(), out.data_ptr()),
            )
        return out


class FewRowsLinear(Linear):
    """A float32 linear, its weight not packed: our kernel for few rows, torch's product for more.

    Args:
        function: the kernel.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, function: Any) -> None:
        super().__init__(weight, bias)
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        m, k = x.shape
        if not 0 < m <= FEW_ROWS or x.stride(1) != 1 or x.dtype is not torch.float32:
            return super().__call__(x)
        out = x.new_empty(m, self.out_features)
        self._function(
            *(x.data_ptr(), x.stride(0), m, self.weight.data_ptr(), self.out_features, k),
            *(None if self.bias is None else self.bias.data_ptr(), out.data_ptr()),
        )
        return out


class FewRowsExperts(Experts):
    """Experts in one kernel call while every expert has few pairs.

    Args:
        many: computes larger batches; its weights are float32 without biases.
        function: the kernel.
    """

    def __init__(self, many: Experts, function: Any) -> None:
        super().__init__(many.held, many.activation)
        self._many, self._function = many, function
        self._inner = self.held[0].up.out_features
        self.matrices = _matrices(self.held)

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        num_pairs, hidden = pairs.rows.shape[0], rows.shape[1]
        most = int(pairs.counts.max()) if num_pairs > FEW_ROWS else num_pairs
        if not 0 < most <= FEW_ROWS or rows.stride(1) != 1:
            return self._many(rows, pairs, out)
        out = rows.new_empty(num_pairs, hidden) if out is None else out
        scratch, ends = rows.new_empty(num_pairs, self._inner), pairs.ends
        self._function(
            *(rows.data_ptr(), rows.stride(0), pairs.rows.data_ptr()),
            *(pairs.order.data_ptr(), ends.data_ptr(), len(self.held), *self.matrices),
            *(hidden, self._inner, scratch.data_ptr(), out.data_ptr()),
        )
        return out


def _matrices(held: Sequence[Expert]) -> tuple[Any, Any, Any]:
    """Arrays of addresses of gates (None without gates), ups and downs."""
    gates = [expert.gate for expert in held if expert.gate is not None]
    return (
        _pointers(gates) if gates else None,
        _pointers([expert.up for expert in held]),
        _pointers([expert.down for expert in held]),
    )


def _pointers(linears: Sequence[Linear]) -> Any:
    """An array of the addresses of the linears' weights."""
    return (ctypes.c_void_p * len(linears))(*(linear.weight.data_ptr() for linear in linears))
