"""A placement that evens out a load: copies of hot experts, packed so that no rank is fuller.

First the local search that improves a packing: a lower fullest rank, then fewer crossings between
nodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement import (
    EMPTY,
    Bools,
    Floats,
    Ints,
    Packing,
    Placement,
    nodes_of_copies,
    num_copies,
    pack,
    partition_slots,
)
from expertlane.errors import SpecError

MIN_GAIN = 1e-9  # of the mean load; less is rounding
MAX_SWAPS = 300  # of a layer
_MAX_SHIFTS = 40  # of a layer
_NUM_CHOICES = 20  # shifts tried in vain before a layer is left as it is


def search_copies(
    packing: Packing, target: Floats, max_swaps: int = MAX_SWAPS, keeps_even: bool = True
) -> Packing:
    """Shift a copy, swap, keep what is better; layers apart, until nothing helps.

    Args:
        target: [num_layers]; a load of the fullest rank that is low enough.
        max_swaps: after each shift.
        keeps_even: no shift makes the copies of an expert share its load unevenly.
    """
    slots, highest = packing.slots.copy(), packing.highest
    choice = np.zeros(len(slots), dtype=np.int64)
    active = np.arange(len(slots))
    for _ in range(_MAX_SHIFTS):
        active = active[(highest[active] > target[active]) & (choice[active] < _NUM_CHOICES)]
        if not len(active):
            break
        tried = replace(packing, slots=slots).of_layers(active)
        shifted, changed = _shift_copies(tried, choice[active], keeps_even)
        active = active[changed]
        tried = lower_maximum(shifted.of_layers(changed), max_swaps=max_swaps)
        better = tried.highest < highest[active] - MIN_GAIN * tried.mean
        choice[active] = np.where(better, 0, choice[active] + 1)
        at = active[better]
        slots[at], highest[at] = tried.slots[better], tried.highest[better]
    return replace(packing, slots=slots)


def _shift_copies(packing: Packing, choice: Ints, keeps_even: bool) -> tuple[Packing, Bools]:
    """In each layer, turn one redundant copy into a copy of an expert of the fullest rank.

    The fullest rank shares that expert with one rank more; the other copies of the expert that
    lost one take over its share. Changes are ordered by the maximum that they give at once if both
    experts' copies then share evenly; it may be higher than before: swaps follow.

    Args:
        choice: [num_layers]; which change to make, 0 for the first in that order.
        keeps_even: only changes after which both experts' copies do share evenly.

    Returns:
        The new packing, and [num_layers]; whether there was such a change.
    """
    slots = packing.slots.copy()
    rows = np.arange(len(slots))
    own = slots[rows, packing.loads.argmax(axis=1)]
    # Experts with two copies or more stand first; others never lose one.
    num_losers = int((packing.copies > 1).sum(axis=1).max(initial=0))
    if not num_losers:
        return packing, np.zeros(len(slots), dtype=bool)
    losers = np.argsort(-packing.copies, axis=1, kind="stable")[:, :num_losers]
    shifts = _Shifts(packing, losers, keeps_even)
    maxima = [shifts.maxima(expert) for expert in own.T]
    at = [each.argmin(axis=2) for each in maxima]
    flat = np.stack([each.min(axis=2) for each in maxima], axis=1).reshape(len(slots), -1)
    choice = np.minimum(choice, flat.shape[1] - 1)
    chosen = np.argsort(flat, axis=1, kind="stable")[rows, choice]
    changed: Bools = np.isfinite(flat[rows, chosen])
    slot, loser = np.divmod(chosen, num_losers)
    for row in np.nonzero(changed)[0]:
        of_rank = slots[row, at[slot[row]][row, loser[row]]]
        of_rank[of_rank == losers[row, loser[row]]] = own[row, slot[row]]
    return replace(packing, slots=slots), changed


class _Shifts:
    """Fullest loads if a copy of one of the `losers`, [num_layers, losers], becomes another's."""

    def __init__(self, packing: Packing, losers: Ints, keeps_even: bool) -> None:
        self._packing, self._losers = packing, losers
        num_ranks = packing.slots.shape[1]

        def by_rank(by_node: Ints | Floats | Bools) -> Any:
            """[num_layers, num_experts, num_ranks]."""
            return np.repeat(by_node, num_ranks // packing.num_nodes, axis=2)

        self._holds = np.zeros((*packing.load.shape, num_ranks), dtype=bool)
        layer, rank, slot = np.nonzero(packing.slots != EMPTY)
        self._holds[layer, packing.slots[layer, rank, slot], rank] = True
        self._weight: Floats = self._holds * by_rank(packing.per_copy)  # of a copy there
        self._may_gain: Bools = ~self._holds & by_rank(packing.may_gain() | (not keeps_even))
        may_lose = packing.may_lose() | (not keeps_even)
        self._may_lose: Bools = self._holds & by_rank(may_lose) & (packing.copies > 1)[:, :, None]

    def maxima(self, expert: Ints) -> Floats:
        """[num_layers, losers, num_ranks]; the fullest load if a copy there becomes `expert`'s.

        Infinite where that cannot be.

        Args:
            expert: [num_layers].
        """
        load, copies, losers = self._packing.load, self._packing.copies, self._losers
        rows = np.arange(len(expert))
        each = rows[:, None]
        share = load[rows, expert] / (copies[rows, expert] + 1)
        eased = self._packing.loads - self._weight[rows, expert]
        eased += self._holds[rows, expert] * share[:, None]
        part = self._weight[each, losers]
        share_left = load[each, losers] / np.maximum(copies[each, losers] - 1, 1)
        extra = self._holds[each, losers] * share_left[:, :, None] - part
        others = eased[:, None] + extra  # [num_layers, losers, num_ranks]
        top = others.argmax(axis=2)[:, :, None]
        first = np.take_along_axis(others, top, axis=2)
        np.put_along_axis(others, top, -np.inf, axis=2)
        second = others.max(axis=2, keepdims=True)
        is_top = np.arange(others.shape[2]) == top
        there = eased[:, None] + share[:, None, None] - part
        reached = np.maximum(there, np.where(is_top, second, first))
        can = self._may_lose[each, losers] & self._may_gain[rows, expert][:, None]
        can &= (losers != expert[:, None])[:, :, None] & (expert != EMPTY)[:, None, None]
        return np.where(can, reached, np.inf)


def lower_maximum(
    packing: Packing, target: Floats | None = None, max_swaps: int = MAX_SWAPS
) -> Packing:
    """Swap pairs of experts while the fullest rank gets emptier; layers go on side by side.

    A round makes, in every layer, the swap of the fullest rank with any other that leaves the
    fuller of the two as low as possible. No rank comes to hold an expert twice, and experts change
    nodes only where that leaves the shares of their copies even.

    Args:
        target: [num_layers]; a maximum that is low enough.
    """
    slots = packing.slots.copy()
    active = np.arange(len(slots))
    if target is None:
        target = np.full(len(slots), -np.inf)
    min_gain = MIN_GAIN * packing.mean
    for _ in range(max_swaps):
        if not len(active):
            break
        now = replace(packing, slots=slots).of_layers(active)
        reached, (rank, slot, to_rank, to_slot) = _best_swaps(now)
        improves = (reached < now.highest - min_gain[active]) & (now.highest > target[active])
        active = active[improves]
        one = active, rank[improves], slot[improves]
        other = active, to_rank[improves], to_slot[improves]
        slots[one], slots[other] = slots[other], slots[one]
    return replace(packing, slots=slots)


def _best_swaps(packing: Packing) -> tuple[Floats, tuple[Ints, Ints, Ints, Ints]]:
    """For each layer the best swap of the fullest rank, and the load of the fuller of the two."""
    weights, loads = packing.weights, packing.loads
    rows = np.arange(len(loads))
    fullest = loads.argmax(axis=1)
    # All arrays below: [num_layers, slot of the fullest rank, other rank, slot of that rank].
    given = weights[rows, fullest][:, :, None, None] - weights[:, None]
    worse = np.maximum(
        loads[rows, fullest][:, None, None, None] - given, loads[:, None, :, None] + given
    )
    worse[~_may_swap(packing, fullest)] = np.inf
    best = worse.reshape(len(loads), -1).argmin(axis=1)
    slot, other_rank, other_slot = np.unravel_index(best, worse.shape[1:])
    return worse[rows, slot, other_rank, other_slot], (fullest, slot, other_rank, other_slot)


def _may_swap(packing: Packing, fullest: Ints) -> Bools:
    """[num_layers, slot of the fullest rank, other rank, slot of that rank]; valid swaps.

    They leave no rank with an expert twice, and the shares of all copies as they are.
    """
    slots, may_move_to = packing.slots, packing.may_move_to()
    rows = np.arange(len(slots))
    own = slots[rows, fullest]
    is_there = own[:, :, None, None] == slots[:, None]  # own expert in that very slot
    has_own = is_there.any(axis=3, keepdims=True)
    is_held = is_there.any(axis=1, keepdims=True)  # the fullest rank holds what is in that slot
    is_real = (own != EMPTY)[:, :, None, None] & (slots != EMPTY)[:, None]
    node = packing.node_of_rank
    own_node = node[fullest][:, None, None]
    goes = may_move_to[rows[:, None, None], own[:, :, None], node][..., None]
    comes = may_move_to[rows[:, None, None], slots, own_node][:, None]
    stays = (node[:, None] == own_node)[:, None]
    may: Bools = ~has_own & ~is_held & is_real & (stays | (goes & comes))
    return may


# A pair of experts on one node saves a token a copy only if no third one brought it there before.
_SHARE_SAVED = 0.5
_SWAPS_AT_ONCE = 12  # made on one evaluation of all pairs; each must also gain by itself
_LEAST_SAVED = 1e-6  # share of the layer's load


class PhysicalExperts:
    """The physical experts of a layer, and what they save where they are on one node.

    Tokens sit on each node with equal chance. A token finds an expert of c copies at home on the
    share (nodes with a copy) / num_nodes, and goes to a given one of its copies in 1/c of the other
    cases.

    Args:
        load: [num_experts].
        coactivation: [num_experts, num_experts], or None to know of no pairs.

    Attributes:
        logical: [num_slots]; the logical expert of each.
        weight: [num_slots]; its load.
        bonds: [num_slots, num_slots]; the crossings that a pair saves on one node.
        presence: [num_slots]; the crossings that an expert's presence on one more node saves.
    """

    def __init__(
        self,
        logical: Ints,
        weight: Floats,
        load: Floats,
        coactivation: npt.NDArray[np.floating] | None,
        num_nodes: int,
    ) -> None:
        self.logical, self.weight = logical, weight
        self.presence = (load[logical] / num_nodes).astype(np.float32)
        self.bonds = np.zeros((len(logical), len(logical)), dtype=np.float32)
        if coactivation is not None:
            copies = np.bincount(logical, minlength=len(load))[logical]
            share = (_SHARE_SAVED * (1 - 1 / num_nodes)) ** 0.5 / copies
            self.bonds[:] = coactivation[np.ix_(logical, logical)] * np.outer(share, share)
            self.bonds[logical[:, None] == logical] = 0.0


def swap_between_nodes(
    experts: PhysicalExperts, bin_of: Ints, node_of_bin: Ints, limit: Floats, max_rounds: int
) -> Ints:
    """Swap experts of different nodes while that saves crossings and no bin exceeds its limit.

    Args:
        bin_of: [num_slots]; a rank, or a node if ranks are packed later.
        node_of_bin: [num_bins].
        limit: [num_bins]; of load. A bin may be above it only if it was.

    Returns:
        The new bin of each.
    """
    bin_of = bin_of.copy()
    loads = np.bincount(bin_of, weights=experts.weight, minlength=len(limit)).astype(np.float64)
    slack = _LEAST_SAVED * max(float(experts.weight.sum()), 1e-30)
    for _ in range(max_rounds):
        gain = _gains(experts, node_of_bin[bin_of], int(node_of_bin.max()) + 1)
        fits = _fits(experts.weight, bin_of, loads, limit)
        gain = np.where(fits & fits.T, gain, -np.inf)
        made = _make_best(experts, bin_of, node_of_bin, loads, limit, gain, slack)
        if not made:
            break
    return bin_of


def _gains(experts: PhysicalExperts, node_of: Ints, num_nodes: int) -> npt.NDArray[np.float32]:
    """[num_slots, num_slots]; crossings saved if two change places; -inf where they can't."""
    is_on = np.zeros((len(node_of), num_nodes), dtype=np.float32)
    is_on[np.arange(len(node_of)), node_of] = 1.0
    bond = experts.bonds @ is_on  # of each expert, with all experts of a node
    num_there = np.zeros((int(experts.logical.max()) + 1, num_nodes), dtype=np.int64)
    np.add.at(num_there, (experts.logical, node_of), 1)
    num_there = num_there[experts.logical]  # [num_slots, num_nodes]; copies of each one's expert
    at_home = np.arange(len(node_of)), node_of
    # Moving to a node without the expert saves its share there, and loses it here if the last.
    move = bond - bond[at_home][:, None]
    move += (experts.presence * (num_there[at_home] > 1))[:, None]
    # Elsewhere a move would leave unlike numbers of copies on nodes, and with them unlike loads.
    may_move = (num_there.max(axis=1) == 1) | (num_there.sum(axis=1) == 2)
    move[(num_there > 0) | ~may_move[:, None]] = -np.inf
    gain = move[:, node_of]
    gain = gain + gain.T
    gain -= 2 * experts.bonds
    return gain


def _fits(weight: Floats, bin_of: Ints, loads: Floats, limit: Floats) -> npt.NDArray[np.bool_]:
    """[num_slots, num_slots]; whether the first one's bin can take the second one in its place."""
    capacity = (limit - loads)[bin_of] + weight
    fits: npt.NDArray[np.bool_] = weight[None] <= np.maximum(capacity, weight)[:, None]
    return fits


def _make_best(
    experts: PhysicalExperts,
    bin_of: Ints,
    node_of_bin: Ints,
    loads: Floats,
    limit: Floats,
    gain: npt.NDArray[np.float32],
    slack: float,
) -> int:
    """Make the best swaps of experts not yet moved in this round; in place; gives their number."""
    weight, logical = experts.weight, experts.logical
    best = gain.max(axis=1)
    before = node_of_bin[bin_of]
    after = before.copy()
    moved: set[int] = set()
    made = 0
    for one in np.argsort(-best)[: 4 * _SWAPS_AT_ONCE].tolist():
        other = int(gain[one].argmax())
        if best[one] <= slack or made == _SWAPS_AT_ONCE:
            break
        pair = {int(logical[one]), int(logical[other])}
        a, b = bin_of[one], bin_of[other]
        change = weight[one] - weight[other]
        if (
            pair & moved
            or loads[a] - change > max(limit[a], loads[a])
            or loads[b] + change > max(limit[b], loads[b])
            or best[one] + _bond_drift(experts.bonds, before, after, one, other) <= slack
        ):
            continue
        bin_of[one], bin_of[other] = b, a
        after[one], after[other] = before[other], before[one]
        loads[a] -= change
        loads[b] += change
        moved |= pair
        made += 1
    return made


def _bond_drift(
    bonds: npt.NDArray[np.float32], before: Ints, after: Ints, one: int, other: int
) -> float:
    """Change of a swap's gain from `bonds` since nodes were as `before`."""
    shifted = np.nonzero(before != after)[0]
    difference = bonds[one, shifted] - bonds[other, shifted]
    toward, away = after[other], after[one]
    drift = (after[shifted] == toward) * 1.0 - (after[shifted] == away)
    drift -= (before[shifted] == toward) * 1.0 - (before[shifted] == away)
    return float(difference @ drift)


_EVEN = 1.003  # max over mean; no more copies are shifted in a layer that is so even
_EVEN_ENOUGH = 1.005  # max/mean that is even enough where crossings can be saved
_NODE_ROUNDS = 150  # bounds; the search ends long before
_RANK_ROUNDS = 60

Coactivation = Sequence[npt.NDArray[np.floating]]


def plan_placement(
    load: npt.NDArray[np.integer] | npt.NDArray[np.floating],
    ep: int,
    ranks_per_node: int,
    num_redundant: int,
    coactivation: Coactivation | None = None,
    even: float | None = None,
) -> list[Placement]:
    """Place experts and copies so that the fullest rank of each layer is as empty as can be.

    Copies go to the experts with most load per copy and are packed heaviest first; then the
    fullest rank swaps with others, and single copies change their expert, while that helps. Ranks
    get the same near-equal numbers of slots in every layer, the longer ones first. Loads are those
    of `Placement.rank_loads`: an expert has a copy a node or equally many on all nodes, so that
    they share its load evenly; in a layer where that is not even enough, other numbers are tried.

    With several nodes, experts are then exchanged between them, so that fewer tokens cross: copies
    of one expert spread over nodes, the fullest rank never made fuller. With `coactivation`
    experts chosen by the same tokens meet on one node; for that the fullest rank may come to
    hold 1.005 of the mean, though never more than greedy packing alone gives it.

    Args:
        load: [num_layers, num_experts].
        ranks_per_node: consecutive ranks that share a node; it divides `ep`.
        num_redundant: physical experts beyond num_experts; more if that leaves a rank empty.
        coactivation: [num_layers][num_experts, num_experts]; how many tokens chose both.
        even: a fullest rank at most this many times the mean is even enough; None for as even as
            can be.

    Raises:
        SpecError: there are more copies than a rank without an expert twice can hold, or nodes
            that are not full.
    """
    num_layers, num_experts = load.shape
    if ranks_per_node < 1 or ep % ranks_per_node:
        raise SpecError(f"{ep} ep ranks do not fill nodes of {ranks_per_node} ranks")
    if num_redundant < 0:
        raise SpecError(f"{num_redundant} redundant experts; valid: 0 or more")
    of_ranks = partition_slots(num_experts, ep, num_redundant)
    capacity = np.tile([len(slots) for slots in of_ranks], (num_layers, 1))  # [num_layers, ep]
    if not num_layers:
        return []
    loads = load.astype(np.float64)
    loads[loads.sum(axis=1) == 0] = 1.0  # without tokens all experts count alike
    num_nodes = ep // ranks_per_node
    packing = _balanced(loads, capacity, num_nodes, even)
    if num_nodes > 1 and coactivation is not None:
        limit = np.minimum(_greedy(loads, capacity), _EVEN_ENOUGH * packing.mean)
        packing = _exchanged(
            _regrouped(packing, capacity, limit, coactivation), limit, coactivation
        )
    elif num_nodes > 1:
        packing = _exchanged(packing, np.zeros(num_layers), None)
    return [Placement.of_table(num_experts, of_layer) for of_layer in packing.slots]


def _balanced(load: Floats, capacity: Ints, num_nodes: int, even: float | None) -> Packing:
    """The most even packing, or one that is even enough."""
    ep = capacity.shape[1]
    counts, mean = np.arange(1, ep + 1), load.sum(axis=1) / ep
    # No fullest rank can have less than the hottest expert's copy.
    least = (load / num_copies(load, int(capacity[0].sum()), counts)).max(axis=1)
    target = np.maximum((even or _EVEN) * mean, least)
    low = least if even is None else target
    # Copies on all nodes or one a node spare most crossings; then any that nodes can share evenly.
    is_spread = (counts <= num_nodes) | (counts % num_nodes == 0)
    is_even = nodes_of_copies(num_nodes, ep // num_nodes)[1:] > 0
    slots = np.full((*capacity.shape, int(capacity.max())), EMPTY, dtype=np.int64)
    highest = np.full(len(load), np.inf)
    has_copies = int(capacity[0].sum()) > load.shape[1]
    for valid in (counts[is_spread], counts[is_even], counts)[: None if has_copies else 1]:
        hard = np.nonzero(highest > target * (1 + MIN_GAIN))[0]
        if not len(hard):
            break
        tried = _packed(load[hard], capacity[hard], num_nodes, valid)
        tried = search_copies(lower_maximum(tried, low[hard]), target[hard])
        better = tried.highest < highest[hard]
        slots[hard[better]], highest[hard[better]] = tried.slots[better], tried.highest[better]
    return Packing(slots, load, num_nodes)


def _packed(load: Floats, capacity: Ints, num_nodes: int, valid: Ints) -> Packing:
    """Greedy packing with valid numbers of copies, where slots allow."""
    copies = num_copies(load, int(capacity[0].sum()), valid)
    return Packing(pack(_items(copies), load / copies, capacity, num_nodes), load, num_nodes)


def _greedy(load: Floats, capacity: Ints) -> Floats:
    """[num_layers]; the fullest rank's load after greedy packing, all copies taken as alike.

    With coactivation a rank may have as much, where its copies share evenly.
    """
    copies = num_copies(load, int(capacity[0].sum()), np.arange(1, capacity.shape[1] + 1))
    weight = np.take_along_axis(load / copies, _items(copies), axis=1)
    alone = np.tile(np.arange(weight.shape[1]), (len(load), 1))  # as if each were another expert's
    return Packing(pack(alone, weight, capacity), weight, 1).highest


def _items(copies: Ints) -> Ints:
    """[num_layers, num_slots]; each expert as often as it has copies."""
    experts = np.arange(copies.shape[1])
    return np.array([np.repeat(experts, each) for each in copies], dtype=np.int64)


def _regrouped(
    packing: Packing, capacity: Ints, limit: Floats, coactivation: Coactivation
) -> Packing:
    """Experts that go together moved to one node, then packed anew inside each node.

    A layer stays as it is where the new packing leaves some rank fuller than `limit` and than
    the fullest was.
    """
    num_layers, ep, num_slots = packing.slots.shape
    num_nodes = packing.num_nodes
    limit = np.maximum(packing.highest, limit)
    by_node = np.full((num_layers, num_nodes, num_slots * ep // num_nodes), EMPTY, dtype=np.int64)
    for layer, (experts, rank) in enumerate(_physical_experts(packing, coactivation)):
        of_node = np.full(num_nodes, limit[layer] * ep / num_nodes)
        node = packing.node_of_rank[rank]
        node = swap_between_nodes(experts, node, np.arange(num_nodes), of_node, _NODE_ROUNDS)
        by_node[layer] = _table(experts.logical, node, by_node[layer].shape)
    # Each node packed like a layer of its own; then all ranks of a layer where that was too coarse.
    num_packed = num_layers * num_nodes
    per_copy = packing.per_copy.swapaxes(1, 2).reshape(num_packed, -1)
    packed = pack(by_node.reshape(num_packed, -1), per_copy, capacity.reshape(num_packed, -1))
    anew = lower_maximum(replace(packing, slots=packed.reshape(packing.slots.shape)), limit)
    anew = search_copies(anew, limit)
    is_fuller = anew.highest > limit * (1 + MIN_GAIN)
    return replace(packing, slots=np.where(is_fuller[:, None, None], packing.slots, anew.slots))


def _exchanged(packing: Packing, limit: Floats, coactivation: Coactivation | None) -> Packing:
    """Single experts exchanged between ranks of different nodes, no maximum raised over `limit`."""
    limit = np.maximum(packing.highest, limit)
    exchanged = np.empty_like(packing.slots)
    for layer, (experts, rank) in enumerate(_physical_experts(packing, coactivation)):
        of_rank = np.full(packing.slots.shape[1], limit[layer])
        rank = swap_between_nodes(experts, rank, packing.node_of_rank, of_rank, _RANK_ROUNDS)
        exchanged[layer] = _table(experts.logical, rank, exchanged[layer].shape)
    return replace(packing, slots=exchanged)


def _physical_experts(
    packing: Packing, coactivation: Coactivation | None
) -> Iterator[tuple[PhysicalExperts, Ints]]:
    """The physical experts of each layer, with the rank of each."""
    for layer, of_layer in enumerate(packing.slots):
        rank, slot = np.nonzero(of_layer != EMPTY)
        pairs = None if coactivation is None else coactivation[layer]
        logical, weight = of_layer[rank, slot], packing.weights[layer, rank, slot]
        load, num_nodes = packing.load[layer], packing.num_nodes
        yield PhysicalExperts(logical, weight, load, pairs, num_nodes), rank


def _table(experts: Ints, row_of: Ints, shape: tuple[int, ...]) -> Ints:
    """[num_rows, width]; the experts of each row, then EMPTY."""
    table = np.full(shape, EMPTY, dtype=np.int64)
    for row in range(shape[0]):
        own = experts[row_of == row]
        table[row, : len(own)] = own
    return table
