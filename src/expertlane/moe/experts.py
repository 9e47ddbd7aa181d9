"""The experts one rank holds: whole ones, or its slice of each under expert tensor parallelism."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from expertlane.kernels.cpu import Pointers
from expertlane.moe.activation import Activation
from expertlane.parallel.linear import Linear


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
        def linears(stack: Tensor | None, bias: Tensor | None) -> list[Linear]:
            if stack is None:
                return []
            return [
                Linear(matrix, None if bias is None else bias[expert])
                for expert, matrix in enumerate(stack)
            ]

        self._activation = activation
        self._gates = linears(weights.gate, weights.gate_bias)
        self._ups = linears(weights.up, weights.up_bias)
        self._downs = linears(weights.down, weights.down_bias)
        self._inner, hidden_size = weights.up.shape[1:]
        self._num_weights = self._inner * hidden_size * (2 if weights.gate is None else 3)
        self._itemsize = weights.up.itemsize
        self._kernel = self._own_kernel()

    def _own_kernel(self) -> Callable[[Tensor, Sequence[int]], Tensor] | None:
        """All experts in one call, where our kernels know the model's kind of MLP."""
        linears = [*self._gates, *self._ups, *self._downs]
        kernels = self._ups[0].kernels
        if (
            kernels is None
            or self._inner % 32
            or any(linear.kernels is None or linear.bias is not None for linear in linears)
            or not self._activation.is_plain(is_gated=bool(self._gates))
        ):
            return None
        gate, up, down = (
            Pointers([linear.packed for linear in of_part]) if of_part else None
            for of_part in (self._gates, self._ups, self._downs)
        )
        assert up is not None, "there are experts"
        assert down is not None, "there are experts"
        return partial(kernels.experts, gate=gate, up=up, down=down, inner=self._inner)

    def forward(self, rows: Tensor, num_tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply each expert to its rows; a partial sum where experts are cut.

        Args:
            rows: [num_rows, hidden_size], grouped by expert.
            num_tokens_per_expert: [num_local_experts]; zeros allowed.

        Returns:
            [num_rows, hidden_size].
        """
        ends = list(accumulate(num_tokens_per_expert))
        if self._kernel is not None:
            return self._kernel(rows, ends)
        results = [
            self._apply(expert, rows[end - num_tokens : end])
            for expert, (end, num_tokens) in enumerate(
                zip(ends, num_tokens_per_expert, strict=True)
            )
            if num_tokens
        ]
        return torch.cat(results) if results else torch.empty_like(rows)

    def _apply(self, expert: int, rows: Tensor) -> Tensor:
        gate = self._gates[expert](rows) if self._gates else None
        return self._downs[expert](self._activation(gate, self._ups[expert](rows)))

    def compute_cost(self, num_tokens_per_expert: Sequence[int]) -> tuple[int, int]:
        """FLOPs and weight bytes read of one `forward`."""
        num_used = sum(1 for num_tokens in num_tokens_per_expert if num_tokens)
        flops = 2 * sum(num_tokens_per_expert) * self._num_weights
        return flops, num_used * self._num_weights * self._itemsize
