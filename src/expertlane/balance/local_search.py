"""Local search over the numbers of copies: a copy makes room for one of the fullest rank's."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import EMPTY, Bools, CopiesOnNodes, Floats, Ints

MIN_GAIN = 1e-9  # of the mean load; less is rounding
MAX_SWAPS = 300  # of a layer
_MAX_SHIFTS = 40  # of a layer
_NUM_CHOICES = 20  # shifts tried in vain before a layer is left as it is


def search_copies(
    slots: Ints,
    load: Floats,
    num_nodes: int,
    target: Floats,
    max_swaps: int = MAX_SWAPS,
    keeps_even: bool = True,
) -> None:
    """Shift a copy, swap, keep what is better; layers apart, until nothing helps. In place.

    Args:
        slots: [num_layers, ep, most slots].
        load: [num_layers, num_experts].
        num_nodes: equal numbers of consecutive ranks.
        target: [num_layers]; a load of the fullest rank that is low enough.
        max_swaps: after each shift.
        keeps_even: no shift makes the copies of an expert share its load unevenly.
    """
    highest = loads_of_slots(slots, load, num_nodes).max(axis=1)
    mean = load.sum(axis=1) / slots.shape[1]
    choice = np.zeros(len(slots), dtype=np.int64)
    active = np.arange(len(slots))
    for _ in range(_MAX_SHIFTS):
        active = active[(highest[active] > target[active]) & (choice[active] < _NUM_CHOICES)]
        if not len(active):
            break
        tried = slots[active]
        changed = _shift_copies(tried, load[active], num_nodes, choice[active], keeps_even)
        active, tried = active[changed], tried[changed]
        tried = lower_maximum(tried, load[active], num_nodes, max_swaps=max_swaps)
        reached = loads_of_slots(tried, load[active], num_nodes).max(axis=1)
        better = reached < highest[active] - MIN_GAIN * mean[active]
        choice[active] = np.where(better, 0, choice[active] + 1)
        at = active[better]
        slots[at], highest[at] = tried[better], reached[better]


def _shift_copies(
    slots: Ints, load: Floats, num_nodes: int, choice: Ints, keeps_even: bool = True
) -> Bools:
    """In each layer, turn one redundant copy into a copy of an expert of the fullest rank.

    The fullest rank shares that expert with one rank more; the other copies of the expert that
    lost one take over its share. Changes are ordered by the maximum that they give at once if both
    experts' copies then share evenly; it may be higher than before: swaps follow.

    Args:
        slots: [num_layers, num_ranks, most slots]; experts or EMPTY; changed.
        load: [num_layers, num_experts].
        num_nodes: equal numbers of consecutive ranks.
        choice: [num_layers]; which change to make, 0 for the first in that order.
        keeps_even: only changes after which both experts' copies do share evenly.

    Returns:
        [num_layers]; whether there was such a change.
    """
    rows = np.arange(len(slots))
    now = _State.of(slots, load, num_nodes, keeps_even)
    own = slots[rows, now.loads.argmax(axis=1)]
    copies = now.copies.copies
    # Experts with two copies or more stand first; others never lose one.
    num_losers = int((copies > 1).sum(axis=1).max(initial=0))
    if not num_losers:
        return np.zeros(len(slots), dtype=bool)
    losers = np.argsort(-copies, axis=1, kind="stable")[:, :num_losers]
    at, reached = [], []
    for expert in own.T:
        maxima = now.maxima(expert, losers)
        at.append(maxima.argmin(axis=2))
        reached.append(maxima.min(axis=2))
    flat = np.stack(reached, axis=1).reshape(len(slots), -1)
    choice = np.minimum(choice, flat.shape[1] - 1)
    chosen = np.argsort(flat, axis=1, kind="stable")[rows, choice]
    changed: Bools = np.isfinite(flat[rows, chosen])
    slot, loser = np.divmod(chosen, num_losers)
    for row in np.nonzero(changed)[0]:
        of_rank = slots[row, at[slot[row]][row, loser[row]]]
        of_rank[of_rank == losers[row, loser[row]]] = own[row, slot[row]]
    return changed


@dataclass(frozen=True)
class _State:
    """Who holds what, and how full it makes them.

    Attributes:
        load: [num_layers, num_experts].
        holds, weight: [num_layers, num_experts, num_ranks]; the load of a copy there.
        loads: [num_layers, num_ranks].
        may_gain, may_lose: [num_layers, num_experts, num_ranks].
    """

    load: Floats
    copies: CopiesOnNodes
    holds: Bools
    weight: Floats
    loads: Floats
    may_gain: Bools
    may_lose: Bools

    @classmethod
    def of(cls, slots: Ints, load: Floats, num_nodes: int, keeps_even: bool) -> "_State":
        """The state that slots give; arguments are those of `_shift_copies`."""
        copies = CopiesOnNodes.of(slots, load.shape[1], num_nodes)
        num_on_node = slots.shape[1] // num_nodes
        may_gain = np.repeat(copies.may_gain() | (not keeps_even), num_on_node, axis=2)
        may_lose = np.repeat(copies.may_lose() | (not keeps_even), num_on_node, axis=2)
        per_copy = copies.per_copy(load)
        holds = np.zeros((*load.shape, slots.shape[1]), dtype=bool)
        layer, rank, slot = np.nonzero(slots != EMPTY)
        holds[layer, slots[layer, rank, slot], rank] = True
        return cls(
            load,
            copies,
            holds,
            holds * np.repeat(per_copy, num_on_node, axis=2),
            weights_of_slots(slots, per_copy).sum(axis=2),
            ~holds & may_gain,
            holds & may_lose & (copies.copies > 1)[:, :, None],
        )

    def maxima(self, expert: Ints, losers: Ints) -> Floats:
        """[num_layers, losers, num_ranks]; the fullest load if a copy there becomes `expert`'s.

        Infinite where that cannot be.

        Args:
            expert: [num_layers]; losers: [num_layers, losers].
        """
        rows = np.arange(len(expert))
        each = rows[:, None]
        copies = self.copies.copies
        share = self.load[rows, expert] / (copies[rows, expert] + 1)
        eased = self.loads - self.weight[rows, expert]
        eased += self.holds[rows, expert] * share[:, None]
        part = self.weight[each, losers]
        share_left = self.load[each, losers] / np.maximum(copies[each, losers] - 1, 1)
        extra = self.holds[each, losers] * share_left[:, :, None] - part
        others = eased[:, None] + extra  # [num_layers, losers, num_ranks]
        top = others.argmax(axis=2)[:, :, None]
        first = np.take_along_axis(others, top, axis=2)
        np.put_along_axis(others, top, -np.inf, axis=2)
        second = others.max(axis=2, keepdims=True)
        is_top = np.arange(others.shape[2]) == top
        there = eased[:, None] + share[:, None, None] - part
        reached = np.maximum(there, np.where(is_top, second, first))
        can = self.may_lose[each, losers] & self.may_gain[rows, expert][:, None]
        can &= (losers != expert[:, None])[:, :, None] & (expert != EMPTY)[:, None, None]
        return np.where(can, reached, np.inf)


def loads_of_slots(slots: Ints, load: Floats, num_nodes: int) -> Floats:
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
    max_swaps: int = MAX_SWAPS,
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
    for _ in range(max_swaps):
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
    slots: Ints, weights: Floats, may_move_to: Bools
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


def _may_swap(slots: Ints, fullest: Ints, may_move_to: Bools) -> Bools:
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
    may: Bools = ~has_own & ~is_held & is_real & (stays | (goes & comes))
    return may


def _node_of_rank(slots: Ints, by_node: npt.NDArray[np.generic]) -> Ints:
    """[1, num_ranks, 1]; nodes are the last axis of `by_node`."""
    num_ranks = slots.shape[1]
    node: Ints = np.arange(num_ranks) * by_node.shape[-1] // num_ranks
    return node[None, :, None]


def _swap(slots: Ints, layer: Ints, rank: Ints, slot: Ints, to_rank: Ints, to_slot: Ints) -> None:
    one, other = slots[layer, rank, slot], slots[layer, to_rank, to_slot]
    slots[layer, rank, slot], slots[layer, to_rank, to_slot] = other, one
