"""The experts one rank holds: whole ones, or its slice of each under expert tensor parallelism."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.moe.activation import Activation


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """`inner` is the rank's slice of moe_intermediate_size.

    Attributes:
        up, gate: [num_local_experts, inner, hidden_size]; no gate where MLPs are not gated.
        down: [num_local_experts, hidden_size, inner].
        up_bias, gate_bias: [num_local_experts, inner].
        down_bias: [num_local_experts, hidden_size]; only on the first rank of those whose
            partial sums are added up.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Experts:
    """MLPs side by side."""

    def __init__(self, weights: ExpertWeights, activation: Activation) -> None:
        self._weights = weights
        self._activation = activation

    def forward(self, rows: Tensor, num_tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply each expert to its rows; a partial sum where experts are cut.

        Args:
            rows: [num_rows, hidden_size], grouped by expert.
            num_tokens_per_expert: [num_local_experts]; zeros allowed.

        Returns:
            [num_rows, hidden_size].
        """
        out = torch.empty_like(rows)
        start = 0
        for expert, num_tokens in enumerate(num_tokens_per_expert):
            stop = start + num_tokens
            if num_tokens:
                out[start:stop] = self._apply(expert, rows[start:stop])
            start = stop
        return out

    def _apply(self, expert: int, rows: Tensor) -> Tensor:
        def of(stack: Tensor | None) -> Tensor | None:
            return None if stack is None else stack[expert]

        w = self._weights
        gate = None if w.gate is None else F.linear(rows, w.gate[expert], of(w.gate_bias))
        up = F.linear(rows, w.up[expert], of(w.up_bias))
        return F.linear(self._activation(gate, up), w.down[expert], of(w.down_bias))

    def compute_cost(self, num_tokens_per_expert: Sequence[int]) -> tuple[int, int]:
        """FLOPs and weight bytes read of one `forward`."""
        up = self._weights.up
        num_matrices = 2 if self._weights.gate is None else 3
        num_weights = num_matrices * up.shape[1] * up.shape[2]
        num_used = sum(1 for num_tokens in num_tokens_per_expert if num_tokens)
        flops = 2 * sum(num_tokens_per_expert) * num_weights
        return flops, num_used * num_weights * up.itemsize
