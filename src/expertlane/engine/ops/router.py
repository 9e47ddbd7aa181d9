"""The router: which experts each token goes to, and with which weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.spec.model import Routing

TINY = 1e-20  # keeps a sum of vanishing scores from dividing by zero


Norm = Callable[[Tensor, Tensor, float], Tensor]


def route(
    logits: Tensor, top_k: int, routing: Routing, correction_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token, as `Routing` says.

    Args:
        logits: [num_tokens, num_experts] float32.
        correction_bias: [num_experts] float32; added to the scores for the choice alone.

    Returns:
        topk_ids: [num_tokens, top_k] int64, best first.
        topk_weights: [num_tokens, top_k] float32.
    """
    is_softmax = routing.scoring_func == "softmax"
    if is_softmax and routing.norm_topk_prob and routing.n_group == 1 and correction_bias is None:
        chosen, topk_ids = logits.topk(top_k, dim=-1)  # a softmax over the chosen: no underflow
        return topk_ids, torch.softmax(chosen, dim=-1) * routing.routed_scaling_factor
    scores = logits.softmax(dim=-1) if is_softmax else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    topk_ids = _mask_groups(choice, routing).topk(top_k, dim=-1).indices
    weights = scores.gather(1, topk_ids)
    if routing.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return topk_ids, weights * routing.routed_scaling_factor


def _mask_groups(choice: Tensor, routing: Routing) -> Tensor:
    """Scores of experts in the `topk_group` best groups; -inf for the others."""
    if routing.n_group == 1:
        return choice
    by_group = choice.view(len(choice), routing.n_group, choice.shape[1] // routing.n_group)
    if routing.group_score == "max":
        group_scores = by_group.amax(dim=-1)
    else:
        group_scores = by_group.topk(2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(routing.topk_group, dim=-1).indices
    is_best = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return by_group.masked_fill(~is_best[:, :, None], -torch.inf).flatten(1)


@dataclass(frozen=True, eq=False)
class RouterParams:
    """Weights of a layer's router, and of the norm of its input.

    Attributes:
        norm: [hidden_size] float32; weight of the root-mean-square norm, with `eps`.
        weight: [num_experts, hidden_size] float32, so that rounding does not decide near ties.
        bias, correction_bias: [num_experts] float32.
    """

    norm: Tensor
    eps: float
    weight: Tensor
    bias: Tensor | None
    correction_bias: Tensor | None
    top_k: int
    routing: Routing


class Router:
    """Norms tokens and chooses their experts.

    Args:
        norm: the backend's `rms_norm`.
    """

    def __init__(self, params: RouterParams, norm: Norm) -> None:
        self.params, self._norm = params, norm

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normed tokens [num_tokens, hidden_size], and their top-k ids and weights.

        Args:
            x: [num_tokens, hidden_size].
        """
        hidden = self._norm(x, self.params.norm, self.params.eps)
        return hidden, *self.choose(hidden)

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Top-k ids and weights [num_tokens, top_k] of normed tokens [num_tokens, hidden_size]."""
        params = self.params
        logits = F.linear(hidden.float(), params.weight, params.bias)
        return route(logits, params.top_k, params.routing, params.correction_bias)
