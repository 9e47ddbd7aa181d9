"""Experts of a GPU: grouped products, from torch where it has them, else from a Triton kernel.

Gates and ups of all experts lie side by side, [E, 2 · inner, H], so that one product gives both.
The Triton product reads each pair's row where it lies and writes the last result where it belongs,
so nothing is permuted in memory; torch's takes rows that are copied in the order of experts. Which
tile of pairs belongs to which expert is found on the device, from counts.

Limits: in decode memory, the weights of all experts that have a pair over the card's bandwidth; in
prompts arithmetic, 2 · pairs · weights of an expert over its peak.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertlane.ops.cuda.activation import activate
from expertlane.ops.cuda.launch import launch
from expertlane.ops.products import (
    Activation,
    Expert,
    Experts,
    GroupedExperts,
    Linear,
    PairGroups,
    grouped_mm,
)


@triton.jit
def _grouped_kernel(
    x, weight, bias, counts, from_rows, to_rows, out,
    x_row, out_row, weight_expert, num_experts, out_features, in_features,
    HAS_BIAS: tl.constexpr, IS_GATHERED: tl.constexpr, IS_SCATTERED: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Tiles of all experts in order; programs beyond the last tile do nothing.
    tile = tl.program_id(1)
    numbers = tl.arange(0, EXPERTS)
    held = tl.load(counts + numbers, mask=numbers < num_experts, other=0).to(tl.int32)
    tiles = (held + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(tiles, axis=0)
    if tile >= tl.sum(tiles, axis=0):
        return
    expert = tl.sum((tile_ends <= tile).to(tl.int32), axis=0)
    before = numbers < expert
    tile -= tl.sum(tl.where(before, tiles, 0), axis=0)
    begin = tl.sum(tl.where(before, held, 0), axis=0)
    end = begin + tl.sum(tl.where(numbers == expert, held, 0), axis=0)
    pair = begin + tile * ROWS + tl.arange(0, ROWS)
    is_pair = pair < end
    row = pair.to(tl.int64)
    if IS_GATHERED:
        row = tl.load(from_rows + pair, mask=is_pair, other=0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    of_row = x + row[:, None] * x_row + depth[None, :]
    own = weight + expert.to(tl.int64) * weight_expert
    of_column = own + column[None, :].to(tl.int64) * in_features + depth[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, in_features, DEPTH):
        rest = in_features - start
        a = tl.load(of_row + start, mask=is_pair[:, None] & (depth < rest)[None, :], other=0.0)
        b = tl.load(
            of_column + start,
            mask=(column < out_features)[None, :] & (depth < rest)[:, None],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        shift = tl.load(
            bias + expert * out_features + column, mask=column < out_features, other=0.0
        )
        total += shift.to(tl.float32)[None, :]
    to = pair.to(tl.int64)
    if IS_SCATTERED:
        to = tl.load(to_rows + pair, mask=is_pair, other=0)
    tl.store(
        out + to[:, None] * out_row + column[None, :],
        total.to(out.dtype.element_ty),
        mask=is_pair[:, None] & (column < out_features)[None, :],
    )


def grouped_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    num_pairs: int,
    *,
    from_rows: Tensor | None = None,
    to_rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ + b of each pair with its expert's matrix.

    Args:
        x: [num_pairs, in_features] by expert; or [num_rows, in_features] and `from_rows`.
        weight: [E, out_features, in_features]; bias [E, out_features].
        counts: [E]; pairs of each expert.
        from_rows: [num_pairs]; the row of each pair.
        to_rows: [num_pairs]; where each result goes.
        out: [num_pairs, out_features]; what is returned, if given.
    """
    num_experts, out_features, in_features = weight.shape
    out = x.new_empty(num_pairs, out_features) if out is None else out
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns, depth, num_warps, num_stages = _tile(num_pairs, num_experts, x.itemsize)
    num_tiles = min(num_pairs, num_experts) + num_pairs // rows
    launch(
        _grouped_kernel,
        (triton.cdiv(out_features, columns), num_tiles if num_pairs else 0),
        *(x, weight, bias, counts, from_rows, to_rows, out, x.stride(0), out.stride(0)),
        *(weight.stride(0), num_experts, out_features, in_features),
        HAS_BIAS=bias is not None,
        IS_GATHERED=from_rows is not None,
        IS_SCATTERED=to_rows is not None,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def _tile(num_pairs: int, num_experts: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile, warps and stages, for the mean of pairs an expert."""
    if itemsize == 4:  # float32, for parity: multiplied without tensor cores
        return 16, 32, 32, 4, 2
    rows = min(128, max(16, triton.next_power_of_2(num_pairs // max(1, num_experts))))
    if rows <= 32:
        return rows, 128, 128, 4, 4
    return rows, 128, 64, 8 if rows == 128 else 4, 4


class CudaExperts(Experts):
    """Two grouped products and the activation between them, without a transfer to the host.

    Gates and ups, and downs, of all experts are put side by side, and each expert's become a part
    of that.

    Args:
        groups: torch's grouped product, [P, N] of [P, K], [E, K, N] and ends [E]; None for ours.
    """

    def __init__(
        self,
        held: Sequence[Expert],
        activation: Activation,
        groups: Callable[..., Tensor] | None,
    ) -> None:
        super().__init__(held, activation)
        self._groups = groups
        self._is_gated = held[0].gate is not None
        self._inner = side_by_side([each.linears[:-1] for each in held])
        self._down = side_by_side([[each.down] for each in held])

    @staticmethod
    def suits(held: Sequence[Expert]) -> bool:
        """Whether weights are as torch has them, and of one kind."""
        linears = [linear for expert in held for linear in expert.linears]
        biased = {
            (linear is expert.down, linear.bias is not None)
            for expert in held
            for linear in expert.linears
        }
        return all(type(each) is Linear for each in linears) and len(biased) == 2

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        """[P, H]."""
        num_pairs = pairs.rows.shape[0]
        (inner_weight, inner_bias), (down_weight, down_bias) = self._inner, self._down
        if self._groups is None or not num_pairs:
            inner = grouped_product(
                rows, inner_weight, inner_bias, pairs.counts, num_pairs, from_rows=pairs.rows
            )
            inner = self._activate(inner, pairs)
            return grouped_product(
                inner, down_weight, down_bias, pairs.counts, num_pairs,
                to_rows=pairs.order, out=out,
            )  # fmt: skip
        ends = pairs.counts.cumsum(0, dtype=torch.int32)

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            assert self._groups is not None
            result = self._groups(x, weight.transpose(1, 2), offs=ends)
            if bias is not None:
                result += pairs.of_pairs(bias)
            return result

        inner = product(rows.index_select(0, pairs.rows), inner_weight, inner_bias)
        inner = self._activate(inner, pairs)
        results = product(inner, down_weight, down_bias)
        out = torch.empty_like(results) if out is None else out
        return out.index_copy_(0, pairs.order, results)

    def _activate(self, inner: Tensor, pairs: PairGroups) -> Tensor:
        return activate(inner, self.activation, is_gated=self._is_gated, counts=pairs.counts)


def experts_of(held: Sequence[Expert], activation: Activation) -> CudaExperts:
    """With torch's grouped products where it has them for these weights, else with ours."""
    return CudaExperts(held, activation, grouped_mm if GroupedExperts.suits(held) else None)


def side_by_side(linears: Sequence[Sequence[Linear]]) -> tuple[Tensor, Tensor | None]:
    """Weights [E, rows of all, in_features] and biases of each expert's linears.

    The weights become parts of that, one after the other, so that little is held twice.
    """
    first = linears[0][0].weight
    num_rows = [each.out_features for each in linears[0]]
    weight = first.new_empty(len(linears), sum(num_rows), first.shape[1])
    for own, of_expert in zip(linears, weight.unbind(), strict=True):
        torch.cat([each.weight for each in own], out=of_expert)
        for linear, part in zip(own, of_expert.split(num_rows), strict=True):
            linear.weight = part
    biases = [[each.bias for each in own if each.bias is not None] for own in linears]
    return weight, torch.stack([torch.cat(own) for own in biases]) if biases[0] else None
