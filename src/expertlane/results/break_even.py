"""Break-even points of two plans: what would change the answer."""

from dataclasses import dataclass
from typing import Literal

from expertlane.spec.ranges import Strict

Varied = Literal["skew", "sequences"]


@dataclass(frozen=True)
class Level(Strict):
    """Break-even point of #1 and its rival in one variable.

    Attributes:
        asked: value that the plan was made for.
        at: value nearest to `asked` at which both have equal tokens/s; None without one.
        end: value tried at which the rival does best, beyond `at` if there is one.
        over_at_end: tokens/s of the rival over those of #1 at `end`; None where #1 misses the
            limits there.
        tried: the least and the largest value.
    """

    varied: Varied
    asked: float
    at: float | None
    end: float
    over_at_end: float | None
    tried: tuple[float, float]


@dataclass(frozen=True)
class BreakEven(Strict):
    """Break-even points of #1 and the best of another kind.

    Attributes:
        rival: name of the rival.
        levels: break-even points, one per variable.
        unsure: law or routing whose error makes most of the ratio's uncertainty; empty without any.
        unsure_share: its share of the squared uncertainty.
    """

    rival: str
    levels: tuple[Level, ...]
    unsure: str = ""
    unsure_share: float = 0.0
