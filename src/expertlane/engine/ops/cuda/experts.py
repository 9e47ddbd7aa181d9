"""Experts of a GPU: grouped products, from torch where it has them, else ours.

Gates and ups of all experts lie side by side, [E, 2 · inner, H], so that one product gives both.
Ours permutes nothing in memory (`engine/ops/cuda/grouped.py`); torch's needs rows copied in the
order of experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expertlane.engine.ops.cuda.activation import activate
from expertlane.engine.ops.cuda.grouped import grouped_product
from expertlane.engine.ops.cuda.matrices import Matrices, kind_of
from expertlane.engine.ops.cuda.narrow import CudaNarrowLinear
from expertlane.engine.ops.products import (
    Activation,
    Expert,
    Experts,
    GroupedExperts,
    Linear,
    PairGroups,
    grouped_mm,
)

_KINDS = (Linear, CudaNarrowLinear)


class CudaExperts(Experts):
    """Two grouped products and the activation between them, without a transfer to the host.

    Gates and ups, and downs, of all experts are stacked; each expert's become views of the stacks.

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
        self._inner = Matrices.of([each.linears[:-1] for each in held])
        self._down = Matrices.of([[each.down] for each in held])

    @staticmethod
    def suits(held: Sequence[Expert]) -> bool:
        """Whether our grouped product takes the weights: experts of one kind (`kind_of`)."""
        linears = [linear for expert in held for linear in expert.linears]
        kinds = {
            (linear is expert.down, kind_of(linear)) for expert in held for linear in expert.linears
        }
        return len(kinds) == 2 and all(type(each) in _KINDS for each in linears)

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        """Results [P, H]; see `Experts`."""
        num_pairs = pairs.rows.shape[0]
        if self._groups is None or not num_pairs:
            inner = grouped_product(
                rows, self._inner, pairs.counts, num_pairs, from_rows=pairs.rows
            )
            inner = self._activate(inner, pairs)
            return grouped_product(
                inner, self._down, pairs.counts, num_pairs, to_rows=pairs.order, out=out
            )
        ends = pairs.counts.cumsum(0, dtype=torch.int32)

        def product(x: Tensor, matrices: Matrices) -> Tensor:
            assert self._groups is not None
            result = self._groups(x, matrices.weight.transpose(1, 2), offs=ends)
            if matrices.bias is not None:
                result += pairs.of_pairs(matrices.bias)
            return result

        inner = product(rows.index_select(0, pairs.rows), self._inner)
        inner = self._activate(inner, pairs)
        results = product(inner, self._down)
        out = torch.empty_like(results) if out is None else out
        return out.index_copy_(0, pairs.order, results)

    def _activate(self, inner: Tensor, pairs: PairGroups) -> Tensor:
        return activate(inner, self.activation, is_gated=self._is_gated, counts=pairs.counts)


def experts_of(held: Sequence[Expert], activation: Activation) -> CudaExperts:
    """A rank's experts, with torch's grouped products if it has them for these weights."""
    return CudaExperts(held, activation, grouped_mm if GroupedExperts.suits(held) else None)
