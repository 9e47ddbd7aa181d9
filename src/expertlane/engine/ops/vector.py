"""The backend with our C++ arithmetic, for CPUs with vector instructions; torch has the rest.

Only `engine/ops/backend.py` chooses it.
"""

import ctypes
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.ops.cpu import CpuBackend
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.library import function_of
from expertlane.engine.ops.mlp import MlpPart
from expertlane.engine.ops.moe_step import CompiledRouter, LocalExperts
from expertlane.engine.ops.narrow import (
    Float8Inputs,
    NarrowExperts,
    NarrowLinear,
    NarrowWeight,
    Weight,
)
from expertlane.engine.ops.packed import (
    LANES,
    FewRowsExperts,
    FewRowsLinear,
    PackedExperts,
    PackedHeadsLinear,
    PackedLinear,
)
from expertlane.engine.ops.products import Activation, Expert, Experts, HeadsLinear, Linear
from expertlane.engine.ops.router import Router, RouterParams
from expertlane.engine.ops.step import AttentionPart, AttentionWeights, HeadPart, attention_part
from expertlane.engine.ops.structs import address_of


class VectorBackend(CpuBackend):
    """Products, attention, norms and rotation in C++, beside `CpuBackend`'s bookkeeping.

    bfloat16: `products.cpp`, `attention.cpp`, `rows.cpp`. float32: attention, norms, rotation, and
    products of few rows (`few_rows.cpp`); torch has those of many. Weights of one byte are widened
    as they are read (`narrow.cpp`).

    Args:
        library: compiled for the instruction set.
    """

    keeps_narrow = True

    def __init__(self, baseline: ctypes.CDLL, library: ctypes.CDLL, instructions: str) -> None:
        super().__init__(baseline)
        self.instructions = instructions
        self._library = library
        self._draw_tokens = function_of(library, "draw_tokens", "pnnppppppp")
        self._linear = function_of(library, "linear", "pnnpnnpp")
        self._heads_linear = function_of(library, "heads_linear", "pnnnpnnnpnn")
        self._experts = function_of(library, "experts", "pnpppnpppnnpp")
        self._attention = {
            dtype: function_of(library, name, "pnpnpnpnpppppnpppnnnnnnfnpp")
            for dtype, name in ((torch.bfloat16, "attention"), (torch.float32, "attention_float"))
        }
        self._few_rows_linear = function_of(library, "few_rows_linear", "pnnpnnpp")
        self._few_rows_experts = function_of(library, "few_rows_experts", "pnpppnpppnnpp")
        self._narrow_linear = function_of(library, "narrow_linear", "iipnnppnnnnpp")
        self._narrow_experts = function_of(library, "narrow_experts", "iipnpppnpppnnnnnp")
        self._rotate, self._rms_norm = (
            {
                torch.bfloat16: function_of(library, name, arguments),
                torch.float32: function_of(library, f"{name}_float", arguments),
            }
            for name, arguments in (("rotate", "pnnnnnppn"), ("rms_norm", "pnnnnpfpn"))
        )
        self._take_sums(library)

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        if isinstance(weight, Float8Inputs):
            return super().linear(weight, bias)
        if isinstance(weight, NarrowWeight) and weight.values.numel():
            shift = None if bias is None else bias.float()
            return NarrowLinear(weight, shift, self._narrow_linear)
        weight = weight if isinstance(weight, Tensor) else weight.widened()
        if weight.dtype is torch.float32 and weight.numel() and weight.is_contiguous():
            return FewRowsLinear(weight, bias, self._few_rows_linear)
        if weight.dtype is not torch.bfloat16 or weight.shape[1] % 2 or not weight.numel():
            return super().linear(weight, bias)
        return PackedLinear(weight, None if bias is None else bias.float(), self._linear)

    def experts(self, held: Sequence[Expert], activation: Activation) -> Experts:
        linears = [linear for expert in held for linear in expert.linears]
        is_plain = activation.is_plain(is_gated=held[0].gate is not None)
        if all(isinstance(each, FewRowsLinear) and each.bias is None for each in linears):
            many = super().experts(held, activation)
            return FewRowsExperts(many, self._few_rows_experts) if is_plain else many
        if NarrowExperts.suits(held, activation):
            return NarrowExperts(held, activation, self._narrow_experts)
        suits = (
            held[0].up.out_features % 32 == 0
            and all(isinstance(each, PackedLinear) and each.bias is None for each in linears)
            and is_plain
        )
        if not suits:
            return super().experts(held, activation)
        return PackedExperts(held, activation, self._experts)

    def heads_linear(self, weight: Tensor) -> HeadsLinear:
        if weight.dtype is not torch.bfloat16 or weight.shape[2] % 2 or not weight.numel():
            return super().heads_linear(weight)
        return PackedHeadsLinear(weight, self._heads_linear)

    def router(self, params: RouterParams) -> Router:
        if not CompiledRouter.suits(params):
            return super().router(params)
        return CompiledRouter(params, self.rms_norm, self._library)

    def local_experts(
        self, router: Router, experts: Experts, dtype: torch.dtype
    ) -> LocalExperts | None:
        if not isinstance(router, CompiledRouter) or not _computes(experts, dtype):
            return None
        return LocalExperts(router, experts, experts.matrices, self._library, dtype)

    def mlp_part(
        self,
        mlp: Expert,
        activation: Activation,
        dtype: torch.dtype,
        norm: Tensor | None,
        eps: float,
        scale: Tensor | None,
    ) -> MlpPart | None:
        experts = self.experts([mlp], activation)
        if not _computes(experts, dtype) or mlp.up.in_features % LANES:
            return None
        return MlpPart(experts, experts.matrices, norm, eps, scale, self._library, dtype)

    def head_part(
        self, head: Linear, norm: Tensor | None, eps: float, dtype: torch.dtype
    ) -> HeadPart | None:
        if not _multiplies(dtype, head) or head.in_features % LANES:
            return None
        return HeadPart(head, norm, eps, self._library, dtype)

    def attention_part(self, weights: AttentionWeights, dtype: torch.dtype) -> AttentionPart | None:
        if not _multiplies(dtype, weights.query_key_value, weights.output):
            return None
        return attention_part(weights, self._library, dtype)

    def draw_tokens(
        self,
        scores: Tensor,
        temperature: Tensor,
        limits: tuple[Tensor | None, Tensor | None, Tensor | None],
        seeds: npt.NDArray[np.uint64],
        num_drawn: Tensor,
    ) -> Tensor | None:
        scores, token_ids = scores.contiguous(), torch.empty(scores.shape[0], dtype=torch.int64)
        self._draw_tokens(
            *(scores.data_ptr(), *scores.shape, temperature.data_ptr()),
            *(None if each is None else each.data_ptr() for each in limits),
            *(seeds.ctypes.data, num_drawn.data_ptr(), token_ids.data_ptr()),
        )
        return token_ids

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Tensor:
        value_dim, scale, window, sinks = params
        num_tokens, num_heads, key_dim = query.shape
        if query.dtype not in self._attention or query.dtype is not cache.dtype:
            return super().paged_attention(query, key, value, cache, batch, params)
        query, key, value = (_heads_side_by_side(each) for each in (query, key, value))
        out = query.new_empty(num_tokens, num_heads, value_dim)
        sequences = batch.sequences
        tables = sequences.block_tables
        self._attention[query.dtype](
            *(query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0)),
            *(value.data_ptr(), value.stride(0), batch.slots.data_ptr(), num_tokens),
            *(cache.keys.data_ptr(), cache.values.data_ptr() if cache.values.shape[-1] else None),
            *(address_of(each) for each in (cache.key_scales, cache.value_scales)),
            *(tables.data_ptr(), tables.shape[1], sequences.first_tokens.data_ptr()),
            *(sequences.num_scheduled.data_ptr(), sequences.lengths.data_ptr(), tables.shape[0]),
            *(num_heads, cache.num_heads, key_dim, value_dim, cache.block_size, scale, window or 0),
            *(None if sinks is None else sinks.data_ptr(), out.data_ptr()),
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_rows, size = x.shape
        if x.dtype not in self._rms_norm or size % 16 or x.stride(1) != 1:
            return super().rms_norm(x, weight, eps)
        out = x.new_empty(num_rows, size)
        self._rms_norm[x.dtype](
            *(x.data_ptr(), x.stride(0), num_rows, 1, size, weight.data_ptr(), eps),
            *(out.data_ptr(), size),
        )
        return out

    def rms_norm_heads_(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_tokens, num_heads, head_dim = x.shape
        if x.dtype not in self._rms_norm or head_dim % 16:
            return super().rms_norm_heads_(x, weight, eps)
        self._rms_norm[x.dtype](
            *(x.data_ptr(), x.stride(0), num_tokens, num_heads, head_dim),
            *(weight.data_ptr(), eps, x.data_ptr(), x.stride(0)),
        )
        return x

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
        if x.dtype not in self._rotate:
            return super().rotate_(x, cos, sin, interleave=interleave)
        num_tokens, num_heads, head_dim = x.shape
        self._rotate[x.dtype](
            *(x.data_ptr(), x.stride(0), num_tokens, num_heads, head_dim, cos.shape[-1]),
            *(cos.data_ptr(), sin.data_ptr(), interleave),
        )
        return x


def _computes(
    experts: Experts, dtype: torch.dtype
) -> TypeGuard[PackedExperts | FewRowsExperts | NarrowExperts]:
    """Whether our C++ kernels compute these experts for hidden states of that dtype."""
    is_ours = isinstance(experts, PackedExperts | FewRowsExperts | NarrowExperts)
    return is_ours and _multiplies(dtype, experts.held[0].up)


def _multiplies(dtype: torch.dtype, *linears: Linear) -> bool:
    """Whether our C++ kernels multiply hidden states of that dtype with all of these linears."""
    kind = {torch.bfloat16: PackedLinear, torch.float32: FewRowsLinear}.get(dtype)
    return kind is not None and all(type(each) in (kind, NarrowLinear) for each in linears)


def _heads_side_by_side(x: Tensor) -> Tensor:
    """x [num_tokens, heads, dim] with each token's heads contiguous; copied only if need be."""
    return x if x[0:1].is_contiguous() else x.contiguous()
