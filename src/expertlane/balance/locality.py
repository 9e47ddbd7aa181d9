"""Local search for fewer crossings between nodes, one layer at a time, within limits of load."""

import numpy as np
import numpy.typing as npt

from expertlane.balance.packing import Floats, Ints

# A pair of experts on one node saves a token a copy only if no third one brought it there before.
_SHARE_SAVED = 0.5
_SWAPS_AT_ONCE = 12  # made on one evaluation of all pairs; each must also gain by itself
_MIN_GAIN = 1e-6  # share of the layer's load


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
    slack = _MIN_GAIN * max(float(experts.weight.sum()), 1e-30)
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
    room = (limit - loads)[bin_of] + weight
    fits: npt.NDArray[np.bool_] = weight[None] <= np.maximum(room, weight)[:, None]
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
