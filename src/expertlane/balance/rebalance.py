"""The placement to go over to, near the present one or wholly new, and what it brings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.balance.gain import Decision, RebalanceGate
from expertlane.balance.local_search import lower_maximum, search_copies
from expertlane.balance.moves import keep_slots, moves
from expertlane.balance.packing import EMPTY, Ints, Packing
from expertlane.balance.placement import Placement, rank_loads
from expertlane.balance.planner import plan_placement
from expertlane.balance.tracker import total_max_over_mean

_EVEN = (1.5, 1.2, 1.05)  # how even a placement near the present one is to be; then one anew


@dataclass(frozen=True)
class Proposal:
    """What a rebalance would be.

    Attributes:
        then: [num_layers]; the placements that it leads to.
        before, after: load of the fullest rank over the mean, summed over layers, if tokens came
            evenly from all ranks.
    """

    decision: Decision
    then: list[Placement]
    before: float
    after: float


def propose(
    load: npt.NDArray[np.int64],
    num_steps_tracked: int,
    now: list[Placement],
    ranks_per_node: int,
    gate: RebalanceGate,
    worth: Callable[[Decision], float],
) -> Proposal:
    """Plan several placements and weigh them; the one with most worth.

    Where not even the most that any placement could save is worth moving a single expert, nothing
    is planned.

    Args:
        load: [num_layers, num_experts], of the steps tracked.
        now: [num_layers].
        ranks_per_node: consecutive expert-parallel ranks that share a node; loads are told for
            any, plans are made for full nodes.
    """
    loads = rank_loads(now, load, ranks_per_node)
    before = total_max_over_mean(loads)
    at_best = gate.at_best(loads, num_steps_tracked)
    if worth(at_best) <= 0:
        return Proposal(at_best, now, before, before)
    ep, num_redundant = now[0].ep, now[0].num_slots - now[0].num_experts
    full = ranks_per_node if ep % ranks_per_node == 0 else ep
    planned = [improve_placements(load, now, full, even) for even in _EVEN]
    planned.append(plan_placement(load, ep, full, num_redundant))
    proposals = []
    for then in (keep_slots(now, each) for each in planned):
        reached = rank_loads(then, load, ranks_per_node)
        needed = moves(now, then, ranks_per_node)
        decision = gate.decide(loads, reached, num_steps_tracked, needed)
        proposals.append(Proposal(decision, then, before, total_max_over_mean(reached)))
    return max(proposals, key=lambda each: worth(each.decision))


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
    packing = Packing(slots, loads, now[0].ep // ranks_per_node)
    packing = search_copies(packing, target, max_swaps=0)
    packing = lower_maximum(packing, target)
    packing = search_copies(packing, target)
    packing = search_copies(packing, target, keeps_even=False)
    return [
        Placement.of_table(placed.num_experts, of_layer)
        for placed, of_layer in zip(now, packing.slots, strict=True)
    ]
