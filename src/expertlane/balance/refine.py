"""Local search for a lower maximum: the fullest rank of each layer swaps experts with others."""

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import EMPTY, Floats, Ints
from expertlane.balance.sharing import CopiesOnNodes

MIN_GAIN = 1e-9  # of the mean load; less is rounding


def rank_loads(slots: Ints, load: Floats, num_nodes: int) -> Floats:
    """[num_layers, num_ranks]; the load of each rank, as the engine's senders choose copies.

    Args:
        slots: [num_layers, num_ranks, most slots]; experts or EMPTY.
        load: [num_layers, num_experts].
        num_nodes: equal numbers of consecutive ranks.
    """
    per_copy = CopiesOnNodes.of(slots, load.shape[1], num_nodes).per_copy(load)
    loads: Floats = weights_of_slots(slots, per_copy).sum(axis=2)
    return loads


def weights_of_slots(slots: Ints, per_copy: Floats) -> Floats:
    """[num_layers, num_ranks, most slots]; the load of the copy in each slot.

    Args:
        per_copy: [num_layers, num_experts, num_nodes].
    """
    layer = np.arange(len(slots))[:, None, None]
    return np.where(slots == EMPTY, 0.0, per_copy[layer, slots, _node_of_rank(slots, per_copy)])


def lower_maximum(
    slots: Ints,
    load: Floats,
    num_nodes: int,
    target: Floats | None = None,
    max_rounds: int = 300,
) -> Ints:
    """Swap pairs of experts while the fullest rank gets emptier; layers go on side by side.

    A round makes, in every layer, the swap of the fullest rank with any other that leaves the
    fuller of the two as low as possible. No rank comes to hold an expert twice, and experts change
    nodes only where that leaves the shares of their copies even.

    Args:
        slots: [num_layers, num_ranks, most slots]; experts or EMPTY; not changed.
        load: [num_layers, num_experts].
        num_nodes: equal numbers of consecutive ranks.
        target: [num_layers]; a maximum that is low enough.

    Returns:
        The new slots.
    """
    slots = slots.copy()
    active = np.arange(len(slots))
    if target is None:
        target = np.full(len(slots), -np.inf)
    min_gain = MIN_GAIN * load.sum(axis=1) / slots.shape[1]
    for _ in range(max_rounds):
        if not len(active):
            break
        copies = CopiesOnNodes.of(slots[active], load.shape[1], num_nodes)
        weights = weights_of_slots(slots[active], copies.per_copy(load[active]))
        highest = weights.sum(axis=2).max(axis=1)
        reached, swap = _best_swaps(slots[active], weights, copies.may_move_to())
        improves = (reached < highest - min_gain[active]) & (highest > target[active])
        active = active[improves]
        _swap(slots, active, *(part[improves] for part in swap))
    return slots


def _best_swaps(
    slots: Ints, weights: Floats, may_move_to: npt.NDArray[np.bool_]
) -> tuple[Floats, tuple[Ints, Ints, Ints, Ints]]:
    """For each layer the best swap of the fullest rank, and the load of the fuller of the two."""
    num_layers = len(slots)
    rows = np.arange(num_layers)
    loads = weights.sum(axis=2)
    fullest = loads.argmax(axis=1)
    own_weights = weights[rows, fullest]
    # All arrays below: [num_layers, slot of the fullest rank, other rank, slot of that rank].
    given = own_weights[:, :, None, None] - weights[:, None]
    worse = np.maximum(
        loads[rows, fullest][:, None, None, None] - given, loads[:, None, :, None] + given
    )
    worse[~_may_swap(slots, fullest, may_move_to)] = np.inf
    best = worse.reshape(num_layers, -1).argmin(axis=1)
    slot, other_rank, other_slot = np.unravel_index(best, worse.shape[1:])
    return worse[rows, slot, other_rank, other_slot], (fullest, slot, other_rank, other_slot)


def _may_swap(
    slots: Ints, fullest: Ints, may_move_to: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Whether a swap leaves both ranks without an expert twice, and shares as they are.

    Never with the rank itself.
    """
    rows = np.arange(len(slots))
    own = slots[rows, fullest]
    is_there = own[:, :, None, None] == slots[:, None]  # own expert in that very slot
    has_own = is_there.any(axis=3, keepdims=True)
    is_held = is_there.any(axis=1, keepdims=True)  # the fullest rank holds what is in that slot
    is_real = (own != EMPTY)[:, :, None, None] & (slots != EMPTY)[:, None]
    node = _node_of_rank(slots, may_move_to)
    own_node = node[0, fullest]
    goes = may_move_to[rows[:, None, None], own[:, :, None], node[..., 0]][..., None]
    comes = may_move_to[rows[:, None, None], slots, own_node[..., None]][:, None]
    stays = (node == own_node[..., None])[:, None]
    may: npt.NDArray[np.bool_] = ~has_own & ~is_held & is_real & (stays | (goes & comes))
    return may


def _node_of_rank(slots: Ints, by_node: npt.NDArray[np.generic]) -> Ints:
    """[1, num_ranks, 1]; nodes are the last axis of `by_node`."""
    num_ranks = slots.shape[1]
    node: Ints = np.arange(num_ranks) * by_node.shape[-1] // num_ranks
    return node[None, :, None]


def _swap(slots: Ints, layer: Ints, rank: Ints, slot: Ints, to_rank: Ints, to_slot: Ints) -> None:
    one, other = slots[layer, rank, slot], slots[layer, to_rank, to_slot]
    slots[layer, rank, slot], slots[layer, to_rank, to_slot] = other, one
