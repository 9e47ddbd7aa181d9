"""Attention, MLPs, the output head and whole layers as one C++ call each.

Where the C++ (`step.cpp`, `mlp.cpp`, `layers.cpp`) lacks what a model needs, layers call the
backend's operations one by one.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.moe_step import LocalExperts
from expertlane.engine.ops.packed import CompiledExperts
from expertlane.engine.ops.products import Activation, Expert, Linear
from expertlane.engine.ops.structs import (
    AttentionLayer,
    ExpertsLayer,
    HeadLayer,
    Layer,
    Matrix,
    Mlp,
    Pages,
    Part,
    Progress,
    Tokens,
    address_of,
)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Weights and sizes of a layer's attention on this rank.

    Attributes:
        norm: [hidden_size] float32; None where tokens come normed.
        head_norms: [num_heads + num_kv_heads, head_dim] float32.
        cos, sin: [num_positions, 1, rotary_dim] float32; a row is what `rotate_` takes of a token.
        interleave: rotary pairs are (2i, 2i + 1), not (i, i + rotary_dim / 2).
    """

    norm: Tensor | None
    eps: float
    query_key_value: Linear
    head_norms: Tensor | None
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos: Tensor
    sin: Tensor
    interleave: bool
    params: AttentionParams


class AttentionCall(Protocol):
    """A layer's attention, from hidden states to the output projection, in one call."""

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute x [num_tokens, hidden_size]."""
        ...

    def __call__(self, x: Tensor, cache: KVCache, batch: PagedBatch, *, adds_input: bool) -> Tensor:
        """Store the tokens' keys and values, and attend.

        Args:
            x: [num_tokens, hidden_size].
            adds_input: x is added to the result.

        Returns:
            [num_tokens, hidden_size].
        """
        ...


class AttentionPart(Part):
    """A layer's multi-head or grouped-query attention in one call.

    Args:
        weights: linears that our C++ multiplies, and heads of a multiple of 16.
    """

    def __init__(self, weights: AttentionWeights, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        super().__init__("attention_part", library, dtype)
        self._weights = weights  # kept alive
        params = weights.params
        self._layer = AttentionLayer(
            *(Matrix.of(weights.query_key_value), Matrix.of(weights.output)),
            *(address_of(each) for each in (weights.norm, weights.head_norms, params.sinks)),
            *(weights.num_heads, weights.num_kv_heads, weights.head_dim, weights.cos.shape[-1]),
            *(weights.interleave, params.window or 0, weights.eps, params.scale),
        )
        self.layer = self._layer.address
        self._pages: tuple[KVCache, Pages] | None = None

    def __call__(self, x: Tensor, cache: KVCache, batch: PagedBatch, *, adds_input: bool) -> Tensor:
        """Store the tokens' keys and values, and attend; see `AttentionCall`."""
        if self._pages is None or self._pages[0] is not cache:
            self._pages = cache, self.pages(cache)
        placed = self.placed(batch)
        out = torch.empty_like(x)
        self._function(
            *(self.layer, placed.address, self._pages[1].address, x.data_ptr()),
            *(x.shape[0], adds_input, out.data_ptr()),
        )
        return out

    @staticmethod
    def pages(cache: KVCache) -> Pages:
        """Addresses of a layer's KV cache."""
        return Pages(*map(address_of, cache.parts), cache.block_size)

    def placed(self, batch: PagedBatch) -> Tokens:
        """Rotary angles, slots and block tables of a batch; computed once for all layers."""
        if batch.places is None:
            batch.places = self._placed(batch)
        placed: Tokens = batch.places
        return placed

    def _placed(self, paged: PagedBatch) -> Tokens:
        batch, weights = paged.batch, self._weights
        (num_seqs, width), num_tokens = batch.block_tables.shape, batch.num_tokens
        dim = weights.cos.shape[-1]
        numbers = torch.empty(num_seqs * (width + 2) + num_tokens, dtype=torch.int64)
        turns = torch.empty(2 * num_tokens * dim)
        given = [
            np.ascontiguousarray(each)
            for each in (batch.num_computed_tokens, batch.num_scheduled_tokens, batch.block_tables)
        ]
        computed, scheduled, tables = (each.ctypes.data for each in given)
        wide = numbers.data_ptr()
        first = wide + 8 * num_seqs * width
        lengths, slots, cos = first + 8 * num_seqs, first + 16 * num_seqs, turns.data_ptr()
        self.library.place_tokens(
            *(computed, scheduled, tables, width, num_seqs, num_tokens, paged.block_size),
            *(weights.cos.data_ptr(), weights.sin.data_ptr(), dim),
            *(wide, first, lengths, slots, cos),
        )
        sin = cos + 4 * num_tokens * dim
        placed = Tokens(cos, sin, slots, wide, first, scheduled, lengths, width, num_seqs)
        placed.kept = numbers, turns, *given
        return placed


class MlpWeights(NamedTuple):
    """An MLP that every token takes.

    Attributes:
        norm: [hidden_size] float32, with `eps`; None where tokens come normed.
        scale: [1, hidden_size]; the output is multiplied by the sigmoid of this projection.
    """

    mlp: Expert
    activation: Activation
    norm: Tensor | None = None
    eps: float = 0.0
    scale: Tensor | None = None


class MlpCall(Protocol):
    """An MLP of all tokens in one call; with the norm before it and the scale after it, if any."""

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute x [num_tokens, hidden_size]."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The MLP's output [num_tokens, hidden_size], of x [num_tokens, hidden_size]."""
        ...


class MlpPart(Part):
    """An MLP in one call, with the norm before it and the scale after it, if any.

    Args:
        experts: the MLP, as experts of which there is one.
    """

    def __init__(
        self,
        experts: CompiledExperts,
        weights: MlpWeights,
        library: ctypes.CDLL,
        dtype: torch.dtype,
    ) -> None:
        super().__init__("mlp_part", library, dtype)
        self._kept, self._experts = (experts, weights), ExpertsLayer.of(experts)
        pointers = self._experts.address, address_of(weights.norm), address_of(weights.scale)
        self._mlp = Mlp(*pointers, weights.mlp.up.in_features, weights.eps)
        self.layer = self._mlp.address

    def __call__(self, x: Tensor) -> Tensor:
        """The MLP's output [num_tokens, hidden_size], of x [num_tokens, hidden_size]."""
        out = torch.empty_like(x)
        self._function(self.layer, x.data_ptr(), x.shape[0], out.data_ptr())
        return out


class HeadPart(Part):
    """Final norm, output head, and the choice of the likeliest token.

    Args:
        norm: [hidden_size] float32; None where rows come normed.
    """

    def __init__(
        self,
        head: Linear,
        norm: Tensor | None,
        eps: float,
        library: ctypes.CDLL,
        dtype: torch.dtype,
    ) -> None:
        super().__init__("head_part", library, dtype)
        self._kept, self._vocab_size = (head, norm), head.out_features
        self._head = HeadLayer(Matrix.of(head), address_of(norm), eps)

    def __call__(
        self, x: Tensor, rows: Tensor | None, token_ids: Tensor | None, best: Tensor | None = None
    ) -> Tensor:
        """Logits [num_seqs, vocab_size] float32.

        Args:
            x: [num_rows, hidden_size].
            rows: [num_seqs]; rows of x whose logits are computed; None for all.
            token_ids: [num_seqs] int64, to be filled: `model.draw.likeliest` of the logits.
            best: [num_seqs, 2] float64, to be filled: the greatest logit, NaN if one is, and where
                it is.
        """
        num = x.shape[0] if rows is None else rows.shape[0]
        logits = torch.empty(num, self._vocab_size)
        self._function(
            *(self._head.address, x.data_ptr(), address_of(rows), num, logits.data_ptr()),
            *(address_of(token_ids), address_of(best)),
        )
        return logits


class LayerParts(NamedTuple):
    """The C++ calls of a layer.

    Attributes:
        experts: None in a dense layer.
        mlp: the MLP of a dense layer, with its norm; else the shared expert, if there is one.
    """

    attention: AttentionPart
    experts: LocalExperts | None
    mlp: MlpPart | None


class LayersPart(Part):
    """A stage's layers, whose attention and MLPs are all on this rank.

    Args:
        caches: the KV cache of each layer.
        first_layer: the number of the first layer.
        progress: addresses where the rank's layer, stage, counter and time (ns) are kept up to
            date.
        stages: numbers that stand for attention, router, dispatch, experts and combine there.
        meter: the address where a `Meter` keeps times, and its counts of pairs by layer, then
            expert; None where nothing is measured.
    """

    def __init__(
        self,
        layers: Sequence[LayerParts],
        caches: Sequence[KVCache],
        first_layer: int,
        progress: Sequence[int],
        stages: Sequence[int],
        meter: tuple[int, Sequence[Tensor | None]] | None = None,
    ) -> None:
        self._attention = layers[0].attention
        super().__init__("layers_part", self._attention.library, self._attention.dtype)
        self._made_of, self._caches = list(layers), list(caches)
        self._counts: Sequence[Tensor | None]
        address, self._counts = (None, [None] * len(layers)) if meter is None else meter
        self._progress = Progress(*progress, address, (ctypes.c_int64 * len(stages))(*stages))
        self._layers = (Layer * len(layers))(
            *(
                Layer(
                    attention.layer,
                    *((None, None) if experts is None else experts.layers),
                    None if mlp is None else mlp.layer,
                    attention.pages(cache),
                    first_layer + number,
                    address_of(counts),
                )
                for number, ((attention, experts, mlp), cache, counts) in enumerate(
                    zip(layers, caches, self._counts, strict=True)
                )
            )
        )

    def is_made_of(self, layers: Sequence[LayerParts | None]) -> bool:
        """Whether this call was made of exactly these layers, so that it can be reused."""
        return all(
            other is not None and all(a is b for a, b in zip(own, other, strict=True))
            for own, other in zip(self._made_of, layers, strict=True)
        )

    def __call__(self, x: Tensor, batch: PagedBatch) -> Tensor:
        """Hidden states [num_tokens, hidden_size] after the last layer, of x before the first."""
        placed, out = self._attention.placed(batch), torch.empty_like(x)
        self._function(
            *(ctypes.addressof(self._layers), len(self._layers), placed.address),
            *(self._progress.address, x.data_ptr(), x.shape[0], out.data_ptr()),
        )
        return out
