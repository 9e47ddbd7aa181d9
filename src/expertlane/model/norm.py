"""Root-mean-square norm."""

import torch.nn.functional as F
from torch import Tensor

from expertlane.ops.backend import arithmetic_for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32.

    Args:
        x: [num_rows, size].
        weight: [size] float32.
    """
    kernels = arithmetic_for(x) if x.shape[1] % 16 == 0 and x.stride(1) == 1 else None
    if kernels is not None:
        return kernels.rms_norm(x, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def rms_norm_heads_(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of every head, maybe in place.

    Args:
        x: [num_tokens, num_heads, head_dim]; not to be used afterwards.
        weight: [num_heads, head_dim] float32.
    """
    kernels = arithmetic_for(x) if x.shape[2] % 16 == 0 else None
    if kernels is not None:
        kernels.rms_norm_heads(x, weight, eps)
        return x
    return (F.rms_norm(x.float(), x.shape[2:], None, eps) * weight).to(x.dtype)
