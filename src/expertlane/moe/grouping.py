"""Which rows go to which peer, and pairs by expert: tensor operations, or our kernels on a CPU.

A *physical id* names a slot of a rank; -1 is none. Shapes: T tokens, R rows, K = top_k ids in each,
P token-expert pairs, numbered by row, then choice.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertlane.ops.backend import arithmetic_for, bookkeeping_for


@dataclass(frozen=True)
class PeerRows:
    """Rows of tokens for peers: one for each peer that a token reaches, by peer, then token.

    Attributes:
        counts: [num_peers]; rows for each.
        tokens: [R]; the token of each row.
        ids: [R, K] int32; by what the peer knows its ids, -1 for other peers'.
        places: [T, num_peers]; the row of each token for each peer, -1 for none.
    """

    counts: Tensor
    tokens: Tensor
    ids: Tensor
    places: Tensor


@dataclass(frozen=True)
class PairGroups:
    """Pairs in the order of their groups, stable.

    Attributes:
        counts: [num_groups]; pairs of each.
        rows: [P]; the row of each pair in that order.
        order: [P]; the number of each pair in that order.
        numbers: [R, K]; the number of the pair, -1 where there is none.
    """

    counts: Tensor
    rows: Tensor
    order: Tensor
    numbers: Tensor


def choose_copies(topk_ids: Tensor, table: Tensor, num_copies: Tensor, first: int) -> Tensor:
    """[T, K] int32; physical ids of logical experts, whose copies take turns in order of pairs.

    Args:
        topk_ids: [T, K] int64.
        table: [num_experts, most copies]; physical ids.
        num_copies: [num_experts]; how many of them are to be used.
        first: the turn to begin with.
    """
    assert topk_ids.dtype is torch.int64, "the kernels take its memory as it is"
    kernels = bookkeeping_for(topk_ids)
    if kernels is not None:
        return kernels.choose_copies(topk_ids, table, num_copies, first)
    ids = topk_ids.flatten()
    copy: Tensor | int = 0
    if table.shape[1] > 1:
        copy = (_num_equal_before(ids) + first) % num_copies[ids]
    return table[ids, copy].view_as(topk_ids).int()


def rows_by_peer(ids: Tensor, divisor: int, num_peers: int) -> PeerRows:
    """Rows for the peers id // divisor, which know the ids as id % divisor.

    Args:
        ids: [T, K] int32; -1 for none.
    """
    kernels = bookkeeping_for(ids)
    if kernels is not None:
        return PeerRows(*kernels.rows_by_peer(ids, divisor, num_peers))
    peers = torch.div(ids, divisor, rounding_mode="floor")
    reached = torch.zeros(len(ids), num_peers + 1, dtype=torch.bool, device=ids.device)
    reached = reached.scatter_(1, peers.where(peers >= 0, num_peers).long(), True)[:, :num_peers]
    peer, tokens = reached.t().nonzero(as_tuple=True)
    is_theirs = peers.index_select(0, tokens) == peer[:, None]
    ids_there = torch.where(is_theirs, ids.index_select(0, tokens) % divisor, -1)
    places = torch.full(reached.shape, -1, device=ids.device)
    places[tokens, peer] = torch.arange(len(tokens), device=ids.device)
    return PeerRows(reached.sum(0), tokens, ids_there, places)


def group_pairs(ids: Tensor, first: int, divisor: int, num_groups: int) -> PairGroups:
    """Pairs by the groups (id - first) // divisor; ids of other groups belong to no pair.

    Args:
        ids: [R, K] int32.
    """
    kernels = bookkeeping_for(ids)
    if kernels is not None:
        return PairGroups(*kernels.group_pairs(ids, first, divisor, num_groups))
    groups = torch.div(ids.flatten() - first, divisor, rounding_mode="floor")
    pair = ((groups >= 0) & (groups < num_groups)).nonzero().squeeze(1)  # row · K + choice
    groups = groups[pair]
    order = stable_order(groups, num_groups)
    numbers = torch.full((ids.numel(),), -1, device=ids.device)
    numbers[pair] = torch.arange(len(pair), device=ids.device)
    counts = torch.bincount(groups, minlength=num_groups)
    return PairGroups(counts, pair[order] // ids.shape[1], order, numbers.view(ids.shape))


def inverse(order: Tensor) -> Tensor:
    """[n]; where each of n things stands in an order of them."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


def stable_order(values: Tensor, num_values: int) -> Tensor:
    """[n]; the order of values [n] that are less than `num_values`, equal ones as they stand."""
    if values.device.type == "cpu":
        narrow = values.numpy().astype(np.min_scalar_type(num_values))  # numpy then sorts by radix
        return torch.from_numpy(np.argsort(narrow, kind="stable"))
    return torch.argsort(values, stable=True)


def gather_sum(values: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum some rows of `values`, in float32 and in the order given; nothing where there are none.

    Args:
        values: [num_values, H].
        places: [R, M]; the rows that go into each sum, -1 for none.
        weights: [R, M] float32; None for ones.

    Returns:
        [R, H] in the dtype of `values`.
    """
    kernels = arithmetic_for(values) if values.shape[1] % 16 == 0 else None
    if kernels is not None:
        weights = None if weights is None else weights.contiguous()
        return kernels.weighted_sum(values, places.contiguous(), weights)
    total = values.new_zeros((len(places), values.shape[1]), dtype=torch.float32)
    for number, column in enumerate(places.unbind(1)):
        there = (column >= 0).nonzero().squeeze(1)
        rows = values[column[there]].float()
        if weights is not None:
            rows *= weights[there, number, None]
        total.index_add_(0, there, rows)  # no row twice
    return total.to(values.dtype)


def _num_equal_before(ids: Tensor) -> Tensor:
    """[n]; how many equal ids stand before each."""
    order = torch.argsort(ids, stable=True)
    ordered, places = ids[order], torch.arange(len(ids), device=ids.device)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(is_first, places, 0).cummax(0).values if len(ids) else places
    num_before = torch.empty_like(places)
    num_before[order] = places - start
    return num_before
