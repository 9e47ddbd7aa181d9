"""Measuring beside other programs: what they disturb is measured again, within bounds."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from expertlane.engine.ops.host import ForeignLoad

ResultT = TypeVar("ResultT")

QUIET = 0.05  # share of the cores that other processes may take
_MOST_TRIES = 2
AGAIN_SHARE = 0.25  # of the time for measuring


class QuietMeasuring:
    """Measures again what other processes disturbed, a few times each and for so long in all.

    Attributes:
        again_s: how long was measured again.
        num_kept, num_disturbed: measurements, and those of them that were disturbed every time.
        foreign_cpu_share: the most that other processes took of all cores during what was kept.
    """

    def __init__(self, most_again_s: float = 60.0) -> None:
        self.again_s = 0.0
        self.num_kept = self.num_disturbed = 0
        self.foreign_cpu_share = 0.0
        self._most_again_s = most_again_s

    @property
    def disturbed_share(self) -> float:
        """The share of the kept measurements that were disturbed."""
        return self.num_disturbed / self.num_kept if self.num_kept else 0.0

    def measure(self, measure: Callable[[], ResultT]) -> ResultT:
        """The measurement that was disturbed least."""
        tries: list[tuple[ResultT, float]] = []
        while True:
            foreign, began_s = ForeignLoad(), time.monotonic()
            result = measure()
            took_s = time.monotonic() - began_s
            tries.append((result, foreign.share()))
            if len(tries) > 1:
                self.again_s += took_s
            is_quiet = tries[-1][1] <= QUIET
            if is_quiet or len(tries) == _MOST_TRIES or self.again_s + took_s > self._most_again_s:
                break
        result, share = min(tries, key=lambda each: each[1])
        self.num_kept += 1
        self.num_disturbed += share > QUIET
        self.foreign_cpu_share = max(self.foreign_cpu_share, share)
        return result


def rounds_in_time(most: int, within_s: float) -> Iterator[int]:
    """Numbers of rounds: one, then as many as there is time for if each takes the longest's."""
    began_s = ended_s = time.monotonic()
    longest_s = 0.0
    for number in range(most):
        if number and ended_s - began_s + longest_s > within_s:
            return
        yield number
        now_s = time.monotonic()
        longest_s, ended_s = max(longest_s, now_s - ended_s), now_s
