"""Linears, MLPs, experts and attention in few launches: products with our kernels between them."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.ops.cuda.compiled import activate, norm_and_rotate, rms_norm, write
from expertlane.engine.ops.cuda.flash import attend
from expertlane.engine.ops.cuda.grouped import grouped_product
from expertlane.engine.ops.cuda.matrices import Matrices, kind_of
from expertlane.engine.ops.kv_cache import KVCache, PagedBatch
from expertlane.engine.ops.narrow import Mxfp4Weight, NarrowWeight
from expertlane.engine.ops.products import (
    Activation,
    Expert,
    Experts,
    Linear,
    PairGroups,
    ScaledLinear,
)
from expertlane.engine.ops.step import AttentionWeights, MlpWeights
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


_KINDS = (Linear, CudaNarrowLinear)


class CudaExperts(Experts):
    """Two grouped products and the activation between them, without a transfer to the host.

    Gates and ups of all experts lie side by side, [E, 2 · inner, H], so that one product gives
    both; each expert's become views of the stacks. Our product permutes nothing in memory
    (`engine/ops/cuda/grouped.py`); torch's needs rows copied in the order of experts.

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
        self._inner = Matrices.of([each.linears[:-1] for each in held])
        self._down = Matrices.of([[each.down] for each in held])

    @staticmethod
    def suits(held: Sequence[Expert]) -> bool:
        """Whether our grouped product takes the weights: experts of one kind (`kind_of`)."""
        linears = [(linear, linear is each.down) for each in held for linear in each.linears]
        kinds = {(is_down, kind_of(linear)) for linear, is_down in linears}
        return len(kinds) == 2 and all(type(linear) in _KINDS for linear, _ in linears)

    def __call__(self, rows: Tensor, pairs: PairGroups, out: Tensor | None = None) -> Tensor:
        """Results [P, H]; see `Experts`."""
        num_pairs, counts = pairs.rows.shape[0], pairs.counts
        is_ours = self._groups is None or not num_pairs
        if is_ours:
            inner = grouped_product(rows, self._inner, counts, num_pairs, from_rows=pairs.rows)
        else:
            inner = self._grouped(rows.index_select(0, pairs.rows), self._inner, pairs)
        is_gated = self.held[0].gate is not None
        inner = activate(inner, self.activation, is_gated=is_gated)
        if is_ours:
            order = pairs.order
            return grouped_product(inner, self._down, counts, num_pairs, to_rows=order, out=out)
        results = self._grouped(inner, self._down, pairs)
        out = torch.empty_like(results) if out is None else out
        return out.index_copy_(0, pairs.order, results)

    def _grouped(self, x: Tensor, matrices: Matrices, pairs: PairGroups) -> Tensor:
        """Torch's grouped product of rows in the order of experts."""
        assert self._groups is not None
        ends = pairs.counts.cumsum(0, dtype=torch.int32)
        result = self._groups(x, matrices.weight.transpose(1, 2), offs=ends)
        if matrices.bias is not None:
            result += pairs.of_pairs(matrices.bias)
        return result


class _Part:
    def takes(self, x: Tensor) -> bool:
        """Whether there are tokens."""
        return x.shape[0] > 0


class CudaAttention(_Part):
    """Multi-head or grouped-query attention, from hidden states to hidden states."""

    def __init__(self, weights: AttentionWeights) -> None:
        self._weights = weights

    def __call__(self, x: Tensor, cache: KVCache, batch: PagedBatch, *, adds_input: bool) -> Tensor:
        """Store the tokens' keys and values, and attend; see `AttentionCall`."""
        own = self._weights
        hidden = x if own.norm is None else rms_norm(x, own.norm, own.eps)
        heads = own.num_heads + 2 * own.num_kv_heads
        projected = own.query_key_value(hidden).view(x.shape[0], heads, own.head_dim)
        query_key, value = projected.split([heads - own.num_kv_heads, own.num_kv_heads], dim=1)
        angles, norms = (batch.positions, own.cos, own.sin), own.head_norms
        query_key = norm_and_rotate(query_key, *angles, norms, own.eps, interleave=own.interleave)
        query, key = query_key.split([own.num_heads, own.num_kv_heads], dim=1)
        write(cache, batch.slots, key, value)
        attended = attend(query, cache, batch, own.params).flatten(1)
        if not adds_input:
            return own.output(attended)
        if type(own.output) is Linear and own.output.bias is None:  # the product adds x itself
            return torch.addmm(x, attended, own.output.weight.t())
        return x + own.output(attended)


class CudaMlp(_Part):
    """An MLP whose gate and up projections are one product, and whose activation is one kernel.

    Gate and up weights are concatenated, and each becomes a view of the whole.
    """

    def __init__(self, weights: MlpWeights) -> None:
        self._weights = weights
        self._inner = Matrices.of([weights.mlp.linears[:-1]])

    @staticmethod
    def suits(mlp: Expert) -> bool:
        """Whether the MLP has no biases, and its gate and up are of one kind (`kind_of`)."""
        kinds = {type(each) for each in mlp.linears}
        return (
            kinds <= {*_KINDS}
            and all(each.bias is None for each in mlp.linears)
            and len({kind_of(each) for each in mlp.linears[:-1]}) == 1
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The MLP's output [num_tokens, hidden_size], of x [num_tokens, hidden_size]."""
        mlp, activation, norm, eps, scale = self._weights
        hidden = x if norm is None else rms_norm(x, norm, eps)
        if self._inner.scales is None:
            inner = F.linear(hidden, self._inner.weight.squeeze(0))
        else:
            inner = grouped_product(hidden, self._inner, None, hidden.shape[0])
        out = mlp.down(activate(inner, activation, is_gated=mlp.gate is not None))
        return out if scale is None else out * torch.sigmoid(F.linear(hidden, scale))
