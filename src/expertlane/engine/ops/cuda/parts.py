"""Attention and MLPs as few launches: torch's products with our kernels between them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.ops.cuda.activation import activate
from expertlane.engine.ops.cuda.flash import attend
from expertlane.engine.ops.cuda.grouped import grouped_product
from expertlane.engine.ops.cuda.matrices import Matrices, kind_of
from expertlane.engine.ops.cuda.narrow import CudaNarrowLinear
from expertlane.engine.ops.cuda.norm import rms_norm
from expertlane.engine.ops.cuda.rotate import rotate_and_write
from expertlane.engine.ops.kv_cache import KVCache, PagedBatch
from expertlane.engine.ops.products import Activation, Expert, Linear
from expertlane.engine.ops.step import AttentionWeights


class CudaAttention:
    """Multi-head or grouped-query attention in five launches, or six with a norm."""

    def __init__(self, weights: AttentionWeights) -> None:
        self._weights = weights

    def takes(self, x: Tensor) -> bool:
        """Whether there are tokens."""
        return x.shape[0] > 0

    def __call__(self, x: Tensor, cache: KVCache, batch: PagedBatch, *, adds_input: bool) -> Tensor:
        """Store the tokens' keys and values, and attend; see `AttentionCall`."""
        own = self._weights
        hidden = x if own.norm is None else rms_norm(x, own.norm, own.eps)
        heads = own.num_heads + 2 * own.num_kv_heads
        projected = own.query_key_value(hidden).view(x.shape[0], heads, own.head_dim)
        query = rotate_and_write(
            projected,
            own.num_heads,
            (batch.positions, own.cos, own.sin),
            own.head_norms,
            own.eps,
            batch.slots,
            cache,
            interleave=own.interleave,
        )
        attended = attend(query, cache, batch, own.params).flatten(1)
        if not adds_input:
            return own.output(attended)
        if type(own.output) is Linear and own.output.bias is None:  # the product adds x itself
            return torch.addmm(x, attended, own.output.weight.t())
        return x + own.output(attended)


class CudaMlp:
    """An MLP whose gate and up projections are one product, and whose activation is one kernel.

    Gate and up weights are concatenated, and each becomes a view of the whole.
    """

    def __init__(
        self,
        mlp: Expert,
        activation: Activation,
        norm: Tensor | None,
        eps: float,
        scale: Tensor | None,
    ) -> None:
        self._down, self._activation = mlp.down, activation
        self._norm, self._eps, self._scale = norm, eps, scale
        self._is_gated = mlp.gate is not None
        self._inner = Matrices.of([mlp.linears[:-1]])

    @staticmethod
    def suits(mlp: Expert) -> bool:
        """Whether the MLP has no biases, and its gate and up are of one kind (`kind_of`)."""
        kinds = {type(each) for each in mlp.linears}
        return (
            kinds <= {Linear, CudaNarrowLinear}
            and all(each.bias is None for each in mlp.linears)
            and len({kind_of(each) for each in mlp.linears[:-1]}) == 1
        )

    def takes(self, x: Tensor) -> bool:
        """Whether there are tokens."""
        return x.shape[0] > 0

    def __call__(self, x: Tensor) -> Tensor:
        """The MLP's output [num_tokens, hidden_size], of x [num_tokens, hidden_size]."""
        hidden = x if self._norm is None else rms_norm(x, self._norm, self._eps)
        if self._inner.scales is None:
            inner = F.linear(hidden, self._inner.weight.squeeze(0))
        else:
            inner = grouped_product(hidden, self._inner, None, hidden.shape[0])
        inner = activate(inner, self._activation, is_gated=self._is_gated)
        out = self._down(inner)
        return out if self._scale is None else out * torch.sigmoid(F.linear(hidden, self._scale))
