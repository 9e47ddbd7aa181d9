"""The dense MoE block that every dispatch form is judged by: all experts for all tokens, masked."""

import torch
from torch import Tensor
from torch.nn.functional import gelu


def router_logits(x: Tensor, router: Tensor, bias: Tensor | None = None) -> Tensor:
    """[num_tokens, num_experts]; x and router have hidden_size columns, bias [num_experts]."""
    logits = x.float() @ router.float().T
    return logits if bias is None else logits + bias.float()


def moe_block(
    x: Tensor,
    router: Tensor,
    up: Tensor,
    down: Tensor,
    top_k: int,
    router_bias: Tensor | None = None,
) -> Tensor:
    """The sum of each token's `top_k` experts, weighted by a softmax over their logits.

    Args:
        x: [num_tokens, hidden_size]; there may be no token.
        router: [num_experts, hidden_size]; its bias [num_experts].
        up: [num_experts, moe_intermediate_size, hidden_size].
        down: [num_experts, hidden_size, moe_intermediate_size].

    Returns:
        [num_tokens, hidden_size], float32 whatever the inputs' type.
    """
    logits = router_logits(x, router, router_bias)
    topk_logits, topk_ids = logits.topk(top_k, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, topk_ids, topk_logits.softmax(dim=-1))
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert, weight in enumerate(weights.unbind(dim=-1)):
        inner = gelu(x.float() @ up[expert].float().T)
        out += weight[:, None] * (inner @ down[expert].float().T)
    return out


def router_margin(
    x: Tensor, router: Tensor, top_k: int, router_bias: Tensor | None = None
) -> Tensor:
    """How near each token is to another choice of experts: k-th less (k+1)-th largest logit.

    Returns:
        [num_tokens], float32; infinite where every expert is chosen.
    """
    logits = router_logits(x, router, router_bias)
    if top_k == logits.shape[-1]:
        return logits.new_full(logits.shape[:1], torch.inf)
    ordered = logits.sort(dim=-1, descending=True).values
    return ordered[:, top_k - 1] - ordered[:, top_k]
