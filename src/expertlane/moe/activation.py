"""What goes into an MLP's down projection."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """The inner function of an MLP; its attributes are those of `ModelConfig`."""

    hidden_act: Literal["gelu", "silu"]
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def is_plain(self, *, is_gated: bool) -> bool:
        """Whether it is SiLU times up where there is a gate, GELU where there is none."""
        plain = "silu" if is_gated else "gelu"
        return self.swiglu_limit is None and self.hidden_act == plain

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """[num_rows, inner] of gate (None where MLPs are not gated) and up projections."""
        if self.swiglu_limit is not None:
            assert gate is not None, "a clamped SwiGLU has a gate"
            gate = gate.clamp(max=self.swiglu_limit)
            up = up.clamp(-self.swiglu_limit, self.swiglu_limit)
            return (up + 1) * gate * torch.sigmoid(self.swiglu_alpha * gate)
        act = F.gelu if self.hidden_act == "gelu" else F.silu
        return act(up) if gate is None else act(gate) * up
