"""Root-mean-square norm."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32.

    Args:
        x: [..., size].
        weight: [size].
    """
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
