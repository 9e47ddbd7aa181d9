"""The backends with our C++: bookkeeping and sums for any CPU, arithmetic where it has vectors.

Torch has the rest. Only `engine/ops/backend.py` chooses them.
"""

import ctypes
from array import array
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.ops.bookkeeping import Outgoing, PeerRows, RowParts
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.narrow import Float8Inputs, NarrowWeight, Weight
from expertlane.engine.ops.packed import (
    LANES,
    CompiledExperts,
    FewRowsExperts,
    FewRowsLinear,
    NarrowExperts,
    NarrowLinear,
    PackedExperts,
    PackedHeadsLinear,
    PackedLinear,
)
from expertlane.engine.ops.products import (
    Activation,
    Expert,
    Experts,
    HeadsLinear,
    Linear,
    PairGroups,
)
from expertlane.engine.ops.router import Router, RouterParams
from expertlane.engine.ops.step import (
    SUFFIX,
    AttentionPart,
    AttentionWeights,
    CompiledRouter,
    HeadPart,
    LocalExperts,
    MlpPart,
    MlpWeights,
    address_of,
)
from expertlane.engine.ops.torch_backend import TorchBackend

_SUMMED = (torch.float32, torch.bfloat16)


class CpuBackend(TorchBackend):
    """The bookkeeping of dispatch (`dispatch.cpp`) and sums (`sums.cpp`), for any CPU.

    Attributes:
        baseline: the library that every CPU can use; sums may be those of another.
        instructions: the name of the instruction set that computes.
    """

    instructions = "baseline"

    def __init__(self, baseline: ctypes.CDLL) -> None:
        self.baseline = self._sums = baseline

    def choose_copies(
        self, topk_ids: Tensor, table: Tensor, num_copies: Tensor, first: int
    ) -> Tensor:
        assert topk_ids.dtype is torch.int64, "kernels take its memory as it is"
        topk_ids = topk_ids.contiguous()
        physical = torch.empty(topk_ids.shape, dtype=torch.int32)
        self.baseline.choose_copies(
            *(topk_ids.data_ptr(), topk_ids.numel(), table.data_ptr(), table.shape[1]),
            *(num_copies.data_ptr(), num_copies.shape[0], first, physical.data_ptr()),
        )
        return physical

    def rows_by_peer(
        self, ids: Tensor, divisor: int, num_peers: int, *, padded: bool = False
    ) -> PeerRows:
        num_tokens, top_k = ids.shape
        most = num_tokens * (num_peers if padded else min(top_k, num_peers))
        counts, tokens = (torch.empty(num, dtype=torch.int64) for num in (num_peers, most))
        ids_there = torch.empty(most, top_k, dtype=torch.int32)
        places = torch.empty(num_tokens, num_peers, dtype=torch.int64)
        num_rows = self.baseline.rows_by_peer(
            *(ids.data_ptr(), ids.stride(0), num_tokens, top_k, divisor, num_peers, padded),
            *(counts.data_ptr(), tokens.data_ptr(), ids_there.data_ptr(), places.data_ptr()),
        )
        return PeerRows(counts, tokens[:num_rows], ids_there[:num_rows], places)

    def fan_out(
        self, ids: Tensor, divisor: int, nodes: Tensor, node: int
    ) -> tuple[Tensor, Tensor, int, int]:
        num_tokens, top_k = ids.shape
        ranks, num_nodes = torch.empty(2, num_tokens, dtype=torch.int64).unbind()
        remote = array("q", [0, 0])
        self.baseline.fan_out(
            *(ids.data_ptr(), num_tokens, top_k, divisor, nodes.shape[0], nodes.data_ptr(), node),
            *(ranks.data_ptr(), num_nodes.data_ptr(), remote.buffer_info()[0]),
        )
        return ranks, num_nodes, remote[0], remote[1]

    def group_pairs(
        self, ids: Tensor, first: int, divisor: int, num_groups: int, num_pairs: int | None = None
    ) -> PairGroups:
        num_rows, top_k = ids.shape
        counts, ends = (torch.empty(num_groups, dtype=torch.int64) for _ in range(2))
        rows, order = (torch.empty(num_rows * top_k, dtype=torch.int64) for _ in range(2))
        numbers = torch.empty(num_rows, top_k, dtype=torch.int64)
        num_found = self.baseline.group_pairs(
            *(ids.data_ptr(), ids.stride(0), num_rows, top_k, first, divisor, num_groups),
            *(-1 if num_pairs is None else num_pairs, counts.data_ptr(), ends.data_ptr()),
            *(rows.data_ptr(), order.data_ptr(), numbers.data_ptr()),
        )
        num_pairs = num_found if num_pairs is None else num_pairs
        assert num_found <= num_pairs, "what was told is wrong"
        if num_pairs < num_rows * top_k:
            rows, order = rows[:num_pairs], order[:num_pairs]
        pairs = PairGroups(counts, rows, order, numbers)
        pairs.__dict__["ends"] = ends  # known already
        return pairs

    def outgoing(
        self,
        topk_ids: Tensor,
        table: Tensor,
        num_copies: Tensor,
        first: int,
        divisor: int,
        num_peers: int,
    ) -> Outgoing:
        assert topk_ids.dtype is torch.int64, "kernels take its memory as it is"
        num_tokens, top_k = topk_ids.shape
        topk_ids, most = topk_ids.contiguous(), num_tokens * min(top_k, num_peers)
        counts, tokens = (torch.empty(num, dtype=torch.int64) for num in (2 * num_peers, most))
        ids, ids_there = (torch.empty(num, top_k, dtype=torch.int32) for num in (num_tokens, most))
        places = torch.empty(num_tokens, top_k, dtype=torch.int64)
        num_rows = self.baseline.outgoing(
            *(topk_ids.data_ptr(), num_tokens, top_k, table.data_ptr(), table.shape[1]),
            *(num_copies.data_ptr(), num_copies.shape[0], first, divisor, num_peers),
            *(ids.data_ptr(), counts.data_ptr(), tokens.data_ptr(), ids_there.data_ptr()),
            places.data_ptr(),
        )
        if num_rows < most:
            tokens, ids_there = tokens[:num_rows], ids_there[:num_rows]
        return Outgoing(ids, counts, tokens, ids_there, places)

    def pack(self, parts: Sequence[tuple[Tensor, Tensor | None]], packed: Tensor) -> None:
        from_, stride, num_bytes, index = (array("q", [0] * len(parts)) for _ in range(4))
        for i, (part, rows) in enumerate(parts):
            assert part.stride(1) == 1 or part.shape[1] == 1, "rows lie in one piece each"
            from_[i], stride[i] = part.data_ptr(), part.stride(0) * part.itemsize
            num_bytes[i] = part.shape[1] * part.itemsize
            index[i] = 0 if rows is None else rows.data_ptr()
        self.baseline.pack_rows(
            *(packed.data_ptr(), *packed.shape, len(parts)),
            *(each.buffer_info()[0] for each in (from_, stride, num_bytes, index)),
        )

    def gather_sum(
        self,
        values: Tensor | RowParts,
        places: Tensor,
        weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if values.dtype not in _SUMMED:
            return super().gather_sum(values, places, weights, out)
        parts = values if isinstance(values, RowParts) else RowParts.of(values.contiguous())
        places, weights = places.contiguous(), None if weights is None else weights.contiguous()
        if out is None:
            out = torch.empty(places.shape[0], parts.width, dtype=parts.dtype)
        num_rows = array("q", parts.num_rows)
        self._sums.gather_sum(
            *(parts.dtype is torch.bfloat16, parts.pointers.buffer_info()[0]),
            *(num_rows.buffer_info()[0], len(num_rows), places.data_ptr()),
            *(None if weights is None else weights.data_ptr(), *places.shape, parts.width),
            out.data_ptr(),
        )
        return out

    def sum_parts(self, rows: RowParts, num_parts: int) -> Tensor:
        if rows.dtype not in _SUMMED:
            return super().sum_parts(rows, num_parts)
        if len(rows.num_rows) != num_parts:
            rows = RowParts.of(rows.tensor(), num_parts)
        out = torch.empty(rows.num_rows[0], rows.width, dtype=rows.dtype)
        self._sums.sum_parts(
            *(rows.dtype is torch.bfloat16, rows.pointers.buffer_info()[0], num_parts),
            *(out.numel(), out.data_ptr()),
        )
        return out


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
        self._library = self._sums = library
        self._attention, self._rotate, self._rms_norm = (
            {dtype: getattr(library, name + suffix) for dtype, suffix in SUFFIX.items()}
            for name in ("attention", "rotate", "rms_norm")
        )

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        if isinstance(weight, Float8Inputs):
            return super().linear(weight, bias)
        shift = None if bias is None else bias.float()
        if isinstance(weight, NarrowWeight) and weight.values.numel():
            return NarrowLinear(weight, shift, self._library.narrow_linear)
        weight = weight if isinstance(weight, Tensor) else weight.widened()
        if weight.dtype is torch.float32 and weight.numel() and weight.is_contiguous():
            return FewRowsLinear(weight, bias, self._library.few_rows_linear)
        if weight.dtype is not torch.bfloat16 or weight.shape[1] % 2 or not weight.numel():
            return super().linear(weight, bias)
        return PackedLinear(weight, shift, self._library.linear)

    def experts(self, held: Sequence[Expert], activation: Activation) -> Experts:
        linears = [linear for expert in held for linear in expert.linears]
        kinds = {type(linear) for linear in linears}
        if len(kinds) == 1 and all(linear.bias is None for linear in linears):
            (kind,), library = kinds, self._library
            if activation.is_plain(is_gated=held[0].gate is not None):
                if kind is FewRowsLinear:
                    return FewRowsExperts(
                        super().experts(held, activation), library.few_rows_experts
                    )
                if kind is NarrowLinear and NarrowExperts.suits(held):
                    return NarrowExperts(held, activation, library.narrow_experts)
                if kind is PackedLinear and held[0].up.out_features % 32 == 0:
                    return PackedExperts(held, activation, library.experts)
        return super().experts(held, activation)

    def heads_linear(self, weight: Tensor) -> HeadsLinear:
        if weight.dtype is not torch.bfloat16 or weight.shape[2] % 2 or not weight.numel():
            return super().heads_linear(weight)
        return PackedHeadsLinear(weight, self._library.heads_linear)

    def router(self, params: RouterParams) -> Router:
        if not CompiledRouter.suits(params):
            return super().router(params)
        return CompiledRouter(params, self.rms_norm, self._library)

    def local_experts(
        self, router: Router, experts: Experts, dtype: torch.dtype
    ) -> LocalExperts | None:
        if not isinstance(router, CompiledRouter) or not _computes(experts, dtype):
            return None
        return LocalExperts(router, experts, self._library, dtype)

    def mlp_part(self, weights: MlpWeights, dtype: torch.dtype) -> MlpPart | None:
        experts = self.experts([weights.mlp], weights.activation)
        if not _computes(experts, dtype) or weights.mlp.up.in_features % LANES:
            return None
        return MlpPart(experts, weights, self._library, dtype)

    def head_part(
        self, head: Linear, norm: Tensor | None, eps: float, dtype: torch.dtype
    ) -> HeadPart | None:
        if not _multiplies(dtype, head) or head.in_features % LANES:
            return None
        return HeadPart(head, norm, eps, self._library, dtype)

    def attention_part(self, weights: AttentionWeights, dtype: torch.dtype) -> AttentionPart | None:
        linears = weights.query_key_value, weights.output
        has_sizes = not (weights.head_dim % LANES or weights.query_key_value.in_features % LANES)
        if not (weights.num_heads and has_sizes and _multiplies(dtype, *linears)):
            return None
        return AttentionPart(weights, self._library, dtype)

    def draw_tokens(
        self,
        scores: Tensor,
        temperature: Tensor,
        limits: tuple[Tensor | None, Tensor | None, Tensor | None],
        seeds: npt.NDArray[np.uint64],
        num_drawn: Tensor,
    ) -> Tensor | None:
        scores, token_ids = scores.contiguous(), torch.empty(scores.shape[0], dtype=torch.int64)
        self._library.draw_tokens(
            *(scores.data_ptr(), *scores.shape, temperature.data_ptr()),
            *map(address_of, limits),
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
            *(address_of(cache.key_scales), address_of(cache.value_scales)),
            *(tables.data_ptr(), tables.shape[1], sequences.first_tokens.data_ptr()),
            *(sequences.num_scheduled.data_ptr(), sequences.lengths.data_ptr(), tables.shape[0]),
            *(num_heads, cache.num_heads, key_dim, value_dim, cache.block_size, scale, window or 0),
            *(address_of(sinks), out.data_ptr()),
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


def _computes(experts: Experts, dtype: torch.dtype) -> TypeGuard[CompiledExperts]:
    """Whether our C++ kernels compute these experts for hidden states of that dtype."""
    return isinstance(experts, CompiledExperts) and _multiplies(dtype, experts.held[0].up)


def _multiplies(dtype: torch.dtype, *linears: Linear) -> bool:
    """Whether our C++ kernels multiply hidden states of that dtype with all of these linears."""
    kind = {torch.bfloat16: PackedLinear, torch.float32: FewRowsLinear}.get(dtype)
    return kind is not None and all(type(each) in (kind, NarrowLinear) for each in linears)


def _heads_side_by_side(x: Tensor) -> Tensor:
    """x [num_tokens, heads, dim] with each token's heads contiguous; copied only if need be."""
    return x if x[0:1].is_contiguous() else x.contiguous()
