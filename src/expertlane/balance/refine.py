"""Local search for a lower maximum: the fullest rank of each layer swaps experts with others."""

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import EMPTY, Floats, Ints

MIN_GAIN = 1e-9  # of the mean load; less is rounding


def rank_loads(slots: Ints, per_copy: Floats) -> Floats:
    """[num_layers, num_ranks]; the load of each rank.

    Args:
        slots: [num_layers, num_ranks, most slots]; experts or EMPTY.
        per_copy: [num_layers, num_experts].
    """
    loads: Floats = _weights(slots, per_copy).sum(axis=2)
    return loads


def lower_maximum(
    slots: Ints, per_copy: Floats, target: Floats | None = None, max_rounds: int = 300
) -> Ints:
    """Swap pairs of experts while the fullest rank gets emptier; layers go on side by side.

    A round makes, in every layer, the swap of the fullest rank with any other that leaves the
    fuller of the two as low as possible. No rank comes to hold an expert twice.

    Args:
        slots: [num_layers, num_ranks, most slots]; experts or EMPTY; not changed.
        per_copy: [num_layers, num_experts].
        target: [num_layers]; a maximum that is low enough.

    Returns:
        The new slots.
    """
    slots = slots.copy()
    loads = rank_loads(slots, per_copy)
    min_gain = MIN_GAIN * loads.mean(axis=1)
    active = np.arange(len(slots))
    if target is None:
        target = np.full(len(slots), -np.inf)
    for _ in range(max_rounds):
        active = active[loads[active].max(axis=1, initial=0) > target[active]]
        if not len(active):
            break
        highest = loads[active].max(axis=1)
        reached, swap = _best_swaps(slots[active], per_copy[active], loads[active])
        improves = reached < highest - min_gain[active]
        active = active[improves]
        rank, slot, other_rank, other_slot = (part[improves] for part in swap)
        _swap(slots, active, rank, slot, other_rank, other_slot)
        loads[active] = rank_loads(slots[active], per_copy[active])
    return slots


def _best_swaps(
    slots: Ints, per_copy: Floats, loads: Floats
) -> tuple[Floats, tuple[Ints, Ints, Ints, Ints]]:
    """For each layer the best swap of the fullest rank, and the load of the fuller of the two."""
    num_layers = len(slots)
    rows = np.arange(num_layers)
    fullest = loads.argmax(axis=1)
    weights = _weights(slots, per_copy)
    own, own_weights = slots[rows, fullest], weights[rows, fullest]
    # All arrays below: [num_layers, slot of the fullest rank, other rank, slot of that rank].
    given = own_weights[:, :, None, None] - weights[:, None]
    worse = np.maximum(
        loads[rows, fullest][:, None, None, None] - given, loads[:, None, :, None] + given
    )
    worse[~_may_swap(slots, own)] = np.inf
    best = worse.reshape(num_layers, -1).argmin(axis=1)
    slot, other_rank, other_slot = np.unravel_index(best, worse.shape[1:])
    return worse[rows, slot, other_rank, other_slot], (fullest, slot, other_rank, other_slot)


def _may_swap(slots: Ints, own: Ints) -> npt.NDArray[np.bool_]:
    """Whether a swap leaves both ranks without an expert twice; never with the rank itself."""
    is_there = own[:, :, None, None] == slots[:, None]  # own expert in that very slot
    has_own = is_there.any(axis=3, keepdims=True)
    is_held = is_there.any(axis=1, keepdims=True)  # the fullest rank holds what is in that slot
    is_real = (own != EMPTY)[:, :, None, None] & (slots != EMPTY)[:, None]
    may: npt.NDArray[np.bool_] = ~has_own & ~is_held & is_real
    return may


def _weights(slots: Ints, per_copy: Floats) -> Floats:
    layer = np.arange(len(slots))[:, None, None]
    return np.where(slots == EMPTY, 0.0, per_copy[layer, slots])


def _swap(slots: Ints, layer: Ints, rank: Ints, slot: Ints, to_rank: Ints, to_slot: Ints) -> None:
    one, other = slots[layer, rank, slot], slots[layer, to_rank, to_slot]
    slots[layer, rank, slot], slots[layer, to_rank, to_slot] = other, one
