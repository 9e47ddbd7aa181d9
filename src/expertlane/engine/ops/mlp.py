"""An MLP that every token takes, as one call of `mlp.cpp`."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertlane.engine.ops.library import function_of
from expertlane.engine.ops.products import Experts
from expertlane.engine.ops.structs import SUFFIX, ExpertsLayer, Mlp, address_of, most_tokens


class MlpPart:
    """An MLP in one call, with the norm before it and the scale after it, if any.

    Args:
        experts: the MLP, as experts of which there is one.
        matrices: arrays of addresses of its gate (None without a gate), up and down.
        norm: [hidden_size] float32; None where tokens come normed.
        scale: [1, hidden_size]; the output is multiplied by the sigmoid of this projection.
    """

    def __init__(
        self,
        experts: Experts,
        matrices: Sequence[Any],
        norm: Tensor | None,
        eps: float,
        scale: Tensor | None,
        library: ctypes.CDLL,
        dtype: torch.dtype,
    ) -> None:
        self._kept, self._dtype = (experts, matrices, norm, scale), dtype
        self._experts = ExpertsLayer.of(experts.held, matrices)
        hidden = experts.held[0].up.in_features
        pointers = (self._experts.address, address_of(norm), address_of(scale))
        self._mlp = Mlp(*pointers, hidden, eps)
        self.layer = self._mlp.address
        self._function = function_of(library, f"mlp_part{SUFFIX[dtype]}", "ppnp")

    def takes(self, x: Tensor) -> bool:
        """Whether the call can compute x [num_tokens, hidden_size]."""
        return 0 < x.shape[0] <= most_tokens(self._dtype) and x.is_contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """The MLP's output [num_tokens, hidden_size], of x [num_tokens, hidden_size]."""
        out = torch.empty_like(x)
        self._function(self.layer, x.data_ptr(), x.shape[0], out.data_ptr())
        return out
