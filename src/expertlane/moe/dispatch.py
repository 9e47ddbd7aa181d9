"""Dispatch forms: how tokens travel to the ranks of their experts, and results back.

All of them drop no token, whatever the load. Shapes: T tokens of this rank, K = top_k, R rows at
the experts' rank, P token-expert pairs there, H = hidden_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from expertlane.kernels.cpu import kernels_for
from expertlane.parallel.interleave import Steps


@dataclass(frozen=True)
class ExpertInput:
    """What arrived for the experts of a rank.

    Attributes:
        rows: [P, H]; grouped by expert.
        num_tokens_per_expert: [num_local_experts].
    """

    rows: Tensor
    num_tokens_per_expert: list[int]


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
            results: [P, H]; outputs for `ExpertInput.rows`, partial sums under etp.

        Returns:
            [T, H] in the dtype of `results`.
        """
        ...


@dataclass(frozen=True)
class Pairs:
    """Where the results of some rows' token-expert pairs stand.

    Attributes:
        weights: [R, K] float32; the router's weights.
        place_of: [P]; the place in the experts' input of each pair, by row, then choice.
        places: [R, K]; the same by row and choice, -1 where another rank computes the pair.
    """

    weights: Tensor
    place_of: Tensor
    places: Tensor

    def weighted_sum(self, results: Tensor) -> Tensor:
        """[R, H]; results [P, H] summed by row."""
        return gather_sum(results, self.places, self.weights)


def group_by_expert(
    rows: Tensor, slots: Tensor, weights: Tensor, num_local_experts: int
) -> tuple[ExpertInput, Pairs]:
    """Put the pairs of rows in the order of their experts.

    Args:
        rows: [R, H]; may be apart.
        slots: [R, K]; the local expert of each choice, -1 where it is another rank's.
        weights: [R, K] float32.
    """
    slot = slots.flatten()
    pair = (slot >= 0).nonzero().squeeze(1)  # row · K + choice
    order, num_tokens = by_expert(slot[pair], num_local_experts)
    place_of = inverse(order)
    places = torch.full_like(slot, -1, dtype=torch.int64)
    places[pair] = place_of
    arrived = ExpertInput(rows.index_select(0, pair[order] // slots.shape[1]), num_tokens)
    return arrived, Pairs(weights, place_of, places.view(slots.shape))


def inverse(order: Tensor) -> Tensor:
    """[n]; where each of n things stands in an order of them."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


def gather_sum(values: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Sum some rows of `values`, in float32 and in the order given; nothing where there are none.

    Args:
        values: [num_values, H].
        places: [R, M]; the rows that go into each sum, -1 for none.
        weights: [R, M] float32.

    Returns:
        [R, H] in the dtype of `values`.
    """
    kernels = kernels_for(values) if values.shape[1] % 16 == 0 else None
    if kernels is not None:
        return kernels.weighted_sum(values, places.contiguous(), weights.contiguous())
    total = values.new_zeros((len(places), values.shape[1]), dtype=torch.float32)
    for column, of_column in zip(places.unbind(1), weights.unbind(1), strict=True):
        there = (column >= 0).nonzero().squeeze(1)
        weighted = values[column[there]].float() * of_column[there, None]
        total.index_add_(0, there, weighted)  # no row twice
    return total.to(values.dtype)


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
        order, num_tokens = by_expert(topk_ids.flatten(), self._num_experts)
        rows = x.index_select(0, order // topk_ids.shape[1])
        return ExpertInput(rows, num_tokens), (topk_weights, order)
        yield  # a generator like the others, though it never waits

    def combine(self, sent: tuple[Tensor, Tensor], results: Tensor) -> Steps[Tensor]:
        """Sum the outputs of each token's experts."""
        weights, order = sent
        return gather_sum(results, inverse(order).view_as(weights), weights)
        yield


def by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The order of pairs by expert, stable, and how many pairs each expert has."""
    if experts.device.type == "cpu":  # numpy takes a tenth of torch's time for the few of a step
        counts: list[int] = np.bincount(experts.numpy(), minlength=num_experts).tolist()
    else:
        counts = torch.bincount(experts, minlength=num_experts).tolist()
    return stable_order(experts, num_experts), counts


def stable_order(values: Tensor, num_values: int) -> Tensor:
    """[n]; the order of values [n] that are less than `num_values`, equal ones as they stand."""
    if values.device.type == "cpu":
        narrow = values.numpy().astype(np.min_scalar_type(num_values))  # numpy then sorts by radix
        return torch.from_numpy(np.argsort(narrow, kind="stable"))
    return torch.argsort(values, stable=True)
