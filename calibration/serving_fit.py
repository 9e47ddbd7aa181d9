"""What is fitted to half of the configurations: two numbers of each kind of serving.

A kind's steps take a factor of what laws give, and its requests a time to arrive. They are
fitted stage by stage: all rows, the framework, its generation of cards, the model, the card and
type of weights, drafts. Each stage adds the median of the remaining error, shrunk where points are
few.

The rest is how far the model is off on measurements: by kind, and in the ratio of two layouts.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property
from itertools import combinations
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from serving_rows import Row, model_of

from expertlane.cost.laws.frameworks import ErrorGroup, FrameworkFit, frameworks, kinds_of
from expertlane.results.hardware import below_above

_SHRINKING = 4.0  # points that weigh as much as what coarser stages say
_NUMBERS = ("step_factor", "arrival_s")  # found in this order
_LONGEST_ARRIVAL_S = 0.5  # what is longer is a queue, of which a number says nothing
_NUM_PARTS = 10
_ARRAY = re.compile(r"= \[\n[^][]*\]")  # over several lines
_ARRIVALS_S = np.arange(-0.1, 1.0, 0.005)


@dataclass(frozen=True)
class Sides:
    """Rows to fit to, and rows to judge by."""

    fitted: list[Row]
    judged: list[Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Sides":
        """Every second configuration of each kind, in the order of a hash, with rows of all loads.

        The hash also says which side the first one is on.
        """
        of_kind: defaultdict[Any, set[Any]] = defaultdict(set)
        for row in rows:
            of_kind[row.kind].add(row.configuration)
        chosen = set()
        for each in of_kind.values():
            ordered = sorted(each, key=_hash_of)
            chosen |= set(ordered[_hash_of(ordered[0])[0] % 2 :: 2])
        return cls(
            [row for row in rows if row.configuration in chosen],
            [row for row in rows if row.configuration not in chosen],
        )


def _hash_of(configuration: Any) -> bytes:
    return hashlib.sha256(str(configuration).encode()).digest()


def acceptances(rows: Sequence[Row]) -> dict[tuple[str, int, int], float]:
    """How often a draft is right, by framework, drafts and output length, from rows to fit to.

    SGLang's rows do not record it; its drafts are taken to be as good as TensorRT-LLM's.
    """
    seen: defaultdict[tuple[str, int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.tokens_seen is not None and row.tokens_seen > 1:
            seen[row.framework, row.num_drafts, row.osl].append(row.tokens_seen)
    found = {key: _acceptance(float(np.median(each)), key[1]) for key, each in seen.items()}
    for (name, drafts, osl), value in list(found.items()):
        if name == "trt":
            found["sglang", drafts, osl] = value
    return found


def tokens_per_step(row: Row, known: Mapping[tuple[str, int, int], float]) -> float:
    """Output tokens per step, by the acceptance of the row's kind or the nearest one."""
    if not row.is_speculative:
        return 1.0

    def distance(key: tuple[str, int, int]) -> tuple[bool, bool, bool]:
        return key[1] != row.num_drafts, key[2] != row.osl, key[0] != row.framework

    accepted = known[min(sorted(known), key=distance)]
    return float(sum(accepted**place for place in range(row.num_drafts + 1)))


def _acceptance(tokens: float, num_drafts: int) -> float:
    """The probability with which so many drafts give so many tokens a step."""
    grid = np.linspace(0.0, 1.0, 1001)
    given = sum(grid**place for place in range(num_drafts + 1))
    return float(grid[np.abs(given - tokens).argmin()])


@dataclass(frozen=True)
class Times:
    """TPOT and TTFT in seconds, output tokens/s per decoding GPU; None if unknown."""

    tpot_s: float
    ttft_s: float
    output_tps: float | None


@dataclass(frozen=True)
class Point:
    """Repeats of a measurement together, by their medians, and their replay.

    Attributes:
        row: the first.
        num_rows: that are repeats of it.
    """

    row: Row
    measured: Times
    played: Times
    is_fitted: bool
    num_rows: int

    @cached_property
    def stages(self) -> Sequence[tuple[str, ...]]:
        """Kinds that it is of, from the coarsest to the finest."""
        return stages_of(self.row)

    def corrected(self, fitted: FrameworkFit) -> "Point":
        """With a kind's factor and time to arrive, on which all times are linear."""
        played, further = self.played, self.row.load.mean_lens[1] - 1
        tpot_s = fitted.step_factor * played.tpot_s
        ttft_s = max(fitted.step_factor * played.ttft_s + fitted.arrival_s, 1e-3)
        output = played.output_tps
        if output is not None:
            before_s = played.ttft_s + further * played.tpot_s
            output *= before_s / (ttft_s + further * tpot_s)
        return replace(self, played=Times(tpot_s, ttft_s, output))


def stages_of(row: Row) -> Sequence[tuple[str, ...]]:
    """Kinds that a row is of, as `kinds_of` has them."""
    model = model_of(row.model)
    return kinds_of(row.framework, row.hardware, model, row.weights, has_drafts=row.is_speculative)


@dataclass
class Fit:
    """Fitted numbers by kind."""

    by_stage: dict[tuple[str, ...], FrameworkFit] = field(default_factory=dict)

    @classmethod
    def to(cls, points: Sequence[Point]) -> "Fit":
        """Fit step factors, then arrival times."""
        fit = cls()
        for name in _NUMBERS:
            groups: defaultdict[tuple[str, ...], list[Point]] = defaultdict(list)
            for point in points:
                for key in point.stages:
                    groups[key].append(point)
            for key in sorted(groups, key=len):
                coarser = [each for each in groups if each == key[: len(each)] != key]
                # A kind with all points of a coarser one would move by the same error twice.
                if all(len(groups[each]) > len(groups[key]) for each in coarser):
                    fit._add(name, key, groups[key])
        return fit

    def of(self, row: Row) -> FrameworkFit:
        """Numbers of the narrowest kind that is known."""
        known = [self.by_stage[key] for key in stages_of(row) if key in self.by_stage]
        return known[-1] if known else FrameworkFit()

    def _add(self, name: str, key: tuple[str, ...], own: Sequence[Point]) -> None:
        # Nothing finer than this stage is known yet of this number.
        before = [self._before(name, key, point) for point in own]
        corrected = [point.corrected(each) for point, each in zip(own, before, strict=True)]
        ratios = np.array([point.measured.tpot_s / point.played.tpot_s for point in corrected])
        share = len(own) / (len(own) + _SHRINKING)
        known = self.by_stage.get(key, before[0])
        if name == "step_factor":
            value = before[0].step_factor * exp(share * float(np.median(np.log(ratios))))
        else:
            value = before[0].arrival_s + share * _lacking_s(corrected)
            value = min(max(value, 0.0), _LONGEST_ARRIVAL_S)
        self.by_stage[key] = replace(known, kind=key, num_points=len(own), **{name: value})

    def _before(self, name: str, key: tuple[str, ...], point: Point) -> FrameworkFit:
        """The kind's numbers, with `name` still as the coarser kind has it."""
        stages = point.stages
        coarser = [each for each in stages[: stages.index(key)] if each in self.by_stage]
        known = self.by_stage[coarser[-1]] if coarser else FrameworkFit()
        if name == "step_factor":
            return known
        own = self.by_stage[key]
        return replace(own, arrival_s=known.arrival_s)


def _lacking_s(points: Sequence[Point]) -> float:
    """Change of TTFT, in seconds, with the least median error."""
    measured, played = np.array([(each.measured.ttft_s, each.played.ttft_s) for each in points]).T
    with_each = np.maximum(played + _ARRIVALS_S[:, None], 1e-3)
    off = np.median(np.abs(np.log(with_each / measured)), axis=1)
    return float(_ARRIVALS_S[off.argmin()])


def out_of_sample(points: Sequence[Point]) -> list[Point]:
    """Points to fit to, each corrected by a fit to configurations other than its own."""
    parts: list[list[Point]] = [[] for _ in range(_NUM_PARTS)]
    for point in points:
        parts[_hash_of(point.row.configuration)[1] % _NUM_PARTS].append(point)
    found = []
    for number, part in enumerate(parts):
        fit = Fit.to(
            [each for place in range(_NUM_PARTS) if place != number for each in parts[place]]
        )
        found += [point.corrected(fit.of(point.row)) for point in part]
    return found


def write(fitted: Sequence[FrameworkFit], judged: Sequence[ErrorGroup], path: Path) -> None:
    """Write frameworks.toml."""
    rounded = [
        replace(
            each,
            step_factor=float(f"{each.step_factor:.3g}"),
            arrival_s=float(f"{each.arrival_s:.2g}"),
        )
        for each in fitted
    ]
    data = {
        "frameworks": {name: asdict(each) for name, each in frameworks().items()},
        "fitted": [asdict(each) for each in rounded],
        "judged": [asdict(each) for each in judged],
    }
    text = _ARRAY.sub(lambda each: " ".join(each[0].split()), tomli_w.dumps(data))
    path.write_text(text.replace("[ ", "[").replace(", ]", "]"), encoding="utf-8")


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
