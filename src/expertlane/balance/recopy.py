"""Local search over the numbers of copies: a copy makes room for one of the fullest rank's."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import EMPTY, Floats, Ints
from expertlane.balance.refine import weights_of_slots
from expertlane.balance.sharing import CopiesOnNodes


def shift_copies(
    slots: Ints, load: Floats, num_nodes: int, choice: Ints, keeps_even: bool = True
) -> npt.NDArray[np.bool_]:
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
    changed: npt.NDArray[np.bool_] = np.isfinite(flat[rows, chosen])
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
    holds: npt.NDArray[np.bool_]
    weight: Floats
    loads: Floats
    may_gain: npt.NDArray[np.bool_]
    may_lose: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, slots: Ints, load: Floats, num_nodes: int, keeps_even: bool) -> "_State":
        """The state that slots give; arguments are those of `shift_copies`."""
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
