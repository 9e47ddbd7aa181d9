"""Matrices of one shape side by side in memory, as grouped products read them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from expertlane.engine.ops.narrow import shared_rows
from expertlane.engine.ops.products import Linear, ScaledLinear


@dataclass(frozen=True, eq=False)
class Matrices:
    """Stacked weights of several matrices, with their scales and biases.

    Attributes:
        weight: [num, out_features, in_features]; of MXFP4 [num, out_features, in_features / 2]
            uint8.
        scales: [num, out_features, num_groups]; None where weights have none.
        bias: [num, out_features].
        group, first, rows: see `NarrowWeight`.
        takes_float8: products round their inputs (`engine/ops/float8.py`).
    """

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None
    group: int = 0
    first: int = 0
    rows: int = 1
    takes_float8: bool = False

    @classmethod
    def one(cls, linear: Linear) -> Self:
        """The matrix of one linear."""
        bias = None if linear.bias is None else linear.bias.unsqueeze(0)
        if not isinstance(linear, ScaledLinear):
            return cls(linear.weight.unsqueeze(0), None, bias)
        parts = linear.weight.unsqueeze(0), linear.scales.unsqueeze(0), bias
        return cls(*parts, linear.group, linear.first, linear.rows, linear.takes_float8)

    @classmethod
    def of(cls, linears: Sequence[Sequence[Linear]]) -> Self:
        """Stack matrices, each the concatenated outputs of its linears; all of one `kind_of`.

        The linears' weights become views of the stack, one matrix after the other, so that little
        is held twice.
        """
        first = linears[0][0]
        biases = [[each.bias for each in own if each.bias is not None] for own in linears]
        bias = torch.stack([torch.cat(own) for own in biases]) if biases[0] else None
        weight = _side_by_side(linears, "weight")
        if not isinstance(first, ScaledLinear):
            return cls(weight, None, bias)
        parts = weight, _side_by_side(linears, "scales"), bias
        own = linears[0]
        rows = shared_rows(first.rows, [each.out_features for each in own])
        return cls(*parts, first.group, first.first, rows, first.takes_float8)

    @property
    def num(self) -> int:
        """Number of matrices."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Outputs of each matrix."""
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        """Inputs of each matrix."""
        return self.weight.shape[2] * (2 if self.bits == 4 else 1)

    @property
    def bits(self) -> int:
        """Bits of a weight, without its scale."""
        return 4 if self.weight.dtype is torch.uint8 else 8 * self.weight.itemsize

    @property
    def num_groups(self) -> int:
        """Groups of inputs that share a scale; 0 without scales."""
        return 0 if self.scales is None else self.scales.shape[2]


def kind_of(linear: Linear) -> Hashable:
    """The key that linears must share to be stacked, beside their number of inputs."""
    kind = type(linear), linear.weight.dtype, linear.bias is not None
    if not isinstance(linear, ScaledLinear):
        return kind
    return (*kind, linear.group, linear.first, linear.rows, linear.takes_float8)


def _side_by_side(linears: Sequence[Sequence[Linear]], name: str) -> Tensor:
    """Stack an attribute of linears as [num, rows of all, columns]; each becomes a view of it."""
    like: Tensor = getattr(linears[0][0], name)
    if len(linears) == len(linears[0]) == 1:
        return like.unsqueeze(0)
    num_rows = [each.out_features for each in linears[0]]
    whole = like.new_empty(len(linears), sum(num_rows), like.shape[1])
    for own, of_matrix in zip(linears, whole.unbind(), strict=True):
        parts = [_bytes_if_one(getattr(each, name)) for each in own]
        torch.cat(parts, out=_bytes_if_one(of_matrix))
        for linear, part in zip(own, of_matrix.split(num_rows), strict=True):
            setattr(linear, name, part)
    return whole


def _bytes_if_one(x: Tensor) -> Tensor:
    """x, viewed as bytes if its values are of one byte: not every torch operation knows float8."""
    return x.view(torch.uint8) if x.itemsize == 1 else x
