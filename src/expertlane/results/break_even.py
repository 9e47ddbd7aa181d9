"""Where two plans are level: what would change an answer."""

from dataclasses import dataclass
from typing import Literal

from expertlane.spec.ranges import Strict

Varied = Literal["skew", "sequences"]


@dataclass(frozen=True)
class Level(Strict):
    """Where #1 and its rival have as many tokens a second, as one thing varies.

    Attributes:
        asked: what the plan was made for.
        at: where they are level, the nearest to `asked`; None where they are nowhere.
        end: beyond `at`, or anywhere where that is None, where the rival does best.
        over_at_end: tokens a second of the rival over those of #1 there; None where #1 keeps no
            limit.
        tried: the least and the most.
    """

    varied: Varied
    asked: float
    at: float | None
    end: float
    over_at_end: float | None
    tried: tuple[float, float]


@dataclass(frozen=True)
class BreakEven(Strict):
    """What would change the answer between #1 and the best of another kind.

    Attributes:
        rival: that one's name.
        levels: of what varies for these two.
        unsure: the error that their ratio is least sure by, of a law or of routing; empty where it
            has none.
        unsure_share: of the ratio's spread, as squares.
    """

    rival: str
    levels: tuple[Level, ...]
    unsure: str = ""
    unsure_share: float = 0.0
