"""How far the model is off on measurements: by kind, and in the ratio of two layouts."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from serving_fit import Point, Times

from expertlane.results.hardware import below_above

FEWEST = 10  # rows of a kind that is judged
QUANTITIES: Mapping[str, Callable[[Times], float | None]] = {
    "TPOT": lambda times: times.tpot_s,
    "output": lambda times: times.output_tps,
    "TTFT": lambda times: times.ttft_s,
}
_COARSER = 5.0  # points that those of a coarser kind weigh together
_BOUNDS = (0.05, 0.95)
_QUEUE = 10.0  # times: TTFT so far off is a queue on one side, which says nothing of others
_DAYS_APART = 7  # at most, where versions are not told
_CLEAR = 0.1  # difference of two layouts that are told apart

Ratios = tuple[float, float]


def ratios(what: str, points: Sequence[Point]) -> np.ndarray:
    """Measured over projected, of points that know of both."""
    of = QUANTITIES[what]
    known = [(of(each.measured), of(each.played)) for each in points]
    return np.array([one / other for one, other in known if one and other])


@dataclass(frozen=True)
class Errors:
    """Errors of one quantity, projected over measured − 1.

    Attributes:
        signed, size, p90: medians of the error and of its size, and its 90th percentile.
        inside: share of points inside the bounds.
        bounds: of measured over projected; the median of each.
    """

    num: int
    signed: float
    size: float
    p90: float
    inside: float
    bounds: Ratios

    @classmethod
    def of(
        cls, what: str, points: Sequence[Point], bounds_of: Callable[[str, Point], Ratios]
    ) -> "Errors":
        """The errors of one of `QUANTITIES`."""
        of = QUANTITIES[what]
        known = [each for each in points if of(each.measured) and of(each.played)]
        found = ratios(what, known)
        if not len(found):
            nothing = float("nan")
            return cls(0, nothing, nothing, nothing, nothing, (nothing, nothing))
        low, high = np.array([bounds_of(what, each) for each in known]).T
        errors = 1 / found - 1
        return cls(
            len(found),
            float(np.median(errors)),
            float(np.median(np.abs(errors))),
            float(np.quantile(np.abs(errors), 0.9)),
            float(np.mean((low <= found) & (found <= high))),
            (float(np.median(low)), float(np.median(high))),
        )

    def __str__(self) -> str:
        if not self.num:
            return " | "
        errors = f"{100 * self.signed:+.0f}, {100 * self.size:.0f}, {100 * self.p90:.0f}"
        return f"{errors} | {self.inside:.0%} in {below_above(self.bounds)}"


@dataclass(frozen=True)
class Bounds:
    """The 5th and 95th percentile of measured over projected, by kind.

    A kind's own points count one each, and those of all of its framework on that generation of
    cards, and those of all, together as much as `_COARSER` points: where a kind has few, its bounds
    are those of similar kinds. A point whose TTFT is a queue in one of measured and projected is
    left out: its server had fewer places than is known. Output throughput that was not measured
    follows from TTFT and TPOT, so that no bound contradicts another.

    Args:
        points: to fit to, each projected by a fit to others.
    """

    points: Sequence[Point]

    @cached_property
    def _known(self) -> Sequence[Point]:
        """Points without a queue that only one side has."""
        of_ttft = [(each, each.measured.ttft_s / each.played.ttft_s) for each in self.points]
        return [each for each, ratio in of_ttft if 1 / _QUEUE < ratio < _QUEUE]

    def of(self, what: str, point: Point) -> Ratios:
        """Bounds of one point."""
        coarse, finest = point.stages[2], point.stages[-1]
        found, weights = [], []
        for weight, own in (
            (None, [each for each in self._known if each.stages[-1] == finest]),
            (_COARSER, [each for each in self._known if each.stages[2] == coarse]),
            (_COARSER, self._known),
        ):
            of_own = _of_output(own) if what == "output" else ratios(what, own)
            found.append(of_own)
            one = 1.0 if weight is None else weight / max(len(of_own), 1)
            weights.append(np.full(len(of_own), one))
        return _quantiles(np.concatenate(found), np.concatenate(weights))


def _of_output(points: Sequence[Point]) -> np.ndarray:
    """Measured output throughput over projected; from times of requests where it is not known."""
    found = []
    for each in points:
        measured, played = each.measured, each.played
        if measured.output_tps and played.output_tps:
            found.append(measured.output_tps / played.output_tps)
        else:
            further = each.row.load.mean_lens[1] - 1
            request_s = (of.ttft_s + further * of.tpot_s for of in (measured, played))
            found.append(1 / np.divide(*request_s))
    return np.array(found)


def _quantiles(values: np.ndarray, weights: np.ndarray) -> Ratios:
    order = np.argsort(values)
    places = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    low, high = np.interp(_BOUNDS, places, values[order])
    return round(min(float(low), 1.0), 3), round(max(float(high), 1.0), 3)


def by(points: Sequence[Point], key: Callable[[Point], Any]) -> dict[str, list[Point]]:
    """Points of each group, by its name."""
    found: defaultdict[str, list[Point]] = defaultdict(list)
    for point in points:
        name = key(point)
        found[", ".join(filter(None, name)) if isinstance(name, tuple) else str(name)].append(point)
    return dict(sorted(found.items()))


def table(
    groups: Mapping[str, Sequence[Point]], bounds_of: Callable[[str, Point], Ratios]
) -> Iterator[str]:
    """Markdown, a line for each group; errors in percent: median, median absolute, p90."""
    heads = (f"{what}: error, size, p90 | inside" for what in QUANTITIES)
    yield f"| of | rows | points | {' | '.join(heads)} |"
    yield f"| --- | ---: | ---: |{' ---: | --- |' * len(QUANTITIES)}"
    for name, points in groups.items():
        num_rows = sum(each.num_rows for each in points)
        errors = (str(Errors.of(what, points, bounds_of)) for what in QUANTITIES)
        yield f"| {name} | {num_rows} | {len(points)} | {' | '.join(errors)} |"


@dataclass(frozen=True)
class Pair:
    """Two layouts of as many GPUs, at one load.

    Attributes:
        measured, projected: TPOT of the first over the second.
        days: between them.
        counts: whether both are of one version, or were measured at most a week apart.
    """

    points: tuple[Point, Point]
    measured: float
    projected: float
    days: int
    counts: bool


def pairs(points: Sequence[Point]) -> list[Pair]:
    """All pairs of points that differ in layout alone."""
    loads: defaultdict[Any, list[Point]] = defaultdict(list)
    for point in points:
        row = point.row
        loads[*row.kind, row.lengths, row.conc, row.num_devices].append(point)
    return [
        _pair(one, other)
        for same in loads.values()
        for one, other in combinations(same, 2)
        if (one.row.prefill, one.row.decode) != (other.row.prefill, other.row.decode)
    ]


def _pair(one: Point, other: Point) -> Pair:
    first, second = one.row, other.row
    days = 10**6
    if first.date and second.date:
        days = abs((date.fromisoformat(first.date) - date.fromisoformat(second.date)).days)
    has_one_version = bool(first.version) and first.version == second.version
    return Pair(
        (one, other),
        one.measured.tpot_s / other.measured.tpot_s,
        one.played.tpot_s / other.played.tpot_s,
        days,
        has_one_version or days <= _DAYS_APART,
    )


def ratio_bounds(found: Sequence[Pair]) -> float:
    """Half-width of the ratio's 90 % interval, as a logarithm, from pairs of points to fit to."""
    off = [abs(np.log(each.projected / each.measured)) for each in found if each.counts]
    return float(np.quantile(off, 0.9)) if off else float("inf")


def of_pairs(found: Sequence[Pair], half_width: float) -> Iterator[str]:
    """Markdown: how many ratios are inside, and how many verdicts are wrong."""
    counted = [each for each in found if each.counts]
    off = np.array([abs(np.log(each.projected / each.measured)) for each in counted])
    said = [each for each in counted if abs(np.log(each.projected)) > half_width]
    clear = [each for each in said if abs(np.log(each.measured)) > np.log1p(_CLEAR)]
    wrong = [each for each in clear if (each.measured > 1) != (each.projected > 1)]
    yield f"- {len(found)} pairs, of which {len(counted)} count: one version, or a week apart"
    if counted:
        yield f"- inside ±{np.expm1(half_width):.0%}: {np.mean(off <= half_width):.0%}"
        yield f"- median error of the ratio: {np.expm1(np.median(off)):.0%}"
        yield (
            f"- told apart: {len(said)}, of which {len(clear)} differ by {_CLEAR:.0%} as measured; "
            f"{len(wrong)} of them the other way round"
        )
