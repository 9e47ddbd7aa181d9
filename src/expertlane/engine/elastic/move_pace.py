"""The pace of moving experts: how much of an expert is sent beside a step, in a slice.

A slice fits into the time in which a step leaves its ranks' links idle, and delays the step by a
bounded share. The seconds of a move are timed once; seconds of steps, their idle links, and the
delays by slices are measured while steps run.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from expertlane.balance.moves import WHOLE
from expertlane.engine.ranks.tickets import Ticket
from expertlane.results.step_record import RankRecord
from expertlane.spec.names import Stage

HELD_UP = 0.2  # share of a step by which a slice may delay it
_SEEN = 32  # latest steps, and slices, that are taken into account
_LEAST = 1 / 4096  # of an expert
_LINKED = [Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES, Stage.HAND_OVER]


class MovePace:
    """The pace of one replica.

    Args:
        move_s: seconds in which every rank sends an expert and receives one, all at once, without
            the stall.
        stall_s: seconds that a slice costs, however little it moves.

    Attributes:
        paid_s: seconds by which slices have delayed steps so far.
        num_slices: slices that have ended.
    """

    def __init__(self, move_s: float, stall_s: float) -> None:
        self.move_s, self.stall_s = move_s, stall_s
        self.paid_s, self.num_slices = 0.0, 0
        self._steps: deque[tuple[float, float]] = deque(maxlen=_SEEN)
        self._slices: deque[tuple[float, float]] = deque(maxlen=_SEEN)
        self._under_way: deque[tuple[float, tuple[Ticket[float], Ticket[float]]]] = deque()

    @classmethod
    def of_trials(cls, timed: Sequence[Sequence[tuple[int, float, float]]]) -> "MovePace":
        """The pace by the fastest of several trials.

        Args:
            timed: the results of `TimeOneMove`, by trial and rank.
        """
        whole_s, stall_s = (
            max(1e-6, min(max(of_rank[which] for of_rank in trial) for trial in timed))
            for which in (1, 2)
        )
        return cls(max(whole_s - stall_s, whole_s / 16), stall_s)

    def saw_step(self, records: Sequence[RankRecord]) -> None:
        """Take in the seconds of a step, and the mean seconds in which a rank's links were idle."""
        wall_s = np.array([record.wall_s.sum(axis=(0, 1)) for record in records])
        spent_s = wall_s.sum(axis=1) - wall_s[:, Stage.IDLE]
        self._steps.append(
            (float(spent_s.max()), float((spent_s - wall_s[:, _LINKED].sum(axis=1)).mean()))
        )

    @property
    def exposed(self) -> float:
        """Delay of steps over the slices' own time; 1 before the first slice has ended."""
        if not self._slices:
            return 1.0
        expected_s, held_up_s = np.sum(self._slices, axis=0)
        return float(held_up_s / expected_s)

    @property
    def most(self) -> int:
        """The part of an expert, of `WHOLE`, that a rank may send or get beside the next step."""
        if not self._steps:
            return WHOLE
        step_s, idle_s = np.median(self._steps, axis=0)
        held_up_s = HELD_UP * step_s / max(self.exposed, 1e-3) - self.stall_s
        # Less than the stall of a slice would cost more than it moves.
        seconds = max(min(held_up_s, idle_s), self.stall_s)
        return max(1, int(WHOLE * max(seconds / self.move_s, _LEAST)))

    def began(self, share: float, start: Ticket[float], finish: Ticket[float]) -> None:
        """Register a slice that was begun.

        Args:
            share: the part of an expert that the busiest rank sends or receives, 0 … 1.
            start, finish: its commands' tickets.
        """
        self._under_way.append((share, (start, finish)))

    def abandon(self) -> None:
        """Forget the slices under way, since their ranks are gone or have dropped them too."""
        self._under_way.clear()

    def poll(self) -> bool:
        """Take in the slices that have ended; gives whether all have. Does not wait."""
        while self._under_way:
            share, tickets = self._under_way[0]
            if not all(ticket.is_done for ticket in tickets):
                return False
            self._under_way.popleft()
            seconds = sum(max(ticket.results.values()) for ticket in tickets)
            self._slices.append((share * self.move_s + self.stall_s, seconds))
            self.paid_s += seconds
            self.num_slices += 1
        return True
