"""Two placements side by side on one trace: balance, crossings between nodes, experts to move."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.balance.copies import num_equal_before
from expertlane.balance.moves import moves
from expertlane.balance.placement import (
    Placement,
    max_over_mean,
    rank_loads,
    total_max_over_mean,
)
from expertlane.balance.trace import RoutingTrace


@dataclass(frozen=True)
class PlacementScore:
    """A placement of one layer, or of all, on a trace.

    Attributes:
        max_over_mean: fullest over mean of `Placement.rank_loads`; for all layers, the sum
            of their fullest ranks over the sum of their means. 0 without tokens.
        cross_node_copies: copies of tokens sent to another node.
    """

    max_over_mean: float
    cross_node_copies: int


@dataclass(frozen=True)
class Comparison:
    """Before and after, for one layer or all.

    Attributes:
        layer: index among the hidden layers, or None for all.
        num_moves: experts that ranks must fetch from others to get from before to after.
    """

    layer: int | None
    before: PlacementScore
    after: PlacementScore
    num_moves: int


def compare(
    trace: RoutingTrace,
    before: Sequence[Placement],
    after: Sequence[Placement],
    ranks_per_node: int,
) -> list[Comparison]:
    """Layer by layer, then all layers; tokens are taken to sit on the nodes in turn.

    Args:
        before, after: [num_layers].
        ranks_per_node: consecutive ranks that share a node.
    """
    needed = [each for each in moves(before, after, ranks_per_node) if each.source != each.rank]
    num_moves = np.bincount([move.layer for move in needed], minlength=len(before))
    old, new = (_score(trace, each, ranks_per_node) for each in (before, after))
    counts = (*num_moves.tolist(), len(needed))
    return list(map(Comparison, (*trace.layers, None), old, new, counts))


def _score(
    trace: RoutingTrace, placements: Sequence[Placement], ranks_per_node: int
) -> list[PlacementScore]:
    """The score of each layer, then of all layers together."""
    loads = rank_loads(placements, trace.load(), ranks_per_node)
    num_nodes = placements[0].ep // ranks_per_node
    source_node = spread_sources(trace.num_tokens, num_nodes)
    copies = [
        cross_node_copies(ids, each, ranks_per_node, source_node)
        for ids, each in zip(trace.topk_ids, placements, strict=True)
    ]
    ratios = (*max_over_mean(loads).tolist(), total_max_over_mean(loads))
    return list(map(PlacementScore, ratios, (*copies, sum(copies))))


_CHUNK = 16_384  # tokens whose choices are laid out as a dense matrix at a time


def coactivation(topk_ids: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.float32]:
    """[num_experts, num_experts]; how many tokens chose both; zero on the diagonal.

    Args:
        topk_ids: [num_tokens, num_experts_per_tok], of one layer.
    """
    counts = np.zeros((num_experts, num_experts), dtype=np.float32)
    for start in range(0, len(topk_ids), _CHUNK):
        ids = topk_ids[start : start + _CHUNK]
        chose = np.zeros((len(ids), num_experts), dtype=np.float32)
        np.put_along_axis(chose, ids.astype(np.int64), 1.0, axis=1)
        counts += chose.T @ chose
    np.fill_diagonal(counts, 0.0)
    return counts


def spread_sources(num_tokens: int, num_nodes: int) -> npt.NDArray[np.int64]:
    """[num_tokens]; a source node for each token, in turn, where the real ones are unknown."""
    return np.arange(num_tokens) % num_nodes


def cross_node_copies(
    topk_ids: npt.NDArray[np.integer],
    placement: Placement,
    ranks_per_node: int,
    source_node: npt.NDArray[np.integer],
) -> int:
    """Copies of tokens that cross nodes: one for each remote node that a token must reach.

    A pair goes to a copy of its expert on the token's own node where there is one; else the
    copies take turns, so that each gets the same share.

    Args:
        topk_ids: [num_tokens, num_experts_per_tok], of one layer.
        ranks_per_node: consecutive ranks that share a node.
        source_node: [num_tokens]; where each token is.
    """
    num_tokens, top_k = topk_ids.shape
    node_of_rank = np.arange(placement.ep) // ranks_per_node
    is_held = placement.slots().T >= 0  # [num_experts, ep]
    node_of_copy = node_of_rank[np.argsort(~is_held, axis=1, kind="stable")]
    num_copies = is_held.sum(axis=1)
    first_ranks = np.arange(0, placement.ep, ranks_per_node)
    is_on_node = np.logical_or.reduceat(is_held, first_ranks, axis=1)
    token = np.repeat(np.arange(num_tokens), top_k)
    expert_of_pair = topk_ids.ravel().astype(np.int64)
    is_remote = ~is_on_node[expert_of_pair, source_node[token]]
    token, remote = token[is_remote], expert_of_pair[is_remote]
    copy = num_equal_before(remote, placement.num_experts) % num_copies[remote]
    reached = np.zeros((num_tokens, len(first_ranks)), dtype=bool)
    reached[token, node_of_copy[remote, copy]] = True
    return int(reached.sum())
