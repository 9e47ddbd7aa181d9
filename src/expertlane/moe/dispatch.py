"""Dispatch forms: how tokens travel to the ranks of their experts, and results back.

All of them drop no token, whatever the load. Shapes: T tokens of this rank, K = top_k, R rows at
the experts' rank, P token-expert pairs there, H = hidden_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from expertlane.comm.interleave import Steps
from expertlane.moe.grouping import PairGroups, gather_sum, group_pairs


@dataclass(frozen=True)
class ExpertInput:
    """What arrived for the experts of a rank; experts read it where it lies.

    Attributes:
        rows: [R, H]; may be apart.
        row_of_pair: [P]; the row of each pair, grouped by expert.
        result_of_pair: [P]; in the same order, the row that the pair's result is to be.
        num_tokens_per_expert: [num_local_experts].
    """

    rows: Tensor
    row_of_pair: Tensor
    result_of_pair: Tensor
    num_tokens_per_expert: list[int]

    @classmethod
    def of(cls, rows: Tensor, pairs: PairGroups) -> "ExpertInput":
        """Rows whose pairs are grouped by expert; results are in order of row, then choice."""
        return cls(rows, pairs.rows, pairs.order, pairs.counts.tolist())

    def by_expert(self) -> Tensor:
        """[P, H]; a copy of the pairs' rows, grouped by expert."""
        return self.rows.index_select(0, self.row_of_pair)


class Dispatcher(Protocol):
    """One form; `dispatch` gives the experts' input and a handle of its own for `combine`."""

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        tokens_of_stage_rank: Sequence[int],
    ) -> Steps[tuple[ExpertInput, Any]]:
        """Send this rank's tokens and receive those for its experts.

        Args:
            x: [T, H].
            topk_ids: [T, K]; logical experts.
            topk_weights: [T, K] float32.
            tokens_of_stage_rank: [dp·tp]; tokens owned by each rank of the stage.
        """
        ...

    def combine(self, sent: Any, results: Tensor) -> Steps[Tensor]:
        """Bring expert outputs home and sum them by the router's weights.

        Args:
            sent: the handle that `dispatch` gave.
            results: [P, H]; in the order of `ExpertInput.result_of_pair`, partial sums under etp.

        Returns:
            [T, H] in the dtype of `results`.
        """
        ...


class LocalDispatcher:
    """For one rank that holds all experts and all tokens."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        tokens_of_stage_rank: Sequence[int],
    ) -> Steps[tuple[ExpertInput, tuple[Tensor, Tensor]]]:
        """Group tokens by expert."""
        pairs = group_pairs(topk_ids.int(), 0, 1, self._num_experts)
        return ExpertInput.of(x, pairs), (pairs.numbers, topk_weights)
        yield  # a generator like the others, though it never waits

    def combine(self, sent: tuple[Tensor, Tensor], results: Tensor) -> Steps[Tensor]:
        """Sum the outputs of each token's experts."""
        return gather_sum(results, *sent)
        yield
