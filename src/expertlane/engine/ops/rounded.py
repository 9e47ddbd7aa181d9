"""Products whose inputs are rounded to float8 (e4m3), each 128 inputs of a token with a scale.

DeepSeek-V3's float8 matrices are made for such inputs (arXiv:2412.19437, section 3.3). Scales are
powers of two (`engine/ops/float8.py`), as DeepSeek-V3.1's are: then rounded inputs are exact in
every type that models compute in, so any product can take them and all backends compute one
function. A token's rounding depends on its own values alone.
"""

from collections.abc import Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.ops.float8 import from_float8, to_float8
from expertlane.engine.ops.products import Linear
from expertlane.spec.deployment import INPUTS_OF_SCALE


def rounded_inputs(x: Tensor) -> Tensor:
    """x [num_rows, in_features] with each group of inputs rounded to float8 and widened again."""
    num_rows, num_inputs = x.shape
    missing = -num_inputs % INPUTS_OF_SCALE
    padded = F.pad(x, (0, missing)) if missing else x
    num_groups = padded.shape[1] // INPUTS_OF_SCALE
    groups = padded.reshape(num_rows, num_groups, INPUTS_OF_SCALE)
    return from_float8(*to_float8(groups), x.dtype).flatten(1)[:, :num_inputs]


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
