"""The router: which experts each token goes to, and with which weights."""

import torch
from torch import Tensor


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` largest logits of each token; weights are a softmax over the chosen.

    Args:
        logits: [num_tokens, num_experts] float32.

    Returns:
        topk_ids: [num_tokens, top_k] int64, by falling logit.
        topk_weights: [num_tokens, top_k] float32, each row adds up to 1.
    """
    chosen, topk_ids = logits.topk(top_k, dim=-1)
    return topk_ids, torch.softmax(chosen, dim=-1)
