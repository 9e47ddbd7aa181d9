"""Attention and the output head as one C++ call each (`step.cpp`).

Where the C++ lacks what a model needs, layers call the backend's operations one by one.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.library import function_of
from expertlane.engine.ops.packed import LANES
from expertlane.engine.ops.products import Linear
from expertlane.engine.ops.structs import (
    SUFFIX,
    AttentionLayer,
    HeadLayer,
    Matrix,
    Pages,
    Tokens,
    address_of,
    most_tokens,
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


class AttentionPart:
    """A layer's multi-head or grouped-query attention in one call.

    Args:
        weights: weights of sizes that `attention_part` accepts.
    """

    def __init__(self, weights: AttentionWeights, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._weights = weights  # kept alive
        self.library, self.dtype = library, dtype
        params = weights.params
        self._layer = AttentionLayer(
            *(Matrix.of(weights.query_key_value), Matrix.of(weights.output)),
            *(address_of(each) for each in (weights.norm, weights.head_norms, params.sinks)),
            *(weights.num_heads, weights.num_kv_heads, weights.head_dim, weights.cos.shape[-1]),
            *(weights.interleave, params.window or 0, weights.eps, params.scale),
        )
        self.layer = self._layer.address
        self._function = function_of(library, f"attention_part{SUFFIX[dtype]}", "ppppnnp")
        self._place = function_of(library, "place_tokens", "pppnnnnppnppppp")
        self._pages: tuple[KVCache, Pages] | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute x [num_tokens, hidden_size]."""
        return 0 < x.shape[0] <= most_tokens(self.dtype) and x.is_contiguous()

    def __call__(self, x: Tensor, cache: KVCache, batch: PagedBatch, *, adds_input: bool) -> Tensor:
        """Store the tokens' keys and values, and attend.

        Args:
            x: [num_tokens, hidden_size].
            adds_input: x is added to the result.

        Returns:
            [num_tokens, hidden_size].
        """
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
        self._place(
            *(computed, scheduled, tables, width, num_seqs, num_tokens, paged.block_size),
            *(weights.cos.data_ptr(), weights.sin.data_ptr(), dim),
            *(wide, first, lengths, slots, cos),
        )
        sin = cos + 4 * num_tokens * dim
        placed = Tokens(cos, sin, slots, wide, first, scheduled, lengths, width, num_seqs)
        placed.kept = numbers, turns, *given
        return placed


def attention_part(
    weights: AttentionWeights, library: ctypes.CDLL, dtype: torch.dtype
) -> AttentionPart | None:
    """A layer's attention as one call; None for sizes that the library does not have.

    Args:
        dtype: dtype of hidden states; the library's products take the weights.
    """
    hidden = weights.query_key_value.in_features
    if weights.head_dim % LANES or hidden % LANES or not weights.num_heads:
        return None
    return AttentionPart(weights, library, dtype)


class HeadPart:
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
        self._kept = head, norm
        self._dtype, self._vocab_size = dtype, head.out_features
        self._head = HeadLayer(Matrix.of(head), address_of(norm), eps)
        self._function = function_of(library, f"head_part{SUFFIX[dtype]}", "pppnppp")

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute rows [num_rows, hidden_size]."""
        return 0 < x.shape[0] <= most_tokens(self._dtype) and x.is_contiguous()

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
