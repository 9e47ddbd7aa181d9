"""The experts one rank holds: whole ones, or its slice of each under expert tensor parallelism."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Experts:
    """Standard MLPs: up projection, GELU, down projection.

    Args:
        up: [num_local_experts, inner, hidden_size]; `inner` is the rank's slice of
            moe_intermediate_size.
        down: [num_local_experts, hidden_size, inner].
    """

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.up = up
        self.down = down

    @property
    def num_experts(self) -> int:
        """Experts of this rank."""
        return self.up.shape[0]

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
                inner = F.gelu(rows[start:stop] @ self.up[expert].t())
                torch.mm(inner, self.down[expert].t(), out=out[start:stop])
            start = stop
        return out

    def compute_cost(self, num_tokens_per_expert: Sequence[int]) -> tuple[int, int]:
        """FLOPs and weight bytes read of one `forward`."""
        matrix = self.up.shape[1] * self.up.shape[2]
        num_used = sum(1 for num_tokens in num_tokens_per_expert if num_tokens)
        flops = 2 * 2 * sum(num_tokens_per_expert) * matrix
        return flops, 2 * num_used * matrix * self.up.itemsize
