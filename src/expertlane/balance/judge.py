"""Two placements side by side on one trace: balance, crossings between nodes, experts to move."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertlane.balance.crossing import cross_node_copies, spread_sources
from expertlane.balance.load import max_over_mean
from expertlane.balance.moves import moves
from expertlane.balance.placement import Placement
from expertlane.balance.trace import RoutingTrace


@dataclass(frozen=True)
class Judged:
    """A placement of one layer, or of all, on a trace.

    Attributes:
        max_over_mean: of rank loads, as `Placement.rank_loads` gives them; for all layers, the sum
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
    before: Judged
    after: Judged
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
    needed = moves(before, after, ranks_per_node)
    num_moves = np.bincount(
        [move.layer for move in needed if move.source != move.rank], minlength=len(before)
    )
    old, new = (_judge(trace, each, ranks_per_node) for each in (before, after))
    return [
        Comparison(layer, *judged, int(count))
        for layer, judged, count in zip(
            (*trace.layers, None),
            zip(old, new, strict=True),
            (*num_moves, num_moves.sum()),
            strict=True,
        )
    ]


def _judge(
    trace: RoutingTrace, placements: Sequence[Placement], ranks_per_node: int
) -> list[Judged]:
    """Of each layer, then of all."""
    loads = np.stack(
        [
            each.rank_loads(load, ranks_per_node)
            for each, load in zip(placements, trace.load(), strict=True)
        ]
    )
    num_nodes = placements[0].ep // ranks_per_node
    source_node = spread_sources(trace.num_tokens, num_nodes)
    copies = [
        cross_node_copies(ids, each, ranks_per_node, source_node)
        for ids, each in zip(trace.topk_ids, placements, strict=True)
    ]
    mean = float(loads.mean(axis=1).sum())
    of_all = float(loads.max(axis=1).sum()) / mean if mean else 0.0
    return [
        *(Judged(float(ratio), n) for ratio, n in zip(max_over_mean(loads), copies, strict=True)),
        Judged(of_all, sum(copies)),
    ]
