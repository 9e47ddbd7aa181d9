"""The number types of servers: how each rounds weights and inputs of matrices.

To measure what rounding alone does to a model's log-probabilities. Every rounding gives the rounded
numbers in a wider type.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from expertlane.spec.deployment import INPUTS_OF_SCALE

_INT8_MAX, _FLOAT8_MAX, _E2M1_MAX = 127.0, 448.0, 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NVFP4_GROUP = 16

Round = Callable[[Tensor], Tensor]


def to_int8(matrix: Tensor) -> Tensor:
    """Each 128 inputs of a row as whole numbers up to 127 times a scale: `--weights int8`.

    Args:
        matrix: [out_features, in_features] float32.
    """
    groups, width = _in_groups(matrix, INPUTS_OF_SCALE)
    scales = groups.abs().amax(-1, keepdim=True) / _INT8_MAX
    values = torch.round(groups / scales.where(scales > 0, 1.0)).clamp_(-_INT8_MAX, _INT8_MAX)
    return (values * scales).flatten(-2)[..., :width]


def to_float8(matrix: Tensor) -> Tensor:
    """A whole matrix in e4m3 times one scale, as vLLM's `--quantization fp8` makes it."""
    return _as_e4m3(matrix, matrix.abs().amax() / _FLOAT8_MAX)


def rows_to_float8(x: Tensor) -> Tensor:
    """Each token's inputs [..., in_features] in e4m3 times a scale of their own."""
    wide = x.float()
    return _as_e4m3(wide, wide.abs().amax(-1, keepdim=True) / _FLOAT8_MAX).to(x.dtype)


def to_nvfp4(x: Tensor) -> Tensor:
    """Each 16 inputs of a row in e2m1 times a scale in e4m3, and one for all of them (NVFP4).

    Args:
        x: [..., in_features].
    """
    groups, width = _in_groups(x.float(), _NVFP4_GROUP)
    whole = (groups.abs().amax() / (_E2M1_MAX * _FLOAT8_MAX)).clamp(min=torch.finfo().tiny)
    scales = (groups.abs().amax(-1, keepdim=True) / _E2M1_MAX / whole).to(torch.float8_e4m3fn)
    scales = scales.float() * whole
    scaled = groups / scales.where(scales > 0, 1.0)
    levels = torch.tensor(_E2M1)
    nearest = torch.bucketize(scaled.abs(), (levels[1:] + levels[:-1]) / 2)
    values = levels[nearest].copysign(scaled) * scales
    return values.flatten(-2)[..., :width].to(x.dtype)


def _in_groups(x: Tensor, size: int) -> tuple[Tensor, int]:
    """x [..., width] as [..., num_groups, size], the last group filled up with zeros."""
    width = x.shape[-1]
    padded = F.pad(x, (0, -width % size))
    return padded.view(*x.shape[:-1], padded.shape[-1] // size, size), width


def _as_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    scale = scale.where(scale > 0, 1.0)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@dataclass(frozen=True)
class NumberType:
    """Number type of a server's weights and products.

    Attributes:
        dtype: that of activations; None for the checkpoint's own.
        weights: rounds a matrix [out_features, in_features]; None where they stay.
        inputs: rounds inputs [..., in_features] of such matrices; None where they stay.
        rounds_head: whether the output head is such a matrix.
    """

    dtype: torch.dtype | None = None
    weights: Round | None = None
    inputs: Round | None = None
    rounds_head: bool = False


NUMBER_TYPES = {
    "float32": NumberType(torch.float32),
    "bfloat16": NumberType(torch.bfloat16),
    "float16": NumberType(torch.float16),
    "int8": NumberType(weights=to_int8, rounds_head=True),
    "float8": NumberType(weights=to_float8, inputs=rows_to_float8),
    "nvfp4": NumberType(weights=to_nvfp4, inputs=to_nvfp4),
}


class RoundedInputs(TorchFunctionMode):
    """While it is entered, products with some matrices get rounded inputs.

    Args:
        matrices: those; slices of them, such as one expert's, count too.
    """

    def __init__(self, rounded: Round, matrices: list[Tensor]) -> None:
        super().__init__()
        self._rounded = rounded
        self._kept = {each.untyped_storage().data_ptr() for each in matrices}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and len(args) > 1:
            x, weight = args[:2]
            if weight.untyped_storage().data_ptr() in self._kept:
                args = (self._rounded(x), *args[1:])
        return func(*args, **(kwargs or {}))
