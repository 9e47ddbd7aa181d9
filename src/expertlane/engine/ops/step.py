"""Attention, MLPs, the output head and whole layers as one C++ call each.

Where the C++ (`step.cpp`, `mlp.cpp`, `layers.cpp`) lacks what a model needs, layers call the
backend's operations one by one.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.packed import FEW_ROWS, LANES, CompiledExperts, NarrowLinear
from expertlane.engine.ops.products import Activation, Expert, Linear
from expertlane.engine.ops.router import Norm, Router, RouterParams

MOST_TOKENS = 512  # with more, operations one by one cost no more, and their memory is given back
SUFFIX = {torch.bfloat16: "", torch.float32: "_float"}
_POINTER, _WHOLE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def address_of(tensor: Tensor | None) -> int | None:
    """The address of a tensor's memory."""
    return None if tensor is None else tensor.data_ptr()


class Part:
    """A part of a step that our C++ computes in one call.

    Args:
        name: the C++ function's; that for float32 ends in `_float`.
        dtype: dtype of hidden states.
    """

    def __init__(self, name: str, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype
        self._function = getattr(library, name + SUFFIX[dtype])
        self._most_tokens = FEW_ROWS if dtype is torch.float32 else MOST_TOKENS

    def takes(self, x: Tensor) -> bool:
        """True if the call can compute x [num_tokens, hidden_size]."""
        return 0 < x.shape[0] <= self._most_tokens and x.is_contiguous()


def _all(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Fields of one type."""
    return [(name, kind) for name in names.split()]


class Struct(ctypes.Structure):
    """A structure of our C++; its maker keeps alive the memory that it points to."""

    @property
    def address(self) -> int:
        """The address of this structure."""
        return ctypes.addressof(self)


class Matrix(Struct):
    """A linear's weight, in the layout of its kernel, with its scales, if any, and its bias."""

    _fields_ = (
        *_all(_POINTER, "weight bias scales"),
        *_all(_WHOLE, "outputs inputs group first is_float8"),
    )

    @staticmethod
    def of(linear: Linear) -> "Matrix":
        """The structure of a linear that one of our C++ kernels multiplies."""
        weight, bias = linear.weight.data_ptr(), address_of(linear.bias)
        sizes = linear.out_features, linear.in_features
        if not isinstance(linear, NarrowLinear):
            return Matrix(weight, bias, None, *sizes)
        narrow = linear.group, linear.first, linear.is_float8
        return Matrix(weight, bias, linear.scales.data_ptr(), *sizes, *narrow)


class AttentionLayer(Struct):
    """Weights and sizes of a layer's attention."""

    _fields_ = (
        *_all(Matrix, "query_key_value output"),
        *_all(_POINTER, "norm head_norms sinks"),
        *_all(_WHOLE, "heads kv_heads head_dim rotary_dim interleave window"),
        *_all(_FLOAT, "eps scale"),
    )


class Tokens(Struct):
    """A batch's rotary angles, slots, block tables and lengths of sequences."""

    _fields_ = (
        *_all(_POINTER, "cos sin slots tables first_token scheduled lengths"),
        *_all(_WHOLE, "width seqs"),
    )
    kept: Sequence[Any] = ()


class Pages(Struct):
    """Addresses of a layer's KV cache, and its block size."""

    _fields_ = (*_all(_POINTER, "keys values key_scales value_scales"), ("block_size", _WHOLE))


class RouterLayer(Struct):
    """Weights and settings of a layer's router, and of the norm before it."""

    _fields_ = (
        *_all(_POINTER, "norm weight bias correction"),
        *_all(_WHOLE, "hidden experts top_k is_softmax renormalise groups top_groups adds_two"),
        *_all(_FLOAT, "eps scale"),
    )


class HeadLayer(Struct):
    """Weights of the output head, and of the final norm."""

    _fields_ = (("matrix", Matrix), ("norm", _POINTER), ("eps", _FLOAT))


class ExpertsLayer(Struct):
    """Weights and sizes of a layer's experts."""

    _fields_ = (
        *_all(_POINTER, "gate up down"),
        *_all(_WHOLE, "count inner is_narrow is_float8 hidden_group inner_group inner_first"),
    )

    @staticmethod
    def of(experts: CompiledExperts) -> "ExpertsLayer":
        """The structure of experts that our C++ kernels compute."""
        pointers = (None if each is None else ctypes.addressof(each) for each in experts.matrices)
        up, down = experts.held[0].up, experts.held[0].down
        narrow: tuple[int, ...] = ()
        if isinstance(up, NarrowLinear) and isinstance(down, NarrowLinear):
            narrow = True, up.is_float8, up.group, down.group, down.first
        return ExpertsLayer(*pointers, len(experts.held), up.out_features, *narrow)


class Mlp(Struct):
    """Weights of an MLP of all tokens, with the norm before it and the scale after it, if any."""

    _fields_ = (*_all(_POINTER, "experts norm scale"), ("hidden", _WHOLE), ("eps", _FLOAT))


class Layer(Struct):
    """A layer that is computed with others in one call."""

    _fields_ = (
        *_all(_POINTER, "attention router experts mlp"),
        ("pages", Pages),
        ("index", _WHOLE),
        ("counts", _POINTER),
    )


class Progress(Struct):
    """Addresses of a rank's line of the progress board, and of its meter's times."""

    _fields_ = (*_all(_POINTER, "layer stage counter time_ns meter"), ("stages", _WHOLE * 5))


class CompiledRouter(Router):
    """The norm, the router's product and the choice of experts in one C++ call (`moe_step.cpp`)."""

    def __init__(self, params: RouterParams, norm: Norm, library: ctypes.CDLL) -> None:
        super().__init__(params, norm)
        routing, (num_experts, hidden) = params.routing, params.weight.shape
        self.layer = RouterLayer(
            *(address_of(each) for each in (params.norm, params.weight)),
            *(address_of(each) for each in (params.bias, params.correction_bias)),
            *(hidden, num_experts, params.top_k, routing.scoring_func == "softmax"),
            *(routing.norm_topk_prob, routing.n_group, routing.topk_group),
            *(routing.group_score == "top2_sum", params.eps, routing.routed_scaling_factor),
        )
        self._functions = {
            dtype: getattr(library, f"router_part{suffix}") for dtype, suffix in SUFFIX.items()
        }

    @staticmethod
    def suits(params: RouterParams) -> bool:
        """Whether our C++ can read the router's weight: its width and its layout."""
        return params.weight.shape[1] % LANES == 0 and params.weight.is_contiguous()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normed tokens [num_tokens, hidden_size], and their top-k ids and weights.

        Batches of many tokens take the operations of `Router`.
        """
        num_tokens, top_k = x.shape[0], self.params.top_k
        if x.dtype not in SUFFIX or num_tokens > MOST_TOKENS or not x.is_contiguous():
            return super().__call__(x)
        hidden = torch.empty_like(x)
        topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
        topk_weights = torch.empty(num_tokens, top_k)
        self._functions[x.dtype](
            *(self.layer.address, x.data_ptr(), num_tokens, hidden.data_ptr()),
            *(topk_ids.data_ptr(), topk_weights.data_ptr()),
        )
        return hidden, topk_ids, topk_weights


class LocalExperts(Part):
    """An MoE block whose experts are all on this rank: router, experts, and weighted sums.

    It is computed by four calls in turn: `route`, `group`, `compute`, `combine` (`moe_step.cpp`).
    They share a buffer, `work`.
    """

    def __init__(
        self,
        router: CompiledRouter,
        experts: CompiledExperts,
        library: ctypes.CDLL,
        dtype: torch.dtype,
    ) -> None:
        super().__init__("local_experts", library, dtype)
        self._kept, self._experts = (router, experts), ExpertsLayer.of(experts)
        self._top_k, self._num_experts = router.params.top_k, len(experts.held)
        self.layers = router.layer.address, self._experts.address
        self._bytes, self._route, self._combine = (
            getattr(library, f"local_{name}{SUFFIX[dtype]}")
            for name in ("bytes", "route", "combine")
        )

    def route(self, x: Tensor) -> Tensor:
        """Norm tokens [num_tokens, hidden_size] and choose their experts.

        Returns:
            The buffer `work` that the other calls take.
        """
        num_tokens = x.shape[0]
        work = torch.empty(self._bytes(*self.layers, num_tokens), dtype=torch.uint8)
        self._route(*self.layers, x.data_ptr(), num_tokens, work.data_ptr())
        return work

    def topk_ids(self, work: Tensor, num_tokens: int) -> Tensor:
        """Top-k ids [num_tokens, top_k] int64 that `route` has chosen."""
        return self._whole_numbers(work)[: num_tokens * self._top_k].view(num_tokens, self._top_k)

    def normed(self, work: Tensor, x: Tensor) -> Tensor:
        """The normed tokens [num_tokens, hidden_size]."""
        begin = 8 * (3 * x.shape[0] * self._top_k + self._num_experts)
        return work[begin : begin + x.nbytes].view(x.dtype).view(x.shape)

    def group(self, work: Tensor, num_tokens: int) -> None:
        """Sort the token-expert pairs by expert."""
        self.library.local_group(*self.layers, num_tokens, work.data_ptr())

    def num_tokens_per_expert(self, work: Tensor, num_tokens: int) -> Tensor:
        """Pairs of each expert [num_experts]; known after `group`."""
        begin = num_tokens * self._top_k
        ends = self._whole_numbers(work)[begin : begin + self._num_experts]
        return ends.diff(prepend=ends.new_zeros(1))

    def compute(self, work: Tensor, num_tokens: int) -> None:
        """Apply the experts to their pairs."""
        self._function(*self.layers, num_tokens, work.data_ptr())

    def combine(self, work: Tensor, x: Tensor, *, adds_input: bool) -> Tensor:
        """Weighted sums of the experts' results [num_tokens, hidden_size], with x added or not."""
        out, added = torch.empty_like(x), x.data_ptr() if adds_input else None
        self._combine(*self.layers, added, x.shape[0], work.data_ptr(), out.data_ptr())
        return out

    @staticmethod
    def _whole_numbers(work: Tensor) -> Tensor:
        return work[: work.shape[0] // 8 * 8].view(torch.int64)


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
        """True if the call can compute x [num_tokens, hidden_size]."""
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
        """True if the call can compute x [num_tokens, hidden_size]."""
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
            token_ids: [num_seqs] int64, to be filled: `model.head.likeliest` of the logits.
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
