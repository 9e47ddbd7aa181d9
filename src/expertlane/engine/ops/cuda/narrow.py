"""Linears whose weights of one byte, or of four bits, stay narrow on a GPU."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from expertlane.engine.ops.cuda.grouped import grouped_product
from expertlane.engine.ops.cuda.matrices import Matrices
from expertlane.engine.ops.mxfp4 import Mxfp4Weight
from expertlane.engine.ops.narrow import NarrowWeight, ScaledLinear
from expertlane.spec.hf_config import MXFP4_BLOCK

_LEAST_GROUP = 32  # inputs that a step of a product takes at least


class CudaNarrowLinear(ScaledLinear):
    """A linear that widens its weight as it reads it.

    Args:
        weight: one that `suits` accepts.
        takes_float8: inputs are rounded to float8, and multiplied in float8.

    Attributes:
        weight: [out_features, in_features] int8 or float8; of MXFP4 [out_features,
            in_features / 2] uint8.
    """

    is_packed = True

    def __init__(
        self,
        weight: NarrowWeight | Mxfp4Weight,
        bias: Tensor | None,
        *,
        takes_float8: bool = False,
    ) -> None:
        self.takes_float8 = takes_float8
        if isinstance(weight, NarrowWeight):
            self.weight, self.group, self.first = weight.values, weight.group, weight.first
            self.rows = weight.rows
        else:
            self.weight, self.group, self.first = weight.blocks, MXFP4_BLOCK, 0
        self.scales, self.bias, self.itemsize = weight.scales, bias, 1
        self.out_features, self.in_features = weight.shape

    @staticmethod
    def suits(weight: NarrowWeight | Mxfp4Weight) -> bool:
        """Whether the kernel takes the weight: each of its steps has to lie in one group."""
        if isinstance(weight, Mxfp4Weight):
            return weight.blocks.numel() > 0
        has_one_group = weight.scales.shape[1] == 1
        return weight.values.numel() > 0 and (has_one_group or weight.group % _LEAST_GROUP == 0)

    def tensors(self) -> list[Tensor]:
        """Values as bytes, since not every transport knows float8; scales and bias."""
        return [self.weight.view(torch.uint8), *super().tensors()[1:]]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """A copy of this linear with other weights, as `tensors` gives them."""
        return super().with_tensors([tensors[0].view(self.weight.dtype), *tensors[1:]])

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrix; of MXFP4 with its scales, as projections count them."""
        is_mxfp4 = self.weight.dtype is torch.uint8
        return self.weight.nbytes + (self.scales.nbytes if is_mxfp4 else 0)

    def __call__(self, x: Tensor) -> Tensor:
        """x · Wᵀ + b [num_rows, out_features], of x [num_rows, in_features]."""
        return grouped_product(x, Matrices.one(self), None, x.shape[0])
