"""Corrections by three public measurements of a configuration, judged on its others.

A configuration is a model, card, framework, number type, layout and lengths, in one pool and
without drafts, that was measured at five or more concurrencies. Three of them, spread evenly, are
given to `expertlane judge` as measured decode steps: TPOT, at as many sequences, half-way through
an output. What prompts add to TPOT is thus part of what is corrected. Then TPOT of the others is
projected with these corrections and without, and compared with what was measured.

    python calibration/judge_corrections.py ../shared/data/*.csv [--most 20]
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from serving_rows import Row, model_of, read_rows

from expertlane.comparison.judge import judge_points
from expertlane.comparison.reprojection import Point, Reprojection, StepPoint, Subject
from expertlane.cost.laws.profile import Execution, ModelledCluster, read_profile
from expertlane.cost.projector import StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import NumberTypes
from expertlane.errors import ExpertlaneError
from expertlane.progress import Progress
from expertlane.results.estimate import Estimate
from expertlane.results.record import DeploymentRecord
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload

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
        Workload(1, row.isl, row.osl),
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
    found = judge_points(subject, [point_of(rows[place]) for place in places], Progress())
    others = [row for place, row in enumerate(rows) if place not in places]
    reprojection = Reprojection(subject, [point_of(row) for row in others])
    projected = [
        np.exp(reprojection(changes) - reprojection.measured.values) - 1
        for changes in ({}, reprojection.changes_of(found.corrections))
    ]
    before, after = (np.abs(each).tolist() for each in projected)
    factors = found.corrections.factors.items()
    return before, after, ", ".join(f"{name} {each.factor:.2f}" for name, each in factors)


def main() -> None:
    """Print a line for each configuration, then the sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--most", type=int, default=1000, help="configurations")
    asked = parser.parse_args()
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
        is_good = median(after) <= max(median(before) / 2, 0.05)
        halved += is_good
        print(
            f"{name}, {first.isl}/{first.osl}, {len(before)} rows: {median(before):.1%} → "
            f"{median(after):.1%}{'' if is_good else ' (not halved)'} | {factors}",
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
