"""Local search for fewer crossings between nodes, one layer at a time, within limits of load."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import Floats, Ints

# A pair of experts on one node saves a token a copy only if no third one brought it there before.
_SHARE_SAVED = 0.5
_SWAPS_AT_ONCE = 12  # made on one evaluation of all pairs; each must also gain by itself
_MIN_GAIN = 1e-6  # of the layer's load


@dataclass(frozen=True)
class Items:
    """The physical experts of a layer.

    Attributes:
        experts: [num_items]; the logical expert of each.
        weight: [num_items]; its load.
        bonds: [num_items, num_items]; the crossings that a pair saves on one node.
        spread: [num_items]; the crossings that an expert's presence on one more node saves.
    """

    experts: Ints
    weight: Floats
    bonds: npt.NDArray[np.float32]
    spread: npt.NDArray[np.float32]

    @classmethod
    def of(
        cls,
        experts: Ints,
        weight: Floats,
        load: Floats,
        coactivation: npt.NDArray[np.floating] | None,
        num_nodes: int,
    ) -> "Items":
        """Items with what they save, for tokens that sit on each node with equal chance.

        A token finds an expert of c copies at home on the share (nodes with a copy) / num_nodes,
        and goes to a given one of its copies in 1/c of the other cases.

        Args:
            experts, weight: [num_items].
            load: [num_experts].
            coactivation: [num_experts, num_experts], or None to know of no pairs.
        """
        copies = np.bincount(experts, minlength=len(load))[experts]
        bonds = np.zeros((len(experts), len(experts)), dtype=np.float32)
        if coactivation is not None:
            share = (_SHARE_SAVED * (1 - 1 / num_nodes)) ** 0.5 / copies
            bonds[:] = coactivation[np.ix_(experts, experts)] * np.outer(share, share)
            bonds[experts[:, None] == experts] = 0.0
        return cls(
            experts,
            weight,
            bonds,
            (load[experts] / num_nodes).astype(np.float32),
        )


def swap_between_nodes(
    items: Items, bin_of: Ints, node_of_bin: Ints, limit: Floats, max_rounds: int
) -> Ints:
    """Swap items of different nodes while that saves crossings and no bin exceeds its limit.

    Args:
        bin_of: [num_items]; a rank, or a node if ranks are packed later.
        node_of_bin: [num_bins].
        limit: [num_bins]; of load. A bin may be above it only if it was.

    Returns:
        The new bin of each item.
    """
    bin_of = bin_of.copy()
    loads = np.bincount(bin_of, weights=items.weight, minlength=len(limit)).astype(np.float64)
    slack = _MIN_GAIN * max(float(items.weight.sum()), 1e-30)
    for _ in range(max_rounds):
        gain = _gains(items, node_of_bin[bin_of], int(node_of_bin.max()) + 1)
        fits = _fits(items.weight, bin_of, loads, limit)
        gain = np.where(fits & fits.T, gain, -np.inf)
        made = _make_best(items, bin_of, node_of_bin, loads, limit, gain, slack)
        if not made:
            break
    return bin_of


def _gains(items: Items, node_of: Ints, num_nodes: int) -> npt.NDArray[np.float32]:
    """[num_items, num_items]; crossings saved if two items change places; -inf where they can't."""
    is_on = np.zeros((len(node_of), num_nodes), dtype=np.float32)
    is_on[np.arange(len(node_of)), node_of] = 1.0
    bond = items.bonds @ is_on  # of an item with all of a node
    num_there = np.zeros((int(items.experts.max()) + 1, num_nodes), dtype=np.int64)
    np.add.at(num_there, (items.experts, node_of), 1)
    num_there = num_there[items.experts]  # [num_items, num_nodes]; copies of an item's expert
    at_home = np.arange(len(node_of)), node_of
    # Moving to a node without the expert saves its share there, and loses it here if the last.
    move = bond - bond[at_home][:, None]
    move += (items.spread * (num_there[at_home] > 1))[:, None]
    # Elsewhere a move would leave unlike numbers of copies on nodes, and with them unlike loads.
    may_move = (num_there.max(axis=1) == 1) | (num_there.sum(axis=1) == 2)
    move[(num_there > 0) | ~may_move[:, None]] = -np.inf
    gain = move[:, node_of]
    gain = gain + gain.T
    gain -= 2 * items.bonds
    return gain


def _fits(weight: Floats, bin_of: Ints, loads: Floats, limit: Floats) -> npt.NDArray[np.bool_]:
    """[num_items, num_items]; whether the first one's bin can take the second one in its place."""
    room = (limit - loads)[bin_of] + weight
    fits: npt.NDArray[np.bool_] = weight[None] <= np.maximum(room, weight)[:, None]
    return fits


def _make_best(
    items: Items,
    bin_of: Ints,
    node_of_bin: Ints,
    loads: Floats,
    limit: Floats,
    gain: npt.NDArray[np.float32],
    slack: float,
) -> int:
    """Make the best swaps of experts not yet moved in this round; in place; gives their number."""
    weight, experts = items.weight, items.experts
    best = gain.max(axis=1)
    before = node_of_bin[bin_of]
    after = before.copy()
    moved: set[int] = set()
    made = 0
    for one in np.argsort(-best)[: 4 * _SWAPS_AT_ONCE].tolist():
        other = int(gain[one].argmax())
        if best[one] <= slack or made == _SWAPS_AT_ONCE:
            break
        pair = {int(experts[one]), int(experts[other])}
        a, b = bin_of[one], bin_of[other]
        change = weight[one] - weight[other]
        if (
            pair & moved
            or loads[a] - change > max(limit[a], loads[a])
            or loads[b] + change > max(limit[b], loads[b])
            or best[one] + _bond_drift(items.bonds, before, after, one, other) <= slack
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
    """How a swap's gain by pairs has changed since nodes were as `before`."""
    shifted = np.nonzero(before != after)[0]
    difference = bonds[one, shifted] - bonds[other, shifted]
    toward, away = after[other], after[one]
    drift = (after[shifted] == toward) * 1.0 - (after[shifted] == away)
    drift -= (before[shifted] == toward) * 1.0 - (before[shifted] == away)
    return float(difference @ drift)
