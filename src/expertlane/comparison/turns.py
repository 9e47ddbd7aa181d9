"""The order of repetitions: deployments take turns, so that a drift of the machine affects all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from expertlane.spec.ranges import DEFAULT_REPEAT

_MOST_RUNS = 1_000
_RUNS_OF_OTHERS = 2


@dataclass(frozen=True)
class Repeats:
    """Repetitions of the deployments in the answer's first sentence; others have at most two.

    Attributes:
        num_runs: repetitions of each.
        least_s: seconds that each is measured at least, in more repetitions if need be.
    """

    num_runs: int = DEFAULT_REPEAT
    least_s: float = 0.0

    @property
    def num_of_others(self) -> int:
        """Repetitions of the other deployments."""
        return min(_RUNS_OF_OTHERS, self.num_runs)


class Repeatable(Protocol):
    """A deployment that can be measured repeatedly."""

    @property
    def num_runs(self) -> int:
        """Completed repetitions."""

    @property
    def measured_s(self) -> float:
        """Seconds of completed repetitions."""

    @property
    def is_over(self) -> bool:
        """True if it cannot be measured again."""

    def measure(self, *, deploy: bool) -> None:
        """Run the workload once more.

        Args:
            deploy: another deployment ran last, so this one must be deployed again.
        """


R = TypeVar("R", bound=Repeatable)


def measure_in_turns(
    deployed: Sequence[R], repeats: Repeats, choose: Callable[[], Sequence[R]]
) -> Sequence[R]:
    """Measure all once, then in reverse order, then the deployments of the first sentence in turns.

    Turns are a, b, b, a, a, b, so every second one needs no new deployment.

    Args:
        deployed: all deployments.
        choose: chooses those of the first sentence after the first runs; all if it chooses none.

    Returns:
        What `choose` gave.
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
