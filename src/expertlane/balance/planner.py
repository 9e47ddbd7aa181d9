"""A placement that evens out a load: copies of hot experts, packed so that no rank is fuller."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from expertlane.balance.local_search import (
    MIN_GAIN,
    PhysicalExperts,
    lower_maximum,
    search_copies,
    swap_between_nodes,
)
from expertlane.balance.packing import (
    EMPTY,
    Floats,
    Ints,
    Packing,
    nodes_of_copies,
    num_copies,
    pack,
)
from expertlane.balance.placement import Placement, partition_slots
from expertlane.errors import SpecError

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
    room = np.tile([len(slots) for slots in of_ranks], (num_layers, 1))  # [num_layers, ep]
    if not num_layers:
        return []
    loads = load.astype(np.float64)
    loads[loads.sum(axis=1) == 0] = 1.0  # without tokens all experts count alike
    num_nodes = ep // ranks_per_node
    packing = _balanced(loads, room, num_nodes, even)
    if num_nodes > 1 and coactivation is not None:
        limit = np.minimum(_greedy(loads, room), _EVEN_ENOUGH * packing.mean)
        packing = _exchanged(_regrouped(packing, room, limit, coactivation), limit, coactivation)
    elif num_nodes > 1:
        packing = _exchanged(packing, np.zeros(num_layers), None)
    return [Placement.of_table(num_experts, of_layer) for of_layer in packing.slots]


def _balanced(load: Floats, room: Ints, num_nodes: int, even: float | None) -> Packing:
    """The most even packing, or one that is even enough."""
    ep = room.shape[1]
    counts, mean = np.arange(1, ep + 1), load.sum(axis=1) / ep
    # No fullest rank can have less than the hottest expert's copy.
    least = (load / num_copies(load, int(room[0].sum()), counts)).max(axis=1)
    target = np.maximum((even or _EVEN) * mean, least)
    low = least if even is None else target
    # Copies on all nodes or one a node spare most crossings; then any that nodes can share evenly.
    is_spread = (counts <= num_nodes) | (counts % num_nodes == 0)
    is_even = nodes_of_copies(num_nodes, ep // num_nodes)[1:] > 0
    slots = np.full((*room.shape, int(room.max())), EMPTY, dtype=np.int64)
    highest = np.full(len(load), np.inf)
    has_copies = int(room[0].sum()) > load.shape[1]
    for valid in (counts[is_spread], counts[is_even], counts)[: None if has_copies else 1]:
        hard = np.nonzero(highest > target * (1 + MIN_GAIN))[0]
        if not len(hard):
            break
        tried = _packed(load[hard], room[hard], num_nodes, valid)
        tried = search_copies(lower_maximum(tried, low[hard]), target[hard])
        better = tried.highest < highest[hard]
        slots[hard[better]], highest[hard[better]] = tried.slots[better], tried.highest[better]
    return Packing(slots, load, num_nodes)


def _packed(load: Floats, room: Ints, num_nodes: int, valid: Ints) -> Packing:
    """Greedy packing with valid numbers of copies, where slots allow."""
    copies = num_copies(load, int(room[0].sum()), valid)
    return Packing(pack(_items(copies), load / copies, room, num_nodes), load, num_nodes)


def _greedy(load: Floats, room: Ints) -> Floats:
    """[num_layers]; the fullest rank's load after greedy packing, all copies taken as alike.

    With coactivation a rank may have as much, where its copies share evenly.
    """
    copies = num_copies(load, int(room[0].sum()), np.arange(1, room.shape[1] + 1))
    weight = np.take_along_axis(load / copies, _items(copies), axis=1)
    alone = np.tile(np.arange(weight.shape[1]), (len(load), 1))  # as if each were another expert's
    return Packing(pack(alone, weight, room), weight, 1).highest


def _items(copies: Ints) -> Ints:
    """[num_layers, num_slots]; each expert as often as it has copies."""
    experts = np.arange(copies.shape[1])
    return np.array([np.repeat(experts, each) for each in copies], dtype=np.int64)


def _regrouped(packing: Packing, room: Ints, limit: Floats, coactivation: Coactivation) -> Packing:
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
    packed = pack(by_node.reshape(num_packed, -1), per_copy, room.reshape(num_packed, -1))
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
