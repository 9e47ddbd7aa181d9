"""How well laws fit, as rows of a table for readers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def _percent(errors: Array) -> list[str]:
    if not len(errors):
        return ["", ""]
    relative = np.abs(np.expm1(-errors))
    return [f"{100 * np.median(relative):.1f} %", f"{100 * np.percentile(relative, 90):.1f} %"]
