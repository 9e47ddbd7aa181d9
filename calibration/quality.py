"""How well laws fit, as rows of a table for readers, and what a fit gives to the profile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from expertlane.cost.laws.profile import Term
from expertlane.cost.laws.times import Surface

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """Of one law.

    Attributes:
        name: of the surface.
        source: the table it is fitted to.
        num_fitted, num_cleaned: rows used, and dropped as spikes.
        held_out: logarithms of measured over predicted of rows predicted without their shape.
        judged: the same of rows never fitted, by what they are; empty until judged.
    """

    name: str
    source: str
    num_fitted: int
    num_cleaned: int
    held_out: Array
    judged: dict[str, Array]


_HEAD = ("law", "table", "rows fitted", "cleaned", "median error", "p90")


def markdown(qualities: Sequence[Quality]) -> str:
    """A table; errors are |predicted / measured − 1| of rows not fitted."""
    parts = list(dict.fromkeys(part for each in qualities for part in each.judged))
    head = [*_HEAD, *(f"{part}: rows, median, p90" for part in parts)]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for each in qualities:
        cells = [each.name, each.source, f"{each.num_fitted:,}", f"{each.num_cleaned:,}"]
        cells += _percent(each.held_out)
        for part in parts:
            errors = each.judged.get(part, np.empty(0))
            both = _percent(errors)
            cells.append(f"{len(errors):,}, {both[0]}, {both[1]}" if len(errors) else "")
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def side_by_side(qualities: Mapping[str, Sequence[Quality]], part: str) -> str:
    """A table of cards: percent of rows left out, median and p90, then the median of a part's."""
    of_law: dict[str, dict[str, Quality]] = {}
    for card, of_card in qualities.items():
        for each in of_card:
            of_law.setdefault(each.name, {})[card] = each
    lines = [" | ".join(["law", *qualities]), " | ".join(["---"] * (1 + len(qualities)))]
    for law, of_cards in of_law.items():
        cells = [_short(of_cards.get(card), part) for card in qualities]
        lines.append(" | ".join([f"`{law}`", *cells]))
    return "".join(f"| {line} |\n" for line in lines)


def _short(quality: Quality | None, part: str) -> str:
    if quality is None:
        return ""
    numbers = _percent(quality.held_out) + _percent(quality.judged.get(part, np.empty(0)))[:1]
    return " / ".join(number.removesuffix(" %") for number in numbers if number)


def _percent(errors: Array) -> list[str]:
    if not len(errors):
        return ["", ""]
    relative = np.abs(np.expm1(-errors))
    return [f"{100 * np.median(relative):.1f} %", f"{100 * np.percentile(relative, 90):.1f} %"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """Laws, and how well they fit."""

    surfaces: dict[str, Surface] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)
    qualities: list[Quality] = field(default_factory=list)
