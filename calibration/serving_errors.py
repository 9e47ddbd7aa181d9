"""How far the model is off on rows of the file: by group, by row, and between layouts."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from serving_rows import Row
from serving_simulation import Bounds, Projected

from expertlane.results.hardware import below_above

FEWEST = 10  # rows of a group that is judged
# How much repeats of the same point differ in the file: pairs nearer than that have no order.
NOISE = {"TPOT": 0.11, "output": 0.14, "TTFT": 0.34}

Pair = tuple[Row, Projected]
_MEASURED: Mapping[str, Callable[[Row], float]] = {
    "TPOT": lambda row: row.tpot_s,
    "output": lambda row: row.output_tps,
    "TTFT": lambda row: row.ttft_s,
}
_PROJECTED: Mapping[str, Callable[[Projected], Bounds]] = {
    "TPOT": lambda each: each.tpot_s,
    "output": lambda each: each.output_tps,
    "TTFT": lambda each: each.ttft_s,
}


@dataclass(frozen=True)
class Errors:
    """Of one quantity on some rows; shares of what was measured.

    Attributes:
        signed, size, p90: medians of the error and of its size, and its 90th percentile.
        ratios: of what was measured over what was projected, as `range_of` has it.
        inside: share of rows inside the bounds.
        half_width: median, as a share of the likely value.
    """

    num_rows: int
    signed: float
    size: float
    p90: float
    ratios: tuple[float, float]
    inside: float
    half_width: float

    @classmethod
    def of(cls, what: str, pairs: Sequence[Pair]) -> "Errors":
        """The errors of one of `NOISE`."""
        measured = np.array([_MEASURED[what](row) for row, _ in pairs])
        low, likely, high = np.array([_PROJECTED[what](each) for _, each in pairs]).T
        errors = likely / measured - 1
        return cls(
            len(pairs),
            float(np.median(errors)),
            float(np.median(np.abs(errors))),
            float(np.quantile(np.abs(errors), 0.9)),
            range_of(likely / measured),
            float(np.mean((low <= measured) & (measured <= high))),
            float(np.median((high - low) / 2 / likely)),
        )

    def __str__(self) -> str:
        return (
            f"{self.signed:+.0%} | {self.size:.0%} | {self.p90:.0%} | {below_above(self.ratios)} | "
            f"{self.inside:.0%} | ±{self.half_width:.0%}"
        )


def range_of(ratios: np.ndarray) -> tuple[float, float]:
    """What was measured over what was projected: 5th and 95th percentile, or 1.

    Args:
        ratios: [N]; projected over measured.
    """
    low, high = np.quantile(1 / np.asarray(ratios), (0.05, 0.95))
    return round(min(float(low), 1.0), 3), round(max(float(high), 1.0), 3)


def by_group(pairs: Sequence[Pair], key: Callable[[Row], Any]) -> dict[str, list[Pair]]:
    """Pairs of each group, by its name."""
    found: defaultdict[str, list[Pair]] = defaultdict(list)
    for row, each in pairs:
        name = key(row)
        found[", ".join(filter(None, name)) if isinstance(name, tuple) else str(name)].append(
            (row, each)
        )
    return dict(sorted(found.items()))


def table(groups: Mapping[str, Sequence[Pair]], fewest: int = FEWEST) -> Iterator[str]:
    """Markdown: a line for each quantity of each group."""
    heads = "median error", "absolute", "p90", "measured", "inside bounds", "bounds"
    yield f"| rows of | rows | of | {' | '.join(heads)} |"
    yield "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, pairs in groups.items():
        for what in NOISE:
            if len(pairs) < fewest:
                yield f"| {name} | {len(pairs)} | {what} | too few rows | | | | | |"
                break
            yield f"| {name} | {len(pairs)} | {what} | {Errors.of(what, pairs)} |"


def single_rows(pairs: Sequence[Pair]) -> Iterator[str]:
    """Markdown: each row by itself."""
    yield "| deployment | load | of | measured | projected | low | high | error |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for row, each in pairs:
        name = f"{row.prefill} → {row.decode}" if row.prefill else str(row.decode)
        speculation = ", MTP" if row.is_speculative else ""
        load = f"{row.isl}/{row.osl}, {row.conc}{speculation}"
        for what in NOISE:
            unit = 1 if what == "output" else 1e3
            measured = _MEASURED[what](row)
            low, likely, high = _PROJECTED[what](each)
            yield (
                f"| {name} | {load} | {what} | {unit * measured:,.1f} | {unit * likely:,.1f} | "
                f"{unit * low:,.1f} | {unit * high:,.1f} | {likely / measured - 1:+.0%} |"
            )


def orders(pairs: Sequence[Pair], counts: Callable[[Row, Row], bool]) -> Iterator[str]:
    """Markdown: of layouts at one load, the share of pairs whose order is right.

    Repeats of a point are taken together, by their median.

    Args:
        counts: whether a pair of rows is among those that are judged.
    """
    yield "| of | loads | pairs | right |"
    yield "| --- | ---: | ---: | ---: |"
    points: defaultdict[Any, list[Pair]] = defaultdict(list)
    for row, each in pairs:
        points[row.point].append((row, each))
    loads: defaultdict[Any, list[list[Pair]]] = defaultdict(list)
    for same in points.values():
        row = same[0][0]
        is_apart = row.prefill is not None
        loads[
            row.hardware,
            row.framework,
            row.precision,
            row.is_speculative,
            is_apart,
            row.lengths,
            row.conc,
        ].append(same)
    for what, noise in NOISE.items():
        num_pairs = num_right = num_loads = 0
        for layouts in loads.values():
            found = [
                _is_right(what, noise, *each)
                for each in combinations(layouts, 2)
                if counts(each[0][0][0], each[1][0][0])
            ]
            clear = [right for right in found if right is not None]
            num_loads += bool(clear)
            num_pairs, num_right = num_pairs + len(clear), num_right + sum(clear)
        share = f"{num_right / num_pairs:.0%}" if num_pairs else "none"
        yield f"| {what} | {num_loads} | {num_pairs} | {share} |"


def _is_right(what: str, noise: float, one: Sequence[Pair], other: Sequence[Pair]) -> bool | None:
    """None where what was measured is too near to be told apart."""
    first, second = (np.median([_MEASURED[what](row) for row, _ in each]) for each in (one, other))
    if abs(np.log(first / second)) < np.log1p(noise):
        return None
    likely = [np.median([_PROJECTED[what](found)[1] for _, found in each]) for each in (one, other)]
    return bool((first < second) == (likely[0] < likely[1]))
