"""The router, and an MoE block whose experts are all on this rank, in few calls of C++."""

import ctypes

import torch
from torch import Tensor

from expertlane.engine.ops.packed import LANES, CompiledExperts
from expertlane.engine.ops.router import Norm, Router, RouterParams
from expertlane.engine.ops.structs import (
    MOST_TOKENS,
    SUFFIX,
    ExpertsLayer,
    Part,
    RouterLayer,
    address_of,
)


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
