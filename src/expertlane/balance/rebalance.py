"""Moving experts while requests run: the load of the latest steps, where to go, what it brings."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement import (
    EMPTY,
    WHOLE,
    Floats,
    Ints,
    Move,
    MovedPart,
    Packing,
    Placement,
    between_ranks,
    keep_slots,
    most_of_a_rank,
    moves,
    next_slice,
    rank_loads,
    total_max_over_mean,
)
from expertlane.balance.planner import lower_maximum, plan_placement, search_copies

_EVEN = (1.5, 1.2, 1.05)  # wanted max/mean near the present placement; a new one is last


class LoadTracker:
    """The number of tokens of each expert, summed over the last `window` steps.

    A step costs the same for any window.
    """

    def __init__(self, num_layers: int, num_experts: int, window: int) -> None:
        self._steps: deque[npt.NDArray[np.integer]] = deque(maxlen=window)
        self._sum = np.zeros((num_layers, num_experts), dtype=np.int64)

    @property
    def num_steps(self) -> int:
        """Steps that `load` sums."""
        return len(self._steps)

    def add(self, num_tokens_per_expert: npt.NDArray[np.integer]) -> None:
        """Add a step.

        Args:
            num_tokens_per_expert: [num_layers, num_experts].
        """
        if len(self._steps) == self._steps.maxlen:
            self._sum -= self._steps[0]
        self._sum += num_tokens_per_expert
        self._steps.append(num_tokens_per_expert.copy())

    def load(self) -> npt.NDArray[np.int64]:
        """[num_layers, num_experts]; a copy."""
        return self._sum.copy()


@dataclass(frozen=True)
class RebalanceGate:
    """The cost model, and the decision it gives.

    Attributes:
        pair_s: seconds of a rank for each token-expert pair more.
        expert_bytes: bytes of one expert's weights in one layer.
        move_s: seconds in which each rank sends and receives one expert, all at once, no stall.
        stall_s: fixed seconds of every slice, however little it moves.
        slice_most: weights move in slices, one after a step: the most that a rank sends or
            receives in one, in units of 1 / `WHOLE` of an expert.
        exposed: the share of these times that steps are held up by.
        num_steps: steps of the coming window, over which a placement is to pay.
    """

    pair_s: float
    expert_bytes: int
    move_s: float
    stall_s: float
    slice_most: int
    num_steps: int
    exposed: float = 1.0

    def gain_s(self, now: Floats, then: Floats, num_steps_tracked: int) -> float:
        """Seconds saved over the coming window, if the load stays as it was; may be negative.

        The critical path of a layer is its fullest rank:
        sum over layers of (fullest now - fullest then) x pair_s x num_steps / num_steps_tracked.

        Args:
            now, then: [num_layers, ep]; `rank_loads` of the steps tracked.
        """
        if not num_steps_tracked:
            return 0.0
        pairs = float(now.max(axis=1).sum() - then.max(axis=1).sum())
        return pairs * self.pair_s * self.num_steps / num_steps_tracked

    def cost_s(self, crossing: Sequence[Move]) -> float:
        """Seconds that moves cost: for each slice its busiest rank's transfers, and a stall."""
        waiting, seconds = deque(map(MovedPart, crossing)), 0.0
        while waiting:
            share = most_of_a_rank(next_slice(waiting, self.slice_most)) / WHOLE
            seconds += share * self.move_s + self.stall_s
        return seconds * self.exposed

    def at_best(self, now: Floats, num_steps_tracked: int) -> "Decision":
        """The best that any placement can bring: all ranks alike, after one expert has moved."""
        even = now.mean(axis=1, keepdims=True)
        return Decision(
            gain_s=self.gain_s(now, even, num_steps_tracked),
            cost_s=(self.move_s + self.stall_s) * self.exposed,
            num_bytes=self.expert_bytes,
            num_steps=self.num_steps,
        )

    def decide(
        self, now: Floats, then: Floats, num_steps_tracked: int, needed: Sequence[Move]
    ) -> "Decision":
        """Weigh a placement against the present one; the loads are those of `gain_s`.

        Args:
            needed: the moves that lead there.
        """
        crossing = between_ranks(needed)
        return Decision(
            gain_s=self.gain_s(now, then, num_steps_tracked),
            cost_s=self.cost_s(crossing),
            num_bytes=len(crossing) * self.expert_bytes,
            num_steps=self.num_steps,
        )


@dataclass(frozen=True)
class Decision:
    """Gain and cost of a rebalance.

    Attributes:
        gain_s: seconds saved over the coming window of `num_steps`.
        cost_s: seconds that moving `num_bytes` costs.
    """

    gain_s: float
    cost_s: float
    num_bytes: int
    num_steps: int

    @property
    def line(self) -> str:
        """Gain, cost and decision, in one line for a log."""
        return (
            f"rebalance: saves {self.gain_s:.3g} s over the next {self.num_steps} steps, "
            f"costs {self.cost_s:.3g} s ({self.num_bytes / 1e6:.3g} MB to move): "
            + ("go" if self.gain_s > self.cost_s else "stay")
        )


class PairCost:
    """The slope of seconds over pairs, by least squares over the ranks of a step and stage.

    The mean, seconds of all over pairs of all, would promise too much: part of what a rank takes it
    takes for its experts' weights, whatever their tokens.
    """

    def __init__(self) -> None:
        self._products = self._squares = 0.0

    def add(self, num_pairs: npt.NDArray[np.integer], seconds: npt.NDArray[np.floating]) -> None:
        """Take in a pipeline stage's ranks of a step.

        Args:
            num_pairs, seconds: [num_ranks]; of each rank's experts, all layers together.
        """
        more = num_pairs - num_pairs.mean()
        self._products += float(more @ seconds)
        self._squares += float(more @ more)

    @property
    def pair_s(self) -> float:
        """Seconds for each pair more; 0 where ranks never differed, or it took no longer."""
        return max(0.0, self._products / self._squares) if self._squares else 0.0


@dataclass(frozen=True)
class Proposal:
    """New placements, and the decision whether to move to them.

    Attributes:
        then: [num_layers]; the new placements.
        before, after: load of the fullest rank over the mean, summed over layers, if tokens came
            evenly from all ranks.
    """

    decision: Decision
    then: list[Placement]
    before: float
    after: float


def propose(
    load: npt.NDArray[np.int64],
    num_steps_tracked: int,
    now: list[Placement],
    ranks_per_node: int,
    gate: RebalanceGate,
    worth: Callable[[Decision], float],
) -> Proposal:
    """Plan several placements and weigh them; the one with most worth.

    Where not even the most that any placement could save is worth moving a single expert, nothing
    is planned.

    Args:
        load: [num_layers, num_experts], of the steps tracked.
        now: [num_layers].
        ranks_per_node: consecutive expert-parallel ranks that share a node; loads are given for
            any, plans are made for full nodes.
    """
    loads = rank_loads(now, load, ranks_per_node)
    before = total_max_over_mean(loads)
    at_best = gate.at_best(loads, num_steps_tracked)
    if worth(at_best) <= 0:
        return Proposal(at_best, now, before, before)
    ep, num_redundant = now[0].ep, now[0].num_slots - now[0].num_experts
    full = ranks_per_node if ep % ranks_per_node == 0 else ep
    planned = [improve_placements(load, now, full, even) for even in _EVEN]
    planned.append(plan_placement(load, ep, full, num_redundant))
    proposals = []
    for then in (keep_slots(now, each) for each in planned):
        reached = rank_loads(then, load, ranks_per_node)
        needed = moves(now, then, ranks_per_node)
        decision = gate.decide(loads, reached, num_steps_tracked, needed)
        proposals.append(Proposal(decision, then, before, total_max_over_mean(reached)))
    return max(proposals, key=lambda each: worth(each.decision))


def improve_placements(
    load: npt.NDArray[np.integer], now: Sequence[Placement], ranks_per_node: int, even: float
) -> list[Placement]:
    """Change copies and swap experts of the fullest ranks until all are even enough.

    A copy that changes its expert moves one expert, a swap two. Loads are those of
    `Placement.rank_loads`; crossings between nodes are not looked at.

    Args:
        load: [num_layers, num_experts].
        now: [num_layers]; ranks keep their numbers of slots.
        ranks_per_node: consecutive ranks that share a node; it divides `ep`.
        even: a fullest rank at most this many times the mean is even enough.
    """
    loads = load.astype(np.float64)
    target = even * loads.sum(axis=1) / now[0].ep
    width = max(len(experts) for placed in now for experts in placed.experts_of_rank)
    slots: Ints = np.full((len(now), now[0].ep, width), EMPTY, dtype=np.int64)
    for layer, placed in enumerate(now):
        for rank, experts in enumerate(placed.experts_of_rank):
            slots[layer, rank, : len(experts)] = experts
    packing = Packing(slots, loads, now[0].ep // ranks_per_node)
    packing = search_copies(packing, target, max_swaps=0)
    packing = lower_maximum(packing, target)
    packing = search_copies(packing, target)
    packing = search_copies(packing, target, keeps_even=False)
    return [
        Placement.of_table(placed.num_experts, of_layer)
        for placed, of_layer in zip(now, packing.slots, strict=True)
    ]
