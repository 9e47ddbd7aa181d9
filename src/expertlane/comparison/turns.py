"""The order of repetitions: what changes in a machine meanwhile affects all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from expertlane.spec.ranges import DEFAULT_REPEAT

_MOST_RUNS = 1_000
_RUNS_OF_OTHERS = 2


@dataclass(frozen=True)
class Repeats:
    """Repetitions of the deployments in the first sentence; others have two at most.

    Attributes:
        num_runs: repetitions of each of them.
        least_s: repeat until the steps of each of them have taken so long.
    """

    num_runs: int = DEFAULT_REPEAT
    least_s: float = 0.0

    @property
    def num_of_others(self) -> int:
        """Repetitions of the other deployments."""
        return min(_RUNS_OF_OTHERS, self.num_runs)


class Repeatable(Protocol):
    """A deployment that is measured again and again."""

    @property
    def num_runs(self) -> int:
        """Repetitions so far, failed ones left out."""

    @property
    def measured_s(self) -> float:
        """Seconds that they took."""

    @property
    def is_over(self) -> bool:
        """True of one that cannot be measured again."""

    def measure(self, *, deploy: bool) -> None:
        """Run the workload once more.

        Args:
            deploy: another one ran last, so that it is to be put in place again.
        """


R = TypeVar("R", bound=Repeatable)


def measure_in_turns(
    deployed: Sequence[R], repeats: Repeats, choose: Callable[[], Sequence[R]]
) -> Sequence[R]:
    """Measure all, the second time in the opposite order, then those of the first sentence.

    These in turns a, b, b, a, a, b; what ran last needs not be put in place again.

    Args:
        choose: chooses those, after the first runs; all where it chooses none.

    Returns:
        What was chosen.
    """
    before: R | None = None
    for number in range(repeats.num_of_others):
        for each in deployed if number % 2 == 0 else reversed(deployed):
            if not each.is_over:
                each.measure(deploy=each is not before)
                before = each
    chosen = choose()
    turning, before = chosen or deployed, None
    for _ in range(_MOST_RUNS):
        left = [each for each in turning if not each.is_over]
        if all(
            each.num_runs >= repeats.num_runs and each.measured_s >= repeats.least_s
            for each in left
        ):
            break
        for each in left if not left or before is not left[-1] else reversed(left):
            each.measure(deploy=each is not before)
            before = each
    return chosen
