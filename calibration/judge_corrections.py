"""Corrections by three measured points, judged on points that were not used.

Either by public rows. A configuration is a model, card, framework, number type, layout and lengths,
in one pool and without drafts, that was measured at five or more concurrencies. Three of them,
spread evenly, are given to the fit as measured decode steps: TPOT, at as many sequences,
half-way through an output. What prompts add to TPOT is thus part of what is corrected.

Or by results of `expertlane compare`, where each deployment under each workload is a point: all of
its whole numbers are used, times of steps or TPOT, TTFT and tokens/s. What several results have
counts by its median. Which three are fitted is drawn several times, one of few, one of more and one
of many sequences at once; the first draw is printed number by number.

What was not fitted is then projected with the corrections and without, and compared with what was
measured.

    python calibration/judge_corrections.py ../shared/data/*.csv [--most 20]
    python calibration/judge_corrections.py results/* --cluster this-machine.tomlx2 [--draws 10]
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from serving_rows import Row, model_of, read_rows

from expertlane.comparison.corrections import fit_points
from expertlane.comparison.fit import Floats
from expertlane.comparison.points import (
    TIME,
    WHOLE,
    Point,
    StepPoint,
    Subject,
    find_subject,
    points_of,
)
from expertlane.comparison.reprojection import Reprojection
from expertlane.cost.laws.corrections import Corrections, corrected
from expertlane.cost.laws.profile import Execution, ModelledCluster, read_profile
from expertlane.cost.projector import StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import NumberTypes
from expertlane.errors import ExpertlaneError
from expertlane.progress import Progress
from expertlane.results.estimate import Estimate
from expertlane.results.file import read
from expertlane.results.record import DeploymentRecord
from expertlane.results.results import Results
from expertlane.spec.files import strict_json
from expertlane.spec.names import Phase

_LEAST = 5  # concurrencies of a configuration
_NUM_FITTED = 3


def configurations(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by configuration, one for each concurrency, ascending."""
    found: dict[object, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.prefill is None and not row.is_speculative:
            found[row.configuration][row.conc] = row
    alike = ([of[conc] for conc in sorted(of)] for of in found.values())
    return [each for each in alike if len(each) >= _LEAST]


def subject_of(row: Row) -> Subject:
    """What is projected, without a framework's corrections."""
    model, layout = model_of(row.model), row.decode.layout
    alpha = model.usual_skew
    return Subject(
        model,
        ModelledCluster(read_profile(row.hardware), layout.world_size),
        NumberTypes.asked(row.weights, row.kv),
        Execution.GRAPH,
        PowerLawRouting.of(model, alpha, 0, 2),
        alpha,
        None,
    )


def point_of(row: Row) -> Point:
    """The measured TPOT as a decode step."""
    profile = read_profile(row.hardware)
    record = DeploymentRecord(
        f"{row.conc} at once", row.decode.layout, row.options(profile), "measured"
    )
    size = StepSize(row.conc, 1, row.isl + row.osl // 2)
    seconds = Estimate(row.tpot_s)
    step = StepPoint(Phase.DECODE, size, seconds, {}, where="decode step")
    return Point(record, row.framework, row.framework, (step,), (), None)


def errors(rows: Sequence[Row]) -> tuple[list[float], list[float], str]:
    """Of rows that were not fitted to: without corrections and with; and what was corrected."""
    places = np.linspace(0, len(rows) - 1, _NUM_FITTED).round().astype(int).tolist()
    subject = subject_of(rows[0])
    found = fit_points(subject, [point_of(rows[place]) for place in places], Progress())
    others = [row for place, row in enumerate(rows) if place not in places]
    reprojection = Reprojection(subject, [point_of(row) for row in others])
    projected = [
        np.exp(reprojection(changes) - reprojection.measured.values) - 1
        for changes in ({}, reprojection.changes_of(found))
    ]
    before, after = (np.abs(each).tolist() for each in projected)
    factors = found.factors.items()
    return before, after, ", ".join(f"{name} {each.factor:.2f}" for name, each in factors)


class Judged(NamedTuple):
    """A number of a point, in seconds or tokens a second; the median of several measurements."""

    point: str
    metric: str
    measured: float
    before: float
    after: float

    @property
    def errors(self) -> tuple[float, float]:
        """Size of projected over measured, less one: without corrections and with."""
        return abs(self.before / self.measured - 1), abs(self.after / self.measured - 1)


def measured_points(folders: Sequence[Path], engine: str | None) -> dict[str, list[Point]]:
    """By deployment and workload, as often as it was measured; those of few sequences first."""
    found: dict[str, list[Point]] = defaultdict(list)
    for folder in folders:
        results = read(folder)
        workload = results.question["experiment"]["workload"]
        lengths = f"{workload['prompt_len']}+{workload['output_len']}"
        for point in points_of(results):
            if engine is None or point.engine == engine:
                name = f"{point.record.name}, {workload['num_sequences']} of {lengths}"
                found[name].append(point)
    return dict(sorted(found.items(), key=lambda each: _num_seqs(each[1][0])))


def _num_seqs(point: Point) -> int:
    loads = [load.batch or 1 for _, load in point.loads]
    return max([*loads, *(step.size.num_seqs for step in point.steps)])


def repeated(points: Mapping[str, Sequence[Point]]) -> list[float]:
    """Relative differences of steps' times, of each two measurements of the same point."""
    by_step: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, several in points.items():
        for point in several:
            for step in point.steps:
                by_step[name, step.where].append(step.seconds.value)
    pairs = [pair for times in by_step.values() for pair in combinations(times, 2)]
    return [max(pair) / min(pair) - 1 for pair in pairs]


def with_corrections(subject: Subject, corrections: Corrections) -> Subject:
    """What `--corrections` makes of a projection."""
    found = replace(subject, cluster=corrected(subject.cluster, corrections))
    alpha = corrections.skew
    return (
        found if alpha is None else replace(found, routing=subject.routing_at(alpha), alpha=alpha)
    )


def judged(
    subject: Subject, points: Mapping[str, Sequence[Point]], fitted: Sequence[str]
) -> tuple[list[Judged], Corrections]:
    """All numbers of all points, by corrections of some of them."""
    own = [point for name in fitted for point in points[name]]
    found = fit_points(subject, own, Progress())
    named = [(name, point) for name, of_name in points.items() for point in of_name]
    every = [point for _, point in named]
    plain, better = (
        Reprojection(each, every) for each in (subject, with_corrections(subject, found))
    )
    values = np.exp(np.array([plain.measured.values, plain({}), better({})])).T
    by_number: dict[tuple[str, str], list[Floats]] = defaultdict(list)
    for each, of_number in zip(plain.numbers, values, strict=True):
        if each.metric in WHOLE:
            metric = each.where if each.metric == TIME else each.metric
            by_number[named[each.place][0], metric].append(of_number)
    return [
        Judged(*of, *np.median(several, axis=0).tolist()) for of, several in by_number.items()
    ], found


def judge_results(asked: argparse.Namespace) -> None:
    """Print the first draw's numbers, a line for each draw, then the sum; write all draws."""
    results = read(asked.files[0])
    subject = find_subject(results, results, asked.cluster)
    points = measured_points(asked.files, asked.engine)
    apart = repeated(points)
    if apart:
        print(
            f"two measurements of the same number differ by {median(apart):.1%} in the median "
            f"({len(apart)} pairs)"
        )
    rng = np.random.default_rng(0)
    draws, errors = [], []
    for draw in range(asked.draws):
        fitted = [str(rng.choice(part)) for part in np.array_split(list(points), _NUM_FITTED)]
        numbers, found = judged(subject, points, fitted)
        if not draw:
            for each in numbers:
                ratios = f"{each.before / each.measured:6.2f} {each.after / each.measured:6.2f}"
                mark = " fitted" if each.point in fitted else ""
                print(f"{each.point:28} {each.metric:14} {each.measured:9.4g} {ratios}{mark}")
        others = np.array([each.errors for each in numbers if each.point not in fitted])
        before, after = np.median(others, axis=0).tolist()
        errors.append((before, after))
        factors = {name: round(each.factor, 3) for name, each in found.factors.items()}
        told = ", ".join(f"{name} {factor:.2f}" for name, factor in factors.items())
        by = "; ".join(fitted)
        said = _said(before, after)
        print(f"{before:.1%} → {after:.1%}{said} | fitted to {by} | {told}", flush=True)
        after_all = [float(f"{each.after:.4g}") for each in numbers]
        draws.append({"fitted": fitted, "factors": factors, "after": after_all})
    good = sum(not _said(*each) for each in errors)
    before, after = np.median(np.array(errors), axis=0).tolist()
    print(
        f"{len(points)} points, {asked.draws} draws of three: halved or within 5 % in {good}; "
        f"median error of what was not fitted {before:.1%} → {after:.1%}"
    )
    if asked.json is not None:
        asked.json.write_text(strict_json(_data(results, subject, points, numbers, draws)) + "\n")


def _data(
    results: Results,
    subject: Subject,
    points: Mapping[str, Sequence[Point]],
    numbers: Sequence[Judged],
    draws: Sequence[object],
) -> dict[str, object]:
    """What is kept: `after` of each draw is in the order of the numbers."""
    (first, *_), *_ = points.values()
    rows = [(*each[:2], *(float(f"{value:.4g}") for value in each[2:4])) for each in numbers]
    return {
        "created": results.created,
        "cpu": results.machine.cpu_name if results.machine else "",
        "engine": first.software,
        "cluster": str(subject.cluster),
        "point, metric, measured, before": rows,
        "draws": draws,
    }


def _said(before: float, after: float) -> str:
    return "" if after <= max(before / 2, 0.05) else " (not halved)"


def main() -> None:
    """Judge rows by configuration, or results, as files are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="CSV files, or results of compare")
    parser.add_argument("--most", type=int, default=1000, help="configurations, of rows")
    parser.add_argument("--cluster", help="that results are projected on")
    parser.add_argument("--engine", help="whose points count, of results")
    parser.add_argument("--draws", type=int, default=10, help="of three points, of results")
    parser.add_argument("--json", type=Path, help="file for all draws, of results")
    asked = parser.parse_args()
    (judge_results if asked.cluster else judge_rows)(asked)


def judge_rows(asked: argparse.Namespace) -> None:
    """Print a line for each configuration, then the sum."""
    rows, _ = read_rows(asked.files)
    halved = total = 0
    all_before, all_after = [], []
    for of_one in configurations(rows)[: asked.most]:
        first = of_one[0]
        name = f"{first.model} {first.hardware} {first.framework} {first.weights} {first.decode}"
        try:
            before, after, factors = errors(of_one)
        except ExpertlaneError as error:
            print(f"{name}: {error}")
            continue
        all_before += before
        all_after += after
        total += 1
        said = _said(median(before), median(after))
        halved += not said
        print(
            f"{name}, {first.isl}/{first.osl}, {len(before)} rows: {median(before):.1%} → "
            f"{median(after):.1%}{said} | {factors}",
            flush=True,
        )
    if not total:
        print(f"0 configurations were measured at {_LEAST} concurrencies or more")
        return
    print(
        f"{total} configurations: halved or within 5 % in {halved}; of {len(all_before)} rows the "
        f"median error {median(all_before):.1%} → {median(all_after):.1%}"
    )


if __name__ == "__main__":
    main()
