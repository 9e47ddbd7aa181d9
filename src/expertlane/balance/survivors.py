"""Placements after a loss: experts stay; those that only lost ranks held go to the others."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement import Placement


def over_survivors(
    placement: Placement,
    survivors: Sequence[int],
    load: npt.NDArray[np.number] | None = None,
) -> Placement:
    """The placement over some of its ranks: every expert that they hold keeps its slot.

    A rank that is left alone has all in their order, which computes in fewest calls.

    An expert that none of them holds gets one slot more, the heaviest first, on the rank with the
    least load of those that then hold no more than the fullest rank has to. So where every expert
    has a copy left, nothing moves.

    Args:
        survivors: [ep of the new placement]; which rank each was.
        load: [num_experts]; all alike if not given.
    """
    held = [list(placement.experts_of_rank[rank]) for rank in survivors]
    left = set().union(*held)
    missing = [expert for expert in range(placement.num_experts) if expert not in left]
    weights = np.ones(placement.num_experts)
    if load is not None and load.any():
        weights = np.asarray(load, dtype=np.float64)
    num_copies = np.bincount([e for rank in held for e in rank], minlength=placement.num_experts)
    loads = [sum(weights[e] / num_copies[e] for e in rank) for rank in held]
    most = max(max(map(len, held)), -(-(sum(map(len, held)) + len(missing)) // len(held)))
    for expert in sorted(missing, key=lambda expert: (-weights[expert], expert)):
        rank = min(
            (rank for rank in range(len(held)) if len(held[rank]) < most),
            key=lambda rank: (loads[rank], len(held[rank]), rank),
        )
        held[rank].append(expert)
        loads[rank] += weights[expert]
    if len(held) == 1:
        held = [sorted(held[0])]
    return Placement(placement.num_experts, tuple(map(tuple, held)))
