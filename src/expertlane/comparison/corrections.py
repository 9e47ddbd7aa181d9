"""Corrections of a projection, fitted to measured deployments: `compare --fit-corrections`.

Every measured deployment is projected again, at the step sizes that were measured and under the
client's load, as a plan would and under changed assumptions (`reprojection`). The fit of all
changes gives factors for later projections (`cost.laws.corrections`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, hypot, log
from statistics import median
from typing import NamedTuple

import numpy as np

from expertlane.comparison.fit import MOST_CHANGED, Fit, Fitter
from expertlane.comparison.points import WHOLE, Point, Subject, find_subject, points_of
from expertlane.comparison.reprojection import Reprojection
from expertlane.cost.laws.corrections import Correction, Corrections, FitSource, LawKind
from expertlane.errors import CapacityError, UserError
from expertlane.progress import Progress
from expertlane.results.estimate import NORMAL
from expertlane.results.record import RUN
from expertlane.results.results import Results
from expertlane.spec.names import Phase
from expertlane.spec.ranges import shown

_LEAST = 0.01  # a smaller logarithm of a factor is no correction


class _Number(NamedTuple):
    """A measured number, in seconds or tokens per second, beside its projections."""

    metric: str
    measured: float
    projected: float
    corrected: float


def fit_corrections(
    results: Sequence[Results],
    progress: Progress,
    cluster: str | None = None,
    engine: str | None = None,
) -> Corrections:
    """The corrections that fit measured deployments best.

    Args:
        results: with measured and with projected deployments, in one or in several.
        cluster: the cluster to project on, as `--cluster` takes it; None for the projection's own.
        engine: engine whose deployments are taken, in upper or lower case; None if only one was
            measured.

    Raises:
        UserError: nothing is measured, or nothing is projected; models or devices differ; several
            engines were measured and `engine` is None, or `engine` was not measured.
    """
    measured = [each for each in results if any(each.select(source) for source in RUN)]
    projected = [each for each in results if each.select("projected")] or measured
    if not measured:
        raise UserError(
            "these results have no measured deployments; give results of expertlane compare"
        )
    names = {each.model_name for each in (*measured, *projected)}
    if len(names) > 1:
        raise UserError(f"results are of different models: {', '.join(sorted(names))}")
    subject = find_subject(measured[0], projected[0], cluster)
    points = _of_engine([point for each in measured for point in points_of(each)], engine)
    found = fit_points(subject, points, progress)
    return replace(found, fitted_on=replace(found.fitted_on, created=measured[0].created))


def fit_points(subject: Subject, points: Sequence[Point], progress: Progress) -> Corrections:
    """The corrections of a projection that fit measured deployments best.

    Raises:
        UserError: they have no number to compare, or one does not fit into the cluster's memory.
    """
    reprojection = Reprojection(subject, points)
    if not reprojection.numbers:
        raise UserError("the measured deployments have no numbers that a projection has too")
    progress.task("projecting under changed assumptions", len(reprojection.names) + 2)
    fitter = Fitter(reprojection.measured, reprojection.names, reprojection, reprojection.least)
    try:
        found = fitter.fit(progress.advance)
        if found.changes and any(point.loads for point in points):
            # Simulated once more: the effect of changes on a load was an estimate.
            reprojection.offsets = reprojection.simulated_offsets(found.changes)
            fitter.forget()
            found = fitter.fit()
    except CapacityError as error:
        raise UserError(
            f"a measured deployment does not fit where it is projected: {error}"
        ) from None
    progress.advance()
    progress.done()
    return _corrections(reprojection, found, _compared(reprojection, fitter, found))


def _of_engine(points: Sequence[Point], engine: str | None) -> list[Point]:
    """The deployments of one engine: errors of a projection differ between engines.

    Raises:
        UserError: the engine was not measured, or several were and none is named.
    """
    known = list(dict.fromkeys(each.engine for each in points))
    if engine is None and len(known) > 1:
        raise UserError(
            f"measured on several engines, {', '.join(known)}: corrections are of one; measure "
            "each with a command of its own"
        )
    kept = [each for each in points if engine is None or each.engine.lower() == engine.lower()]
    if not kept:
        raise UserError(f"engine {shown(engine)} was not measured; measured: {', '.join(known)}")
    return kept


def _compared(reprojection: Reprojection, fitter: Fitter, found: Fit) -> list[_Number]:
    """Times of steps and metrics of loads; parts of steps where nothing else was measured."""
    after = fitter.at(found.changes)
    reprojection.offsets = None
    before = reprojection({})
    every = [
        _Number(
            each.metric,
            *(
                reprojection.shown(each, value)
                for value in (each.measured, float(before[at]), float(after[at]))
            ),
        )
        for at, each in enumerate(reprojection.numbers)
    ]
    known = [each for each in every if min(each.measured, each.projected, each.corrected) > 0]
    return [each for each in known if each.metric in WHOLE] or known


def _corrections(reprojection: Reprojection, fit: Fit, compared: Sequence[_Number]) -> Corrections:
    subject, points = reprojection.subject, reprojection.points
    left = float(np.sqrt(np.mean([log(each.measured / each.corrected) ** 2 for each in compared])))
    spans = reprojection.spans(fit.changes)
    factors: dict[str, Correction] = {}
    for name, change in fit.changes.items():
        if abs(change) < _LEAST:
            continue
        away = NORMAL * hypot(fit.deviation[name], left)
        if name == LawKind.SKEW:
            ends = (reprojection.alpha({name: change + each}) for each in (0.0, -away, away))
            factors[name] = Correction(*ends)
            continue
        low, high = exp(max(change - away, -MOST_CHANGED)), exp(min(change + away, MOST_CHANGED))
        factors[name] = Correction(exp(change), low, high, *spans.get(LawKind(name), (None, None)))
    layouts = [point.record.known_layout.world_size for point in points]
    sizes = [each for place, each in reprojection.sizes if each.phase is Phase.DECODE]
    sizes = sizes or [each for _, each in reprojection.sizes]
    on = FitSource(
        model=subject.model.name,
        cluster=subject.cluster.profile.name,
        engine="; ".join(dict.fromkeys(point.software for point in points)),
        deployments=tuple(dict.fromkeys(point.record.name for point in points)),
        num_points=len(reprojection.numbers),
        num_ranks=_ends(layouts),
        num_seqs=_ends([each.num_seqs for each in sizes]),
        context=_ends([each.num_cached for each in sizes]),
        error_before=_error(compared, lambda each: each.projected),
        error_after=_error(compared, lambda each: each.corrected),
        framework=subject.framework or "",
    )
    return Corrections(on, factors)


def _ends(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def _error(numbers: Sequence[_Number], of: Callable[[_Number], float]) -> float:
    """Median relative error of the numbers that `of` gives, against measured ones."""
    return median([abs(each.measured / of(each) - 1) for each in numbers])
