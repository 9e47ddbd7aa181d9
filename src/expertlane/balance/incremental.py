"""A more even placement near the present one: few experts move, so that it soon pays."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import EMPTY, Ints
from expertlane.balance.placement import Placement
from expertlane.balance.planner import search_copies
from expertlane.balance.refine import lower_maximum


def improve_placements(
    load: npt.NDArray[np.integer], now: Sequence[Placement], ranks_per_node: int, even: float
) -> list[Placement]:
    """Change copies and swap experts of the fullest ranks until all are even enough.

    A copy that changes its expert moves one expert, a swap two. Loads are those of
    `Placement.rank_loads`; crossings between nodes are not looked at.

    Args:
        load: [num_layers, num_experts].
        now: [num_layers]; ranks keep their numbers of slots.
        ranks_per_node: consecutive ranks that share a node; it divides `ep`.
        even: a fullest rank at most this many times the mean is even enough.
    """
    loads = load.astype(np.float64)
    target = even * loads.sum(axis=1) / now[0].ep
    width = max(len(experts) for placed in now for experts in placed.experts_of_rank)
    slots: Ints = np.full((len(now), now[0].ep, width), EMPTY, dtype=np.int64)
    for layer, placed in enumerate(now):
        for rank, experts in enumerate(placed.experts_of_rank):
            slots[layer, rank, : len(experts)] = experts
    num_nodes = now[0].ep // ranks_per_node
    search_copies(slots, loads, num_nodes, target, num_swaps=0)
    slots = lower_maximum(slots, loads, num_nodes, target)
    search_copies(slots, loads, num_nodes, target)
    search_copies(slots, loads, num_nodes, target, keeps_even=False)
    return [
        Placement(
            placed.num_experts, tuple(tuple(rank[rank != EMPTY].tolist()) for rank in of_layer)
        )
        for placed, of_layer in zip(now, slots, strict=True)
    ]
