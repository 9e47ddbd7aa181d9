"""The experts one rank holds: whole ones, or its slice of each under expert tensor parallelism.

Shapes: R rows at the experts' rank, P token-expert pairs there, H = hidden_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from expertlane.ops.backend import backend_for
from expertlane.ops.experts import Activation, Expert
from expertlane.ops.torch_backend import PairGroups


@dataclass(frozen=True)
class ExpertInput:
    """What arrived for the experts of a rank; experts read it where it lies.

    Attributes:
        rows: [R, H]; may be apart.
        row_of_pair: [P]; the row of each pair, grouped by expert.
        result_of_pair: [P]; in the same order, the row that the pair's result is to be.
        num_tokens_per_expert: [num_local_experts] int64.
    """

    rows: Tensor
    row_of_pair: Tensor
    result_of_pair: Tensor
    num_tokens_per_expert: Tensor

    @classmethod
    def of(cls, rows: Tensor, pairs: PairGroups) -> "ExpertInput":
        """Rows whose pairs are grouped by expert; results are in order of row, then choice."""
        return cls(rows, pairs.rows, pairs.order, pairs.counts)

    def by_expert(self) -> Tensor:
        """[P, H]; a copy of the pairs' rows, grouped by expert."""
        return self.rows.index_select(0, self.row_of_pair)


class Experts:
    """MLPs side by side.

    Attributes:
        held: [num_local_experts].
    """

    def __init__(self, held: Sequence[Expert], activation: Activation) -> None:
        self.held = list(held)
        self.activation = activation
        first = self.held[0]
        self._num_weights = sum(linear.num_weights for linear in first.linears)
        self._itemsize = first.up.itemsize
        self._apply = backend_for(first.up.weight.device).experts(self.held, activation)

    def forward(self, arrived: ExpertInput) -> Tensor:
        """Apply each expert to the rows of its pairs; a partial sum where experts are cut.

        Returns:
            [P, hidden_size], in the order of `arrived.result_of_pair`.
        """
        return self._apply(
            arrived.rows,
            arrived.row_of_pair,
            arrived.result_of_pair,
            arrived.num_tokens_per_expert,
        )

    def compute_cost(self, num_tokens_per_expert: Sequence[int]) -> tuple[int, int]:
        """FLOPs and weight bytes read of one `forward`."""
        num_used = sum(1 for num_tokens in num_tokens_per_expert if num_tokens)
        flops = 2 * sum(num_tokens_per_expert) * self._num_weights
        return flops, num_used * self._num_weights * self._itemsize
