"""Matrix products with weights that are kept as the device multiplies fastest.

On a CPU, bfloat16 weights are packed once: for our own kernels (`ops/products.cpp`), or for
oneDNN where those are missing. Products of few rows then read memory at most of its bandwidth,
which torch's own product, packing anew at every call, does not (`docs/log.md`). Elsewhere, and in
float32, weights stay as they are.
"""

from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.ops.backend import arithmetic_for
from expertlane.ops.cpu import CpuKernels


class Linear:
    """x · Wᵀ + b.

    Args:
        weight: [out_features, in_features]; not kept where it is packed.
        bias: [out_features].

    Attributes:
        kernels: our own, which `packed` is for; None where torch multiplies.
        packed: the weight as it is kept.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.itemsize = weight.itemsize
        self.kernels = arithmetic_for(weight) if self.in_features % 2 == 0 else None
        self._is_onednn = self.kernels is None and _suits_onednn(weight)
        if self.kernels is not None:
            self.packed = CpuKernels.pack(weight)
            bias = None if bias is None else bias.float()
        elif self._is_onednn:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        else:
            self.packed = weight
        self.bias = bias

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
        weight = self.packed.to_dense() if self._is_onednn else self.packed
        return [weight] if self.bias is None else [weight, self.bias]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Linear":
        """The same product with other weights of the same shape; they are kept, not copied."""
        other = copy(self)
        weight = tensors[0]
        if self._is_onednn:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        other.packed = weight
        other.bias = tensors[1] if len(tensors) > 1 else None
        return other

    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, out_features] of [num_rows, in_features]."""
        if self.kernels is not None:
            return self.kernels.linear(x, self.packed, self.out_features, self.bias)
        if self._is_onednn and len(x):
            product: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.packed, self.bias, "none", [], ""
            )
            return product
        if self._is_onednn:
            return x.new_empty(0, self.out_features)
        return F.linear(x, self.packed, self.bias)


def _suits_onednn(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and weight.numel() > 0
        and torch._C._has_mkldnn
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
