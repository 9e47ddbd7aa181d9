"""Matrix products with weights that are kept as the device multiplies fastest.

On a CPU, bfloat16 weights are packed once: for our own kernels (`ops/cpu.py`), or for oneDNN where
those are missing. Products of few rows then read memory at most of its bandwidth, which torch's own
product, packing anew at every call, does not (`docs/log.md`). Elsewhere, and in float32, weights
stay as they are.
"""

from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """x · Wᵀ + b.

    Args:
        weight: [out_features, in_features]; not kept where it is packed.
        bias: [out_features].

    Attributes:
        weight: as it is kept.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.itemsize = weight.itemsize
        self.weight, self.bias = self.pack(weight), bias

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """[out_features, in_features] as it is to be kept."""
        return weight

    @property
    def num_weights(self) -> int:
        """Values of the matrix."""
        return self.out_features * self.in_features

    @property
    def num_bytes(self) -> int:
        """Of the matrix."""
        return self.num_weights * self.itemsize

    def tensors(self) -> list[Tensor]:
        """Weight and bias in a form that can be sent and given to `with_tensors`."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same product with other weights of the same shape; they are kept, not copied."""
        other = copy(self)
        other.weight = tensors[0]
        other.bias = tensors[1] if len(tensors) > 1 else None
        return other

    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, out_features] of [num_rows, in_features]."""
        return F.linear(x, self.weight, self.bias)


class OnednnLinear(Linear):
    """The weight as oneDNN packs it, which only oneDNN reads: it is sent as torch has it."""

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Whether this CPU gains by it."""
        return (
            weight.device.type == "cpu"
            and weight.dtype is torch.bfloat16
            and weight.numel() > 0
            and torch._C._has_mkldnn
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """In oneDNN's own layout."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return packed

    def tensors(self) -> list[Tensor]:
        """Unpacked, copies."""
        return [self.weight.to_dense(), *super().tensors()[1:]]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same product with other weights; they are packed, not kept."""
        return super().with_tensors([self.pack(tensors[0]), *tensors[1:]])

    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, out_features] of [num_rows, in_features]; oneDNN refuses no rows."""
        if not len(x):
            return x.new_empty(0, self.out_features)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "none", [], ""
        )
        return product
