"""Number of copies of each expert, and the rank of each copy: greedy, all layers at once.

Layers are packed side by side: every step of a loop is one numpy operation over all of them.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

EMPTY = -1  # in a table of slots or items: there is none


def num_copies(load: Floats, num_slots: int, valid: Ints) -> Ints:
    """[num_layers, num_experts]; extra copies go to the expert with most load per copy.

    It gets as many at once as it takes to the next valid number. Where too few are left for
    that, others get them; if that is so for all, numbers are valid that were not.

    Args:
        load: [num_layers, num_experts].
        num_slots: copies of all experts of a layer, num_experts to num_experts x ep.
        valid: numbers of copies, from 1 to ep, rising.
    """
    rows = np.arange(len(load))
    copies = np.ones(load.shape, dtype=np.int64)
    per_copy = load.copy()
    left = np.full(len(load), num_slots - load.shape[1])
    most = int(valid[-1])
    ahead = valid[np.searchsorted(valid, np.arange(most) + 1)] - np.arange(most)
    ahead = np.append(ahead, num_slots + 1)  # nothing comes after the last
    steps = ahead[copies]
    while left.any():
        can = steps <= left[:, None]
        is_stuck = ~can.any(axis=1)
        can[is_stuck] = copies[is_stuck] < most
        chosen = np.where(can, per_copy, -np.inf).argmax(axis=1)
        more = np.minimum(np.where(is_stuck, 1, steps[rows, chosen]), left)
        copies[rows, chosen] += more
        left -= more
        count = copies[rows, chosen]
        per_copy[rows, chosen] = load[rows, chosen] / count
        steps[rows, chosen] = ahead[count]
    return copies


def pack(items: Ints, per_copy: Floats, room: Ints, num_nodes: int = 1) -> Ints:
    """Put copies on ranks: heaviest first, each on the least loaded that has room and lacks it.

    This is the longest-processing-time rule (R. L. Graham, 1969) under a count of slots. Where
    there is room, each expert has equally many copies on all nodes that hold it, and as many such
    nodes as that allows.

    Args:
        items: [num_layers, num_items]; the expert of each copy; EMPTY at the end of shorter rows.
        per_copy: [num_layers, num_experts]; the load of each copy of an expert.
        room: [num_layers, num_ranks]; the slots of each rank, in all as many as there are items,
            differing within a layer by at most one; no expert has more copies than ranks.
        num_nodes: equal numbers of consecutive ranks.

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
    wanted_nodes = nodes_of_copies(num_nodes, num_ranks // num_nodes)
    copies = np.zeros(per_copy.shape, dtype=np.int64)
    np.add.at(copies, (rows[:, None], items), items != EMPTY)
    for expert in items.T:
        is_held, num = holds[rows, :, expert], copies[rows, expert]
        fits = (num_held < room) & ~is_held
        if num_nodes > 1 and (num > 1).any():
            on_node = is_held.reshape(num_layers, num_nodes, -1).sum(axis=2)
            fits = _where_shares_stay_even(fits, on_node, num, wanted_nodes[num])
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


def nodes_of_copies(num_nodes: int, ranks_per_node: int) -> Ints:
    """[ep + 1]; by number of copies, the most nodes that hold equally many; 0 for no copy."""
    counts, nodes = np.arange(num_nodes * ranks_per_node + 1)[:, None], np.arange(1, num_nodes + 1)
    can = (counts % nodes == 0) & (counts // nodes <= ranks_per_node)
    most: Ints = np.where(can, nodes, 0).max(axis=1)
    return most


def _where_shares_stay_even(fits: Bools, on_node: Ints, copies: Ints, num_nodes: Ints) -> Bools:
    """[num_layers, num_ranks]; ranks of `fits` on nodes short of copies, else all of `fits`.

    Args:
        on_node: [num_layers, num_nodes]; copies there already, of `copies` in all.
        num_nodes: [num_layers]; nodes that the copies belong on; 0 for all.
    """
    num_nodes = np.where(num_nodes, num_nodes, on_node.shape[1])[:, None]
    has_begun = on_node > 0
    is_short = on_node < -(-copies[:, None] // num_nodes)
    is_short &= has_begun | (has_begun.sum(axis=1, keepdims=True) < num_nodes)
    wanted = fits & np.repeat(is_short, fits.shape[1] // on_node.shape[1], axis=1)
    return np.where(wanted.any(axis=1, keepdims=True), wanted, fits)


def _exchange_in(slots: Ints, room: Ints, holds: Bools, expert: int) -> None:
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


def share_of_ranks(is_held: Bools, ranks_per_node: int) -> Floats:
    """[..., ep]; the part of an expert's load that each rank computes.

    Args:
        is_held: [..., ep]; whether a rank holds a copy; some rank does.
        ranks_per_node: consecutive ranks that share a node; the last node may have fewer.
    """
    first = np.arange(0, is_held.shape[-1], ranks_per_node)
    sizes = np.diff(first, append=is_held.shape[-1])
    per_copy = _share_per_copy(np.add.reduceat(is_held.astype(np.int64), first, axis=-1), sizes)
    return np.where(is_held, np.repeat(per_copy, sizes, axis=-1), 0.0)


def _share_per_copy(num_on_node: Ints, sizes: Ints) -> Floats:
    """[..., num_nodes]; the part that a copy on each node gets."""
    far = ((num_on_node == 0) * sizes).sum(axis=-1, keepdims=True)  # ranks without one on the node
    near = sizes / np.maximum(num_on_node, 1)
    share: Floats = (near + far / num_on_node.sum(axis=-1, keepdims=True)) / sizes.sum()
    return share


@dataclass(frozen=True, eq=False)
class Packing:
    """Layers packed side by side: the expert in each slot, and the loads that follow.

    Nodes are equal numbers of consecutive ranks. Senders choose copies as the engine's do.

    Attributes:
        slots: [num_layers, num_ranks, most slots]; experts or EMPTY.
        load: [num_layers, num_experts].
    """

    slots: Ints
    load: Floats
    num_nodes: int

    def of_layers(self, layers: npt.NDArray[Any]) -> "Packing":
        """Some layers, by indices or a mask; a copy."""
        return Packing(self.slots[layers], self.load[layers], self.num_nodes)

    @property
    def mean(self) -> Floats:
        """[num_layers]; the load of a rank."""
        mean: Floats = self.load.sum(axis=1) / self.slots.shape[1]
        return mean

    @property
    def node_of_rank(self) -> Ints:
        """[num_ranks]."""
        num_ranks = self.slots.shape[1]
        node: Ints = np.arange(num_ranks) * self.num_nodes // num_ranks
        return node

    @cached_property
    def num_on_node(self) -> Ints:
        """[num_layers, num_experts, num_nodes]; copies there."""
        shape = (*self.load.shape, self.num_nodes)
        layer, rank, slot = np.nonzero(self.slots != EMPTY)
        expert, node = self.slots[layer, rank, slot], self.node_of_rank[rank]
        at = (layer * shape[1] + expert) * shape[2] + node
        return np.bincount(at, minlength=prod(shape)).reshape(shape)

    @cached_property
    def copies(self) -> Ints:
        """[num_layers, num_experts]."""
        copies: Ints = self.num_on_node.sum(axis=2)
        return copies

    @cached_property
    def per_copy(self) -> Floats:
        """[num_layers, num_experts, num_nodes]; the load of a copy on each node."""
        sizes = np.ones(self.num_nodes, dtype=np.int64)
        return self.load[:, :, None] * _share_per_copy(self.num_on_node, sizes)

    @cached_property
    def weights(self) -> Floats:
        """[num_layers, num_ranks, most slots]; the load of the copy in each slot."""
        layer = np.arange(len(self.slots))[:, None, None]
        per_copy = self.per_copy[layer, self.slots, self.node_of_rank[:, None]]
        return np.where(self.slots == EMPTY, 0.0, per_copy)

    @property
    def loads(self) -> Floats:
        """[num_layers, num_ranks]."""
        loads: Floats = self.weights.sum(axis=2)
        return loads

    @property
    def highest(self) -> Floats:
        """[num_layers]; the load of the fullest rank."""
        highest: Floats = self.loads.max(axis=1)
        return highest

    def may_move_to(self) -> Bools:
        """[num_layers, num_experts, num_nodes]; whether any copy may, from another node."""
        has_one = self.num_on_node.max(axis=2, keepdims=True) == 1
        may: Bools = (has_one & (self.num_on_node == 0)) | (self.copies <= 2)[:, :, None]
        return may

    def may_gain(self) -> Bools:
        """[num_layers, num_experts, num_nodes]; whether a copy more there leaves shares even."""
        return self._is_even_with(1)

    def may_lose(self) -> Bools:
        """[num_layers, num_experts, num_nodes]; whether a copy less there leaves shares even."""
        return self._is_even_with(-1) & (self.num_on_node > 0)

    def _is_even_with(self, more: int) -> Bools:
        counts = self.num_on_node
        after = counts + more
        num_nodes = (counts > 0).sum(axis=2, keepdims=True) + (after > 0) - (counts > 0)
        squares = (counts**2).sum(axis=2, keepdims=True) + after**2 - counts**2
        # Counts are equal where their squares sum to no more than they must (Cauchy-Schwarz).
        is_even: Bools = num_nodes * squares == (self.copies[:, :, None] + more) ** 2
        return is_even
