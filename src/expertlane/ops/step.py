"""Parts of a layer as one call each of our C++ (`step.cpp`), where it has what a model needs.

A part that has not is None: then layers go through its operations one by one.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertlane.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.ops.products import Experts, Linear
from expertlane.ops.router import Norm, Router, RouterParams

FEW_ROWS = 16  # in float32 torch's own products are faster with more
_MOST_TOKENS = 512  # with more, operations one by one cost no more, and their memory is given back
_POINTER, _WHOLE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SUFFIX = {torch.bfloat16: "", torch.float32: "_float"}
_LANES = 16


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _most(dtype: torch.dtype) -> int:
    return FEW_ROWS if dtype is torch.float32 else _MOST_TOKENS


class _Struct(ctypes.Structure):
    """One of `step.cpp`; what it points to is kept alive by who makes it."""

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class _Matrix(_Struct):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "bias")),
        *((name, _WHOLE) for name in ("outputs", "inputs")),
    )

    @staticmethod
    def of(linear: Linear) -> "_Matrix":
        sizes = linear.out_features, linear.in_features
        return _Matrix(linear.weight.data_ptr(), _address(linear.bias), *sizes)


class _AttentionLayer(_Struct):
    _fields_ = (
        *((name, _Matrix) for name in ("query_key_value", "output")),
        *((name, _POINTER) for name in ("norm", "head_norms", "sinks")),
        *((name, _WHOLE) for name in ("heads", "kv_heads", "head_dim", "rotary_dim")),
        *((name, _WHOLE) for name in ("interleave", "window")),
        *((name, _FLOAT) for name in ("eps", "scale")),
    )


class _Tokens(_Struct):
    _fields_ = (
        *((name, _POINTER) for name in ("cos", "sin", "slots", "tables")),
        *((name, _POINTER) for name in ("first_token", "scheduled", "lengths")),
        *((name, _WHOLE) for name in ("width", "seqs")),
    )
    kept: Sequence[Any] = ()


class _Pages(_Struct):
    _fields_ = (*((name, _POINTER) for name in ("keys", "values")), ("block_size", _WHOLE))


class _Router(_Struct):
    _fields_ = (
        *((name, _POINTER) for name in ("norm", "weight", "bias", "correction")),
        *((name, _WHOLE) for name in ("hidden", "experts", "top_k", "is_softmax")),
        *((name, _WHOLE) for name in ("renormalise", "groups", "top_groups", "adds_two")),
        *((name, _FLOAT) for name in ("eps", "scale")),
    )


class _Head(_Struct):
    _fields_ = (("matrix", _Matrix), ("norm", _POINTER), ("eps", _FLOAT))


class _Experts(_Struct):
    _fields_ = (
        *((name, _POINTER) for name in ("gate", "up", "down")),
        *((name, _WHOLE) for name in ("count", "inner")),
    )


def _part(library: ctypes.CDLL, name: str, num_arguments: int, result: Any = None) -> Any:
    function = getattr(library, name)
    function.argtypes = [_POINTER] * num_arguments  # whole numbers pass as such too
    function.restype = result
    return function


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """What attention of a layer computes with.

    Attributes:
        norm: [hidden_size] float32; None where tokens come normed.
        head_norms: [num_heads + num_kv_heads, head_dim] float32.
        cos, sin: [num_positions, 1, rotary_dim] float32; as `rotate_` takes them.
        interleave: how rotary pairs stand.
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
    """From tokens to attention's output, of multi-head or grouped-query attention.

    Args:
        weights: they suit: see `attention_part`.
    """

    def __init__(self, weights: AttentionWeights, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype  # the former are kept alive
        params = weights.params
        self._layer = _AttentionLayer(
            *(_Matrix.of(weights.query_key_value), _Matrix.of(weights.output)),
            *(_address(each) for each in (weights.norm, weights.head_norms, params.sinks)),
            *(weights.num_heads, weights.num_kv_heads, weights.head_dim, weights.cos.shape[-1]),
            *(weights.interleave, params.window or 0, weights.eps, params.scale),
        )
        self._at = self._layer.address
        self._function = _part(library, f"attention_part{_SUFFIX[dtype]}", 7)
        self._place = _part(library, "place_tokens", 15)
        self._pages: tuple[KVCache, _Pages] | None = None

    def takes(self, x: Tensor, batch: PagedBatch) -> bool:
        """Whether it computes tokens [num_tokens, hidden_size] of a batch."""
        return (
            0 < x.shape[0] <= _most(self._dtype)
            and x.is_contiguous()
            and (self._dtype is torch.bfloat16 or batch.is_decode)
        )

    def __call__(self, x: Tensor, cache: KVCache, batch: PagedBatch, *, adds_input: bool) -> Tensor:
        """Store the tokens' keys and values, and attend.

        Args:
            x: [num_tokens, hidden_size].
            adds_input: x is added to the result.

        Returns:
            [num_tokens, hidden_size].
        """
        if self._pages is None or self._pages[0] is not cache:
            pages = _Pages(cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[1])
            self._pages = cache, pages
        if batch.places is None:  # the same in all layers
            batch.places = self._placed(batch)
        out = torch.empty_like(x)
        self._function(
            *(self._at, batch.places.address, self._pages[1].address, x.data_ptr()),
            *(x.shape[0], adds_input, out.data_ptr()),
        )
        return out

    def _placed(self, paged: PagedBatch) -> _Tokens:
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
        placed = _Tokens(cos, sin, slots, wide, first, scheduled, lengths, width, num_seqs)
        placed.kept = numbers, turns, *given
        return placed


def attention_part(
    weights: AttentionWeights, library: ctypes.CDLL, dtype: torch.dtype
) -> AttentionPart | None:
    """One call for a layer's attention; None where the library does not have it.

    Args:
        dtype: of weights that the library multiplies with.
    """
    multiple = 32 if dtype is torch.bfloat16 else 16
    hidden = weights.query_key_value.in_features
    if weights.head_dim % multiple or hidden % _LANES or not weights.num_heads:
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
        self._head = _Head(_Matrix.of(head), _address(norm), eps)
        self._function = _part(library, f"head_part{_SUFFIX[dtype]}", 7)

    def takes(self, x: Tensor) -> bool:
        """Whether it computes rows [num_rows, hidden_size]."""
        return 0 < x.shape[0] <= _most(self._dtype) and x.is_contiguous()

    def __call__(
        self, x: Tensor, rows: Tensor | None, token_ids: Tensor | None, best: Tensor | None = None
    ) -> Tensor:
        """[num_seqs, vocab_size] float32.

        Args:
            x: [num_rows, hidden_size].
            rows: [num_seqs]; which rows of x; None for all of them.
            token_ids: [num_seqs] int64, to be filled: `model.draw.likeliest` of the logits.
            best: [num_seqs, 2] float64, to be filled: the greatest logit, NaN if one is, and where
                it is.
        """
        num = x.shape[0] if rows is None else rows.shape[0]
        logits = torch.empty(num, self._vocab_size)
        self._function(
            *(self._head.address, x.data_ptr(), _address(rows), num, logits.data_ptr()),
            *(_address(token_ids), _address(best)),
        )
        return logits


class CompiledRouter(Router):
    """One call."""

    def __init__(self, params: RouterParams, norm: Norm, library: ctypes.CDLL) -> None:
        super().__init__(params, norm)
        routing, (num_experts, hidden) = params.routing, params.weight.shape
        self.layer = _Router(
            *(_address(each) for each in (params.norm, params.weight)),
            *(_address(each) for each in (params.bias, params.correction_bias)),
            *(hidden, num_experts, params.top_k, routing.scoring_func == "softmax"),
            *(routing.norm_topk_prob, routing.n_group, routing.topk_group),
            *(routing.group_score == "top2_sum", params.eps, routing.routed_scaling_factor),
        )
        self._functions = {
            dtype: _part(library, f"router_part{suffix}", 6) for dtype, suffix in _SUFFIX.items()
        }

    @staticmethod
    def suits(params: RouterParams) -> bool:
        """Whether our C++ has it."""
        return params.weight.shape[1] % _LANES == 0 and params.weight.is_contiguous()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Router`."""
        num_tokens, top_k = x.shape[0], self.params.top_k
        if x.dtype not in _SUFFIX or num_tokens > _MOST_TOKENS or not x.is_contiguous():
            return super().__call__(x)
        hidden = torch.empty_like(x)
        topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
        topk_weights = torch.empty(num_tokens, top_k)
        self._functions[x.dtype](
            *(self.layer.address, x.data_ptr(), num_tokens, hidden.data_ptr()),
            *(topk_ids.data_ptr(), topk_weights.data_ptr()),
        )
        return hidden, topk_ids, topk_weights


class LocalExperts:
    """Router, experts and sums of a layer whose experts are all on this rank.

    Its four calls follow one another: `route`, `group`, `compute`, `combine`.

    Args:
        matrices: where the experts' gates (None without), ups and downs lie.
    """

    def __init__(
        self,
        router: CompiledRouter,
        experts: Experts,
        matrices: Sequence[Any],
        library: ctypes.CDLL,
        dtype: torch.dtype,
    ) -> None:
        self._kept = router, experts, matrices
        self._dtype, self._top_k = dtype, router.params.top_k
        held = experts.held
        pointers = (None if each is None else ctypes.addressof(each) for each in matrices)
        self._experts = _Experts(*pointers, len(held), held[0].up.out_features)
        self._num_experts = len(held)
        self._at = router.layer.address, self._experts.address
        suffix = _SUFFIX[dtype]
        self._bytes = _part(library, f"local_bytes{suffix}", 3, _WHOLE)
        self._route = _part(library, f"local_route{suffix}", 5)
        self._group = _part(library, "local_group", 4)
        self._compute = _part(library, f"local_experts{suffix}", 4)
        self._combine = _part(library, f"local_combine{suffix}", 6)

    def takes(self, x: Tensor) -> bool:
        """Whether it computes tokens [num_tokens, hidden_size]."""
        return 0 < x.shape[0] <= _most(self._dtype) and x.is_contiguous()

    def route(self, x: Tensor) -> Tensor:
        """Choose experts of tokens [num_tokens, hidden_size]; what the other calls work on."""
        num_tokens = x.shape[0]
        work = torch.empty(self._bytes(*self._at, num_tokens), dtype=torch.uint8)
        self._route(*self._at, x.data_ptr(), num_tokens, work.data_ptr())
        return work

    def topk_ids(self, work: Tensor, num_tokens: int) -> Tensor:
        """[num_tokens, top_k] int64; the experts that `route` has chosen."""
        return self._whole_numbers(work)[: num_tokens * self._top_k].view(num_tokens, self._top_k)

    def normed(self, work: Tensor, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size]; the normed tokens."""
        begin = 8 * (3 * x.shape[0] * self._top_k + self._num_experts)
        return work[begin : begin + x.nbytes].view(x.dtype).view(x.shape)

    def group(self, work: Tensor, num_tokens: int) -> None:
        """Put the pairs in the order of their experts."""
        self._group(*self._at, num_tokens, work.data_ptr())

    def num_tokens_per_expert(self, work: Tensor, num_tokens: int) -> list[int]:
        """[num_experts]; after `group`."""
        begin = num_tokens * self._top_k
        ends = self._whole_numbers(work)[begin : begin + self._num_experts]
        num_tokens_of: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return num_tokens_of

    def compute(self, work: Tensor, num_tokens: int) -> None:
        """Apply experts to their pairs."""
        self._compute(*self._at, num_tokens, work.data_ptr())

    def combine(self, work: Tensor, x: Tensor, *, adds_input: bool) -> Tensor:
        """[num_tokens, hidden_size]; sums of experts' results, with x added or not."""
        out, added = torch.empty_like(x), x.data_ptr() if adds_input else None
        self._combine(*self._at, added, x.shape[0], work.data_ptr(), out.data_ptr())
        return out

    @staticmethod
    def _whole_numbers(work: Tensor) -> Tensor:
        return work[: work.shape[0] // 8 * 8].view(torch.int64)
