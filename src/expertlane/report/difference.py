"""Difference between the steps of two deployments, cause by cause."""

from collections.abc import Mapping
from dataclasses import dataclass

from expertlane.report.compared import Row

LEAST_SHARE = 0.005  # of the step; smaller differences are added up as OTHER
_LEAST_REST = 0.001  # likewise; a smaller OTHER is rounding
OTHER = "other"


@dataclass(frozen=True)
class StepDifference:
    """From the slower to the faster step, in milliseconds, for a waterfall.

    Attributes:
        slower_ms, faster_ms: a decode step of every sequence, or the prefill.
        causes: each with its milliseconds in the faster step less those in the slower one:
            first what is saved, then what is added, the largest first; `OTHER` last, so that
            they sum to `faster_ms - slower_ms`.
    """

    slower_ms: float
    faster_ms: float
    causes: tuple[tuple[str, float], ...]


def step_difference(slower: Row, faster: Row) -> StepDifference:
    """The difference between two deployments' steps; both of one source and phase."""
    slow_s, fast_s = slower.step.breakdown_s, faster.step.breakdown_s
    slower_ms, faster_ms = (1e3 * sum(each.values()) for each in (slow_s, fast_s))
    by_cause = {
        cause: 1e3 * (fast_s.get(cause, 0.0) - slow_s.get(cause, 0.0))
        for cause in dict.fromkeys([*slow_s, *fast_s])
    }
    return difference_of(slower_ms, faster_ms, by_cause)


def difference_of(
    slower_ms: float, faster_ms: float, by_cause: Mapping[str, float]
) -> StepDifference:
    """The difference in the order of a waterfall, small causes summed.

    Args:
        by_cause: milliseconds of the faster step less those of the slower one, of all causes or
            of some.
    """
    named = {c: ms for c, ms in by_cause.items() if abs(ms) >= LEAST_SHARE * slower_ms}
    ordered = sorted(named.items(), key=lambda item: (item[1] > 0, -abs(item[1])))
    rest = faster_ms - slower_ms - sum(named.values())
    if abs(rest) >= _LEAST_REST * slower_ms:
        ordered.append((OTHER, rest))
    return StepDifference(slower_ms, faster_ms, tuple(ordered))
