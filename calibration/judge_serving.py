"""Judge projections by public serving benchmarks, replayed on steps that the cost model prices.

python calibration/judge_serving.py FILE…           errors on the half that was not fitted
python calibration/judge_serving.py FILE… --write   also write frameworks.toml

FILE: public end-to-end measurements as CSV; `serving_rows.py` says what is taken for granted of
them. Prints Markdown. What was priced stays in build/judge_steps.jsonl until the model changes, so
that an interrupted run goes on.
"""

import argparse
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from serving_fit import (
    FEWEST,
    QUANTITIES,
    Bounds,
    Errors,
    Fit,
    Point,
    Ratios,
    Sides,
    Times,
    acceptances,
    by,
    of_pairs,
    out_of_sample,
    pairs,
    ratio_bounds,
    ratios,
    table,
    tokens_per_step,
    write,
)
from serving_replay import Priced, play, price, scheduling_of
from serving_rows import Row, model_of, read_rows

from expertlane.cost.laws.frameworks import FILE, ErrorGroup, FrameworkFit, attention_of, sizes_of


def main() -> int:
    """Price, replay, fit and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true", help="also write frameworks.toml")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    asked = parser.parse_args()
    rows, unknown = read_rows(asked.files)
    sides = Sides.of(rows)
    found = played_points(rows, sides, asked.jobs)
    points, refused = found.points, found.refused
    fit = Fit.to(_to_fit(points))
    to_fit = out_of_sample(_to_fit(points))
    bounds = Bounds(to_fit)
    judged = [each for each in points if not each.is_fitted]
    corrected = [point.corrected(fit.of(point.row)) for point in judged]
    print(f"{len(rows)} rows, {len(points)} points; {len(judged)} points are judged.")
    print(f"\n{found.seconds_of_row:.3f} CPU seconds a row.")
    _print("With nothing fitted", judged, bounds)
    _print("With what was fitted to the other half", corrected, bounds)
    print("\nFitted to other kinds only:\n")
    print("\n".join(table({"all": _without_own_kind(points)}, bounds.of)))
    print("\nPairs of layouts, neither fitted to its own configuration:\n")
    print("\n".join(of_pairs(pairs([*to_fit, *corrected]), ratio_bounds(pairs(to_fit)))))
    print(f"\nLeft out: {len(unknown)} rows of unknown layouts; {len(refused)} refused:")
    _print_refused(refused)
    fitted = sorted(fit.by_stage.values(), key=lambda each: each.kind)
    _print_fitted(fitted)
    if asked.write:
        groups = (
            *_groups(corrected, bounds, _own),
            *_groups(judged, Bounds(_to_fit(points)), _none),
        )
        write(fitted, groups, FILE)
    return 0


@dataclass(frozen=True)
class Played:
    """Rows projected with nothing fitted.

    Attributes:
        points: repeats together.
        refused: rows, with why.
        seconds_of_row: of CPU, with pricing its steps.
    """

    points: Sequence[Point]
    refused: Sequence[tuple[Row, str]]
    seconds_of_row: float


def played_points(rows: Sequence[Row], sides: Sides, jobs: int) -> Played:
    """All rows but those of models or layouts that cannot be projected."""
    accepted, chosen = acceptances(sides.fitted), {row.configuration for row in sides.fitted}
    repeats: defaultdict[Any, list[Row]] = defaultdict(list)
    refused, priced_of, all_priced = [], {}, price(rows, jobs)
    for row, priced in zip(rows, all_priced, strict=True):
        if priced.refused:
            refused.append((row, priced.refused))
        else:
            repeats[row.point].append(row)
            priced_of[row.point] = priced
    asked = [
        (same[0], priced_of[key], tokens_per_step(same[0], accepted))
        for key, same in repeats.items()
    ]
    with multiprocessing.Pool(jobs) as pool:
        played = pool.starmap(_played, asked, chunksize=8)
    points = []
    for same, (times, _) in zip(repeats.values(), played, strict=True):
        outputs = [row.output_tps for row in same if row.output_tps is not None]
        measured = Times(
            float(np.median([row.tpot_s for row in same])),
            float(np.median([row.ttft_s for row in same])),
            float(np.median(outputs)) if outputs else None,
        )
        is_fitted = same[0].configuration in chosen
        points.append(Point(same[0], measured, times, is_fitted, len(same)))
    seconds = sum({id(each): each.seconds for each in all_priced}.values())
    seconds += sum(seconds for _, seconds in played)
    return Played(points, refused, seconds / len(rows))


def _played(row: Row, priced: Priced, tokens: float) -> tuple[Times, float]:
    """What a row's client sees, and seconds of CPU that this took."""
    begin = time.process_time()
    assert priced.steps is not None, "refused rows are not played"
    seen = play(row, priced.steps, scheduling_of(row), tokens)
    average = np.mean if row.has_means else np.median
    replicas = row.decode.num if row.prefill is None else 1
    gpus = row.decode.layout.world_size / replicas
    times = Times(
        float(average(seen.tpot_s)),
        float(average(seen.ttft_s)),
        seen.num_tokens / seen.total_s / gpus,
    )
    return times, time.process_time() - begin


def _without_own_kind(points: Sequence[Point]) -> list[Point]:
    """Judged points, each corrected by a fit without its own kind."""
    found = []
    for kind in sorted({point.row.kind for point in points}):
        others = [each for each in points if each.is_fitted and each.row.kind != kind]
        fit = Fit.to(others)
        found += [
            point.corrected(fit.of(point.row))
            for point in points
            if not point.is_fitted and point.row.kind == kind
        ]
    return found


def _to_fit(points: Sequence[Point]) -> list[Point]:
    """Points to fit to, projected with nothing fitted."""
    return [point for point in points if point.is_fitted]


def _own(row: Row) -> str:
    return row.framework


def _none(row: Row) -> str:
    return ""


def _groups(
    points: Sequence[Point], bounds: Bounds, framework_of: Callable[[Row], str]
) -> Iterator[ErrorGroup]:
    """Judged kinds of `FEWEST` rows and more."""

    def kind_of(point: Point) -> tuple[str, str, str, bool, bool, str]:
        model, hardware, weights, _, has_two_pools, has_drafts = point.row.kind
        return model, hardware, weights, has_two_pools, has_drafts, framework_of(point.row)

    for kind in sorted({kind_of(point) for point in points}):
        own = [point for point in points if kind_of(point) == kind]
        num_rows = sum(each.num_rows for each in own)
        if num_rows < FEWEST:
            continue
        name, *others = kind
        sizes = {what: np.abs(1 / ratios(what, own) - 1) for what in QUANTITIES}
        ranges = {what: _widest(what, own, bounds) for what in QUANTITIES}
        dates = sorted(each.row.date for each in own if each.row.date)
        has_output = len(sizes["output"]) > 0
        tpot, ttft = (round(float(np.median(sizes[what])), 3) for what in ("TPOT", "TTFT"))
        yield ErrorGroup(
            *others,
            num_rows,
            tpot,
            round(float(np.median(sizes["output"])), 3) if has_output else tpot,
            ttft,
            ranges["TPOT"],
            ranges["output"],
            ranges["TTFT"],
            name,
            sizes_of(model_of(name)),
            attention_of(model_of(name)),
            (dates[0], dates[-1]) if dates else ("", ""),
            max(each.row.most_ranks for each in own),
        )


def _widest(what: str, points: Sequence[Point], bounds: Bounds) -> Ratios:
    """The widest bounds among the points' kinds."""
    low, high = zip(*(bounds.of(what, each) for each in points), strict=True)
    return min(low), max(high)


def _print(title: str, points: Sequence[Point], bounds: Bounds) -> None:
    print(f"\n{title}:\n")
    of_cell = by(points, _cell)
    cells = {
        name: own for name, own in of_cell.items() if sum(each.num_rows for each in own) >= FEWEST
    }
    print("\n".join(table({"all": points, **cells}, bounds.of)))
    for what in QUANTITIES:
        sizes = [
            (Errors.of(what, own, bounds.of).size, name)
            for name, own in cells.items()
            if len(ratios(what, own))
        ]
        if sizes:
            size, name = max(sizes)
            print(f"\nWorst of ten rows and more, {what}: {size:.0%}, {name}")


def _cell(point: Point) -> tuple[str, str, str, str]:
    row = point.row
    return row.model, row.hardware, row.framework, "drafts" if row.is_speculative else ""


def _print_refused(refused: Sequence[tuple[Row, str]]) -> None:
    groups: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row, why in refused:
        groups[row.model, row.hardware, why].append(row.id)
    print()
    for (model, hardware, why), ids in sorted(groups.items()):
        print(f"- {len(ids)} of {model} on {hardware}: {why}")


def _print_fitted(fitted: Sequence[FrameworkFit]) -> None:
    print("\n| kind | points | step-time factor | arrival delay |")
    print("| --- | ---: | ---: | ---: |")
    for each in fitted:
        kind = ", ".join(each.kind) or "all"
        numbers = f"{each.num_points} | {each.step_factor:.2f} | {1e3 * each.arrival_s:.0f} ms"
        print(f"| {kind} | {numbers} |")


if __name__ == "__main__":
    sys.exit(main())
