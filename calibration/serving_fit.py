"""What is fitted to half of the configurations: two numbers of each kind of serving.

A kind's steps take a factor of what laws give, and its requests a time to arrive. They are
fitted stage by stage: all rows, the framework, its generation of cards, the model, the card and
type of weights, drafts. Each stage adds the median of the remaining error, shrunk where points are
few.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from serving_rows import Row, model_of

from expertlane.cost.laws.frameworks import Fitted, JudgedGroup, frameworks, kinds_of

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

    def corrected(self, fitted: Fitted) -> "Point":
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

    by_stage: dict[tuple[str, ...], Fitted] = field(default_factory=dict)

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

    def of(self, row: Row) -> Fitted:
        """Numbers of the narrowest kind that is known."""
        known = [self.by_stage[key] for key in stages_of(row) if key in self.by_stage]
        return known[-1] if known else Fitted()

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

    def _before(self, name: str, key: tuple[str, ...], point: Point) -> Fitted:
        """The kind's numbers, with `name` still as the coarser kind has it."""
        stages = point.stages
        coarser = [each for each in stages[: stages.index(key)] if each in self.by_stage]
        known = self.by_stage[coarser[-1]] if coarser else Fitted()
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


def write(fitted: Sequence[Fitted], judged: Sequence[JudgedGroup], path: Path) -> None:
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
