"""How many copies each expert gets, and on which rank each copy goes: greedy, all layers at once.

Layers are packed side by side: every step of a loop is one numpy operation over all of them.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

EMPTY = -1  # in a table of slots or items: there is none


def num_copies(load: Floats, num_slots: int, ep: int) -> Ints:
    """[num_layers, num_experts]; each extra copy goes to the expert with most load per copy.

    No expert gets more copies than there are ranks.

    Args:
        load: [num_layers, num_experts].
        num_slots: copies of all experts of a layer, num_experts to num_experts x ep.
    """
    num_layers, num_experts = load.shape
    copies = np.ones(load.shape, dtype=np.int64)
    per_copy = np.where(copies < ep, load, -np.inf)
    rows = np.arange(num_layers)
    for _ in range(num_slots - num_experts):
        chosen = per_copy.argmax(axis=1)
        copies[rows, chosen] += 1
        count = copies[rows, chosen]
        per_copy[rows, chosen] = np.where(count < ep, load[rows, chosen] / count, -np.inf)
    return copies


def pack(items: Ints, per_copy: Floats, room: Ints) -> Ints:
    """Heaviest first into the least loaded rank that has room and lacks the expert.

    This is the longest-processing-time rule (R. L. Graham, 1969) under a count of slots.

    Args:
        items: [num_layers, num_items]; the expert of each copy; EMPTY at the end of shorter rows.
        per_copy: [num_layers, num_experts]; the load of each copy of an expert.
        room: [num_layers, num_ranks]; the slots of each rank, in all as many as there are items,
            differing within a layer by at most one; no expert has more copies than ranks.

    Returns:
        [num_layers, num_ranks, most slots]; experts, then EMPTY.
    """
    num_layers, num_ranks = room.shape
    rows = np.arange(num_layers)
    weight = np.where(items == EMPTY, -np.inf, np.take_along_axis(per_copy, items, axis=1))
    items = np.take_along_axis(items, np.argsort(-weight, axis=1, kind="stable"), axis=1)
    slots = np.full((num_layers, num_ranks, int(room.max(initial=0))), EMPTY, dtype=np.int64)
    holds = np.zeros((num_layers, num_ranks, per_copy.shape[1]), dtype=bool)
    num_held = np.zeros_like(room)
    loads = np.zeros(room.shape)
    for expert in items.T:
        fits = (num_held < room) & ~holds[rows, :, expert]
        rank = np.where(fits, loads, np.inf).argmin(axis=1)
        placed = fits[rows, rank]
        for row in np.nonzero(~placed & (expert != EMPTY))[0]:
            _exchange_in(slots[row], room[row], holds[row], int(expert[row]))
            num_held[row] = (slots[row] != EMPTY).sum(axis=1)
            loads[row] = holds[row] @ per_copy[row]
        at = np.nonzero(placed & (expert != EMPTY))[0]
        slots[at, rank[at], num_held[at, rank[at]]] = expert[at]
        holds[at, rank[at], expert[at]] = True
        num_held[at, rank[at]] += 1
        loads[at, rank[at]] += per_copy[at, expert[at]]
    return slots


def greedy_maximum(items: Ints, per_copy: Floats, room: Ints) -> Floats:
    """[num_layers]; the fullest rank's load if copies of an expert might share a rank.

    Args:
        items, per_copy, room: those of `pack`, without EMPTY.
    """
    rows = np.arange(len(room))
    weight = -np.sort(-np.take_along_axis(per_copy, items, axis=1), axis=1)
    num_held = np.zeros_like(room)
    loads = np.zeros(room.shape)
    for of_item in weight.T:
        rank = np.where(num_held < room, loads, np.inf).argmin(axis=1)
        loads[rows, rank] += of_item
        num_held[rows, rank] += 1
    highest: Floats = loads.max(axis=1)
    return highest


def _exchange_in(slots: Ints, room: Ints, holds: npt.NDArray[np.bool_], expert: int) -> None:
    """Place an expert where all ranks with room hold it already, in place.

    A full rank without it hands another expert over to a rank with room. There is one to hand
    over: the full rank has at least as many experts as the other one, and lacks one of them.

    Args:
        slots: [num_ranks, most slots].
        room: [num_ranks].
        holds: [num_ranks, num_experts].
    """
    num_held = (slots != EMPTY).sum(axis=1)
    free = int(np.nonzero(num_held < room)[0][0])
    full = int(np.nonzero(~holds[:, expert])[0][0])
    slot = next(s for s in range(num_held[full]) if not holds[free, slots[full, s]])
    moved = slots[full, slot]
    slots[full, slot] = expert
    slots[free, num_held[free]] = moved
    holds[full, [moved, expert]] = False, True
    holds[free, moved] = True
