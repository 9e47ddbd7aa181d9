"""The choice of experts as one kernel; `ops.router.route` defines it.

A program takes one token: its scores lie in registers, and the best is taken top_k times. Torch
does the same in 3 operations, or 15 where experts have groups.

Limits: one launch; 4 · num_experts bytes are read for a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertlane.engine.ops.cuda.launch import launch
from expertlane.engine.ops.router import TINY, Router
from expertlane.spec.model import Routing


@triton.jit
def _route_kernel(
    logits, correction_bias, topk_ids, topk_weights, logits_row, factor, tiny,
    NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BEST_GROUPS: tl.constexpr,
    TAKES_MAX: tl.constexpr, TOP_K: tl.constexpr,
    IS_SOFTMAX: tl.constexpr, IS_OF_CHOSEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORMS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, GROUPS)[:, None], tl.arange(0, SIZE)[None, :]
    is_there = (group < NUM_GROUPS) & (place < GROUP_SIZE)
    expert = tl.where(is_there, group * GROUP_SIZE + place, GROUPS * SIZE)
    scores = tl.load(logits + row * logits_row + expert, mask=is_there, other=-float("inf"))
    is_number = _greatest((scores != scores).to(tl.int32)) == 0
    if not IS_OF_CHOSEN:
        if IS_SOFTMAX:
            scores = tl.exp(scores - _greatest(scores))
            scores /= tl.sum(tl.sum(scores, axis=1), axis=0)
        else:
            small = tl.exp(-tl.abs(scores))
            scores = tl.where(scores < 0, small, 1.0) / (1 + small)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(correction_bias + expert, mask=is_there, other=0.0)
    # What is taken or not there is -inf, below all that is there.
    choice = tl.where(is_there, tl.maximum(choice, -1.0e38), -float("inf"))
    if NUM_GROUPS > 1:
        is_best = _are_best(choice, BEST_GROUPS, TAKES_MAX, GROUPS)
        choice = tl.where(is_best[:, None], choice, -float("inf"))
    number = tl.arange(0, CHOICES)
    ids, weights = number, tl.full([CHOICES], -float("inf"), tl.float32)
    for taken in tl.static_range(TOP_K):
        found = tl.where(choice == _greatest(choice), expert, GROUPS * SIZE)
        best = tl.min(tl.min(found, axis=1), axis=0)
        is_it = expert == best
        ids = tl.where(number == taken, best, ids)
        score = _greatest(tl.where(is_it, scores, -float("inf")))
        weights = tl.where(number == taken, score, weights)
        choice = tl.where(is_it, -float("inf"), choice)
    if IS_OF_CHOSEN:
        weights = tl.exp(weights - tl.max(weights, axis=0))
        weights /= tl.sum(weights, axis=0)
    elif NORMS:
        weights /= tl.sum(tl.where(number < TOP_K, weights, 0.0), axis=0) + tiny
    ids = tl.where(is_number, ids, number)  # experts that exist
    weights = tl.where(is_number, weights * factor, float("nan"))
    to = row * TOP_K + number
    tl.store(topk_ids + to, ids.to(tl.int64), mask=number < TOP_K)
    tl.store(topk_weights + to, weights, mask=number < TOP_K)


@triton.jit
def _greatest(x):
    """The greatest value of a matrix [rows, columns]."""
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def _are_best(choice, BEST: tl.constexpr, TAKES_MAX: tl.constexpr, GROUPS: tl.constexpr):
    """[GROUPS]; whether a group is among the best, by its greatest score or its two greatest."""
    of_group = tl.max(choice, axis=1)
    if not TAKES_MAX:
        place = tl.arange(0, choice.shape[1])[None, :]
        first = tl.argmax(choice, axis=1)
        others = tl.where(place == first[:, None], -float("inf"), choice)
        of_group += tl.max(others, axis=1)
    number = tl.arange(0, GROUPS)
    is_best = number < 0
    for _ in tl.static_range(BEST):
        found = tl.argmax(tl.where(is_best, -float("inf"), of_group), axis=0)
        is_best = is_best | (number == found)
    return is_best


def route(
    logits: Tensor, top_k: int, routing: Routing, correction_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token, as `ops.router.route` defines it.

    Of equal scores the expert with the lower number wins. A token with a NaN among its logits gets
    weights of NaN.
    """
    num_rows, num_experts = logits.shape
    topk_ids = logits.new_empty(num_rows, top_k, dtype=torch.int64)
    topk_weights = logits.new_empty(num_rows, top_k)
    is_softmax, has_groups = routing.scoring_func == "softmax", routing.n_group > 1
    size = num_experts // routing.n_group
    groups = triton.next_power_of_2(routing.n_group)
    lanes = groups * triton.next_power_of_2(size)
    launch(
        _route_kernel,
        (num_rows,),
        *(logits, correction_bias, topk_ids, topk_weights, logits.stride(0)),
        *(routing.routed_scaling_factor, TINY),
        NUM_GROUPS=routing.n_group,
        GROUP_SIZE=size,
        BEST_GROUPS=routing.topk_group if has_groups else 0,
        TAKES_MAX=routing.group_score == "max",
        TOP_K=top_k,
        IS_SOFTMAX=is_softmax,
        IS_OF_CHOSEN=is_softmax
        and routing.norm_topk_prob
        and not has_groups
        and correction_bias is None,
        HAS_BIAS=correction_bias is not None,
        NORMS=routing.norm_topk_prob,
        GROUPS=groups,
        SIZE=lanes // groups,
        CHOICES=triton.next_power_of_2(top_k),
        num_warps=max(1, min(4, lanes // 64)),
    )
    return topk_ids, topk_weights


class CudaRouter(Router):
    """A router that chooses experts in one launch after its product."""

    route = staticmethod(route)
