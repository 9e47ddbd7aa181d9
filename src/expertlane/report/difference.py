"""What makes one deployment's step longer than another's, cause by cause."""

from collections.abc import Mapping
from dataclasses import dataclass

from expertlane.report.compared import Row

LEAST_SHARE = 0.005  # of the step; smaller differences are added up as OTHER
_LEAST_REST = 0.001  # likewise; a smaller OTHER is rounding
OTHER = "other"


@dataclass(frozen=True)
class StepDifference:
    """From the slower to the faster step, in milliseconds: what a waterfall shows.

    Attributes:
        slower_ms, faster_ms: a decode step of every sequence, or the prefill.
        causes: each with what it adds on the way, negative where the faster step has less of it:
            first what is saved, then what is added, the largest first; `OTHER` last, so that
            they sum to `faster_ms - slower_ms`.
    """

    slower_ms: float
    faster_ms: float
    causes: tuple[tuple[str, float], ...]


def step_difference(slower: Row, faster: Row) -> StepDifference:
    """How the step of one deployment becomes that of another; both of one source and phase."""
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
    """In the order of a waterfall, small causes added up.

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
