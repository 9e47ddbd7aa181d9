"""Local search over the numbers of copies: a copy makes room for one of the fullest rank's."""

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import EMPTY, Floats, Ints
from expertlane.balance.refine import rank_loads


def shift_copies(slots: Ints, copies: Ints, load: Floats, choice: Ints) -> npt.NDArray[np.bool_]:
    """In each layer, turn one redundant copy into a copy of an expert of the fullest rank.

    The fullest rank shares that expert with one rank more; the other copies of the expert that
    lost one take over its share. Changes are ordered by the maximum that they give at once, which
    may be higher than before: swaps follow.

    Args:
        slots: [num_layers, num_ranks, most slots]; experts or EMPTY; changed.
        copies: [num_layers, num_experts]; changed.
        load: [num_layers, num_experts].
        choice: [num_layers]; which change to make, 0 for the first in that order.

    Returns:
        [num_layers]; whether there was such a change.
    """
    rows = np.arange(len(slots))
    loads = rank_loads(slots, load / copies)
    own = slots[rows, loads.argmax(axis=1)]
    holds = np.zeros((*slots.shape[:2], load.shape[1]), dtype=bool)
    layer, rank, slot = np.nonzero(slots != EMPTY)
    holds[layer, rank, slots[layer, rank, slot]] = True
    # Experts with two copies or more stand first; others never lose one.
    num_losers = int((copies > 1).sum(axis=1).max(initial=0))
    if not num_losers:
        return np.zeros(len(slots), dtype=bool)
    losers = np.argsort(-copies, axis=1, kind="stable")[:, :num_losers]
    at, reached = [], []
    for expert in own.T:
        maxima = _maxima(expert, losers, holds, loads, load, copies)
        at.append(maxima.argmin(axis=2))
        reached.append(maxima.min(axis=2))
    flat = np.stack(reached, axis=1).reshape(len(slots), -1)
    choice = np.minimum(choice, flat.shape[1] - 1)
    chosen = np.argsort(flat, axis=1, kind="stable")[rows, choice]
    changed: npt.NDArray[np.bool_] = np.isfinite(flat[rows, chosen])
    slot, loser = np.divmod(chosen, num_losers)
    for row in np.nonzero(changed)[0]:
        gaining, losing = own[row, slot[row]], losers[row, loser[row]]
        of_rank = slots[row, at[slot[row]][row, loser[row]]]
        of_rank[of_rank == losing] = gaining
        copies[row, gaining] += 1
        copies[row, losing] -= 1
    return changed


def _maxima(
    expert: Ints,
    losers: Ints,
    holds: npt.NDArray[np.bool_],
    loads: Floats,
    load: Floats,
    copies: Ints,
) -> Floats:
    """[num_layers, losers, num_ranks]; the fullest rank's load if a copy there becomes `expert`'s.

    Infinite where that cannot be: no such copy there, its only copy, or `expert` there already.
    """
    rows = np.arange(len(expert))
    own, own_copies = load[rows, expert], copies[rows, expert]
    has_own = holds[rows, :, expert]
    share = own / (own_copies + 1)
    eased = loads - has_own * (own / own_copies - share)[:, None]

    lost = np.take_along_axis(load, losers, axis=1)
    lost_copies = np.take_along_axis(copies, losers, axis=1)
    has_lost = holds[rows[:, None], :, losers]
    part = lost / lost_copies
    extra = lost / np.maximum(lost_copies - 1, 1) - part
    others = eased[:, None] + has_lost * extra[:, :, None]  # [num_layers, losers, num_ranks]
    top = others.argmax(axis=2)[:, :, None]
    first = np.take_along_axis(others, top, axis=2)
    np.put_along_axis(others, top, -np.inf, axis=2)
    second = others.max(axis=2, keepdims=True)
    is_top = np.arange(loads.shape[1]) == top
    there = eased[:, None] + share[:, None, None] - part[:, :, None]
    reached = np.maximum(there, np.where(is_top, second, first))
    can = has_lost & (lost_copies > 1)[:, :, None] & ~has_own[:, None]
    can &= (losers != expert[:, None])[:, :, None] & (expert != EMPTY)[:, None, None]
    return np.where(can, reached, np.inf)
