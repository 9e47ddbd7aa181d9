"""Whether a rebalance pays: the seconds it saves against the seconds it costs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.balance.moves import Move
from expertlane.balance.packing import Floats


@dataclass(frozen=True)
class RebalanceGate:
    """The cost model, and the decision it gives.

    Attributes:
        pair_s: seconds of a rank for each token-expert pair more.
        expert_bytes: of one expert's weights in one layer.
        move_s: in which every rank sends an expert and receives one, all at once.
        slice_bytes: weights move in slices of this size, one after a step.
        num_steps: of the coming window, over which a placement is to pay.
    """

    pair_s: float
    expert_bytes: int
    move_s: float
    slice_bytes: int
    num_steps: int

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

    def slices(self, needed: Sequence[Move]) -> list[list[Move]]:
        """The moves between ranks, in the order given."""
        crossing = [move for move in needed if move.source != move.rank]
        size = max(1, self.slice_bytes // self.expert_bytes)
        return [crossing[begin : begin + size] for begin in range(0, len(crossing), size)]

    def cost_s(self, slices: Sequence[Sequence[Move]]) -> float:
        """Seconds that it costs: for each slice its busiest rank's transfers, and a stall."""
        return sum(_most_of_a_rank(each) + 1 for each in slices) * self.move_s

    def at_best(self, now: Floats, num_steps_tracked: int) -> "Decision":
        """All ranks alike, for one expert moved: no placement can bring more, or cost less."""
        even = now.mean(axis=1, keepdims=True)
        return Decision(
            gain_s=self.gain_s(now, even, num_steps_tracked),
            cost_s=2 * self.move_s,
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
        slices = self.slices(needed)
        return Decision(
            gain_s=self.gain_s(now, then, num_steps_tracked),
            cost_s=self.cost_s(slices),
            num_bytes=sum(map(len, slices)) * self.expert_bytes,
            num_steps=self.num_steps,
        )


def _most_of_a_rank(needed: Sequence[Move]) -> int:
    """Experts that the busiest rank sends or receives."""
    sent = Counter(move.source for move in needed)
    received = Counter(move.rank for move in needed)
    return max(*sent.values(), *received.values())


@dataclass(frozen=True)
class Decision:
    """What a rebalance would bring.

    Attributes:
        gain_s: saved over the coming window of `num_steps`.
        cost_s: of moving `num_bytes`.
    """

    gain_s: float
    cost_s: float
    num_bytes: int
    num_steps: int

    @property
    def is_worth(self) -> bool:
        """Whether it saves more than it costs."""
        return self.gain_s > self.cost_s

    @property
    def line(self) -> str:
        """Both sides, in one line for a log."""
        return (
            f"rebalance: saves {self.gain_s:.3g} s over the next {self.num_steps} steps, "
            f"costs {self.cost_s:.3g} s ({self.num_bytes / 1e6:.3g} MB to move): "
            + ("go" if self.is_worth else "stay")
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
