"""Two deployments that were measured in turns: their repetitions, and how the two differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from expertlane.results.estimate import (
    jackknife_difference,
    jackknife_interval,
    median_interval,
    ratio_interval,
)
from expertlane.results.record import PairRecord, StepsRecord
from expertlane.spec.names import Phase


@dataclass(frozen=True)
class Repeated:
    """Throughput and time by cause of one deployment's repetitions.

    Attributes:
        tps: [n]; of each repetition, or of all but each.
        causes_s: [n]; seconds of a step by cause, of the same repetitions.
    """

    tps: tuple[float, ...]
    causes_s: tuple[dict[str, float], ...]

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        return median(sum(each.values()) for each in self.causes_s)

    @classmethod
    def of(cls, runs: Sequence[StepsRecord]) -> "Repeated":
        """From the records of single repetitions."""
        return cls(tuple(each.tps.value for each in runs), tuple(e.breakdown_s for e in runs))

    def without_each(self, around: "Repeated | None" = None) -> "Repeated":
        """The means over all repetitions but one, for each one.

        Args:
            around: where a repetition takes something of the one after it (`cost.virtual`): what
                stands for the two that one takes part in when it is left out.
        """
        num = len(self.tps)
        if num < 2:
            return self

        def without(values: Sequence[float], others: Sequence[float] | None) -> list[float]:
            total = sum(values)
            return [
                (total - values[at] + (others[at] - values[at - 1] if others else 0)) / (num - 1)
                for at in range(num)
            ]

        def token_s(of: Repeated) -> list[float]:
            return [1 / each for each in of.tps]

        def of_cause(of: Repeated, cause: str) -> list[float]:
            return [each[cause] for each in of.causes_s]

        seconds = without(token_s(self), token_s(around) if around else None)
        by_cause = {
            cause: without(of_cause(self, cause), of_cause(around, cause) if around else None)
            for cause in self.causes_s[0]
        }
        causes_s = ({cause: of[at] for cause, of in by_cause.items()} for at in range(num))
        return Repeated(tuple(1 / each for each in seconds), tuple(causes_s))


def pair_in_wall_time(
    names: tuple[str, str],
    phase: Phase,
    repeated: tuple[Repeated, Repeated],
) -> PairRecord:
    """The pair, from repetitions that were measured in turns.

    Args:
        names: the deployment that the first sentence is about, and the other.
        repeated: both deployments' repetitions.
    """
    one, other = repeated
    return PairRecord(
        "measured",
        *names,
        phase,
        len(one.tps),
        ratio_interval(one.tps, other.tps),
        one.step_s,
        other.step_s,
        {
            cause: median_interval(
                [a[cause] - b[cause] for a, b in zip(one.causes_s, other.causes_s, strict=True)]
            )
            for cause in one.causes_s[0]
        },
    )


def pair_in_virtual_time(
    names: tuple[str, str],
    phase: Phase,
    steps: tuple[StepsRecord, StepsRecord],
    repeated: tuple[Repeated, Repeated],
) -> PairRecord:
    """The pair, from all repetitions together and from all but each.

    Args:
        names: the deployment that the first sentence is about, and the other.
        steps: all repetitions of each deployment.
        repeated: all but each repetition, of each deployment.
    """
    (first, second), (one, other) = steps, repeated
    return PairRecord(
        "virtual",
        *names,
        phase,
        len(one.tps),
        jackknife_interval(
            first.tps.value / second.tps.value,
            [a / b for a, b in zip(one.tps, other.tps, strict=True)],
        ),
        first.round_s.value,
        second.round_s.value,
        {
            cause: jackknife_difference(
                first.breakdown_s[cause] - second.breakdown_s[cause],
                [a[cause] - b[cause] for a, b in zip(one.causes_s, other.causes_s, strict=True)],
            )
            for cause in first.breakdown_s
        },
    )
