"""Compare measured with projected numbers, and find the wrong assumption: `expertlane judge`.

Every measured deployment is projected again, at the step sizes that were measured and under the
client's load: first as a plan would, then under changed assumptions (`reprojection`). `explained`
finds the change that explains most of the difference, and fits all changes together. The fit gives
corrections for later projections (`cost.laws.corrections`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import exp, hypot, log
from statistics import median
from typing import NamedTuple

import numpy as np

from expertlane.comparison.explained import MOST_CHANGED, Explained, Explainer, Single
from expertlane.comparison.judged import (
    EXPERTS_LOAD,
    TPS,
    UNKNOWN,
    WHOLE,
    Point,
    Subject,
    find_subject,
    points_of,
)
from expertlane.comparison.reprojection import Reprojection
from expertlane.cost.laws.corrections import Assumed, Correction, Corrections, FittedOn
from expertlane.errors import CapacityError, UserError
from expertlane.progress import Progress
from expertlane.results.estimate import NORMAL
from expertlane.results.file import Row
from expertlane.results.record import RUN
from expertlane.results.results import FOREIGN_LOAD, Results
from expertlane.spec.names import Phase
from expertlane.spec.ranges import shown

_TOLD = 0.01  # a smaller logarithm of a factor is no correction
_MUCH = 0.05  # share of a step in unknown kernels, or of prompts, from which on there is a caution


@dataclass(frozen=True)
class JudgedNumber:
    """A number of a deployment: measured, projected, and projected with corrections.

    Attributes:
        where: phase of a step, or the load.
        metric: one of `WHOLE`, a cause of a step's time, or `EXPERTS_LOAD`.
        measured, projected, corrected: seconds, tokens per second, or the ratio `EXPERTS_LOAD`.
    """

    deployment: str
    where: str
    metric: str
    measured: float
    projected: float
    corrected: float

    @property
    def ratio(self) -> float:
        """Measured over projected."""
        return self.measured / self.projected

    @property
    def is_whole(self) -> bool:
        """True for the time of a step and for metrics of a load; False for a part of a step."""
        return self.metric in WHOLE


def compared(numbers: Sequence[JudgedNumber]) -> list[JudgedNumber]:
    """The numbers that the error is computed from: whole ones, else parts of steps."""
    known = [each for each in numbers if min(each.measured, each.projected, each.corrected) > 0]
    return [each for each in known if each.is_whole] or known


class Term(NamedTuple):
    """A part of a step's time, in seconds; the mean over deployments.

    Attributes:
        name: the cause.
        where: phase of the step.
    """

    name: str
    where: str
    measured_s: float
    projected_s: float
    corrected_s: float


@dataclass(frozen=True)
class Candidate:
    """An assumption, and how much of the difference it explains by itself.

    Attributes:
        factor: best factor on its time; for routing skew, the best exponent.
        was: factor or exponent of the projection.
        explained: share of the sum of squared logarithmic differences that it removes.
        confidence: its weight among all assumptions; they sum to 1.
    """

    name: str
    label: str
    factor: float
    was: float
    explained: float
    confidence: float


@dataclass(frozen=True)
class Judgement:
    """The comparison of measured with projected numbers, and what explains their difference.

    Attributes:
        source: `measured`, `virtual` or both: clocks of the measured numbers.
        numbers: every number that was compared.
        candidates: assumptions that change any number, the likeliest first.
        likeliest: names of the likeliest assumptions; several if these numbers do not decide.
        is_noise: True if the difference is no larger than between repeated measurements.
        without_effect: labels of assumptions that change no number.
        confounded: pairs of labels of assumptions that change all numbers in the same proportions.
        corrections: the fit of all assumptions together.
        cautions: sentences.
        has_terms: True if parts of a step's time were measured.
    """

    model: str
    cluster: str
    engine: str
    source: str
    numbers: tuple[JudgedNumber, ...]
    candidates: tuple[Candidate, ...]
    likeliest: tuple[str, ...]
    is_noise: bool
    without_effect: tuple[str, ...]
    confounded: tuple[tuple[str, str], ...]
    corrections: Corrections
    cautions: tuple[str, ...] = ()
    has_terms: bool = field(default=False)

    @property
    def whole(self) -> tuple[JudgedNumber, ...]:
        """Times of steps, and metrics of loads."""
        return tuple(each for each in self.numbers if each.is_whole)

    @property
    def terms(self) -> tuple["Term", ...]:
        """Parts of a step's time, as means over the deployments that have them."""
        found: dict[tuple[str, str], list[JudgedNumber]] = {}
        for each in self.numbers:
            if not each.is_whole and each.metric != EXPERTS_LOAD:
                found.setdefault((each.metric, each.where), []).append(each)
        return tuple(
            Term(
                name,
                where,
                *(
                    sum(getattr(each, of) for each in numbers) / len(numbers)
                    for of in ("measured", "projected", "corrected")
                ),
            )
            for (name, where), numbers in found.items()
        )

    @property
    def ratio(self) -> float:
        """Median of measured over projected time, over the numbers of `compared`."""
        return exp(
            median(
                (-1 if each.metric == TPS else 1) * log(each.ratio)
                for each in compared(self.numbers)
            )
        )


def judge(
    results: Sequence[Results],
    progress: Progress,
    cluster: str | None = None,
    engine: str | None = None,
) -> Judgement:
    """Compare measured with projected numbers, and find what explains their difference.

    Args:
        results: with measured and with projected deployments, in one or in several.
        cluster: the cluster to project on, as `--cluster` takes it; None for the projection's own.
        engine: engine whose deployments are judged, in upper or lower case; None if only one engine
            was measured.

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
    every = [point for each in measured for point in points_of(each)]
    points = _of_engine(every, engine)
    found = judge_points(subject, points, progress)
    on = replace(found.corrections.fitted_on, created=measured[0].created)
    return replace(
        found,
        corrections=replace(found.corrections, fitted_on=on),
        cautions=tuple(_cautions(measured, points)),
    )


def judge_points(subject: Subject, points: Sequence[Point], progress: Progress) -> Judgement:
    """Judge a projection by measured deployments.

    Args:
        subject: the projection.
        points: the measured deployments.

    Raises:
        UserError: they have no number to compare, or one does not fit into the cluster's memory.
    """
    reprojection = Reprojection(subject, points)
    if not reprojection.numbers:
        raise UserError("the measured deployments have no numbers that a projection has too")
    progress.task("projecting under changed assumptions", len(reprojection.names) + 2)
    explainer = Explainer(
        reprojection.measured, reprojection.names, reprojection, reprojection.least
    )
    try:
        found = explainer.explain(progress.advance)
        if any(point.loads for point in points) and found.singles:
            found = _fitted_again(explainer, reprojection, found)
    except CapacityError as error:
        raise UserError(
            f"a measured deployment does not fit where it is projected: {error}"
        ) from None
    progress.advance()
    progress.done()
    return _judgement(reprojection, explainer, found)


def _of_engine(points: Sequence[Point], engine: str | None) -> list[Point]:
    """The deployments of one engine: errors of a projection differ between engines.

    Raises:
        UserError: the engine was not measured, or several were and none is named.
    """
    known = list(dict.fromkeys(each.engine for each in points))
    if engine is None and len(known) > 1:
        raise UserError(
            f"measured on several engines, {', '.join(known)}: judge one at a time, "
            f"--of-engine {shown(known[0])}"
        )
    kept = [each for each in points if engine is None or each.engine.lower() == engine.lower()]
    if not kept:
        raise UserError(
            f"--of-engine {shown(engine)} was not measured; measured: {', '.join(known)}"
        )
    return kept


def _fitted_again(explainer: Explainer, reprojection: Reprojection, found: Explained) -> Explained:
    """The fit of all together, repeated after simulating loads under its first result."""
    reprojection.offsets = reprojection.simulated_offsets(found.together.changes)
    explainer.forget()
    return replace(found, together=explainer.together(found.singles))


def _judgement(
    reprojection: Reprojection,
    explainer: Explainer,
    found: Explained,
) -> Judgement:
    after = explainer.at(found.together.changes)
    reprojection.offsets = None
    before = reprojection({})
    numbers = tuple(
        JudgedNumber(
            reprojection.points[each.place].record.name,
            each.where,
            each.metric,
            *(
                reprojection.shown(each, value)
                for value in (each.measured, float(before[at]), float(after[at]))
            ),
        )
        for at, each in enumerate(reprojection.numbers)
    )
    subject = reprojection.subject
    points = reprojection.points
    sources = dict.fromkeys(point.record.source for point in points)
    corrections = _corrections(reprojection, found, numbers)
    return Judgement(
        model=subject.model.name,
        cluster=str(subject.cluster),
        engine=corrections.fitted_on.engine,
        source=" and ".join(sources),
        numbers=numbers,
        candidates=tuple(_candidate(each, reprojection) for each in found.singles),
        likeliest=tuple(each.name for each in found.likeliest),
        is_noise=found.is_noise,
        without_effect=tuple(Assumed(each).label for each in found.without_effect),
        confounded=tuple(
            (Assumed(one).label, Assumed(other).label) for one, other in found.together.confounded
        ),
        corrections=corrections,
        has_terms=any(step.terms_s for point in points for step in point.steps),
    )


def _candidate(single: Single, reprojection: Reprojection) -> Candidate:
    changes = {single.name: single.change}
    is_skew = single.name == Assumed.SKEW
    return Candidate(
        single.name,
        Assumed(single.name).label,
        reprojection.alpha(changes) if is_skew else exp(single.change),
        reprojection.alpha({}) if is_skew else 1.0,
        single.explained,
        single.weight,
    )


def _corrections(
    reprojection: Reprojection,
    found: Explained,
    numbers: Sequence[JudgedNumber],
) -> Corrections:
    subject, points, fit = reprojection.subject, reprojection.points, found.together
    whole = compared(numbers)
    left = float(np.sqrt(np.mean([log(each.measured / each.corrected) ** 2 for each in whole])))
    spans = reprojection.spans(fit.changes)
    factors: dict[str, Correction] = {}
    for name, change in fit.changes.items():
        if abs(change) < _TOLD:
            continue
        away = NORMAL * hypot(fit.deviation[name], left)
        if name == Assumed.SKEW:
            ends = (reprojection.alpha({name: change + each}) for each in (0.0, -away, away))
            factors[name] = Correction(*ends)
            continue
        low, high = exp(max(change - away, -MOST_CHANGED)), exp(min(change + away, MOST_CHANGED))
        factors[name] = Correction(exp(change), low, high, *spans.get(Assumed(name), (None, None)))
    layouts = [point.record.known_layout.world_size for point in points]
    sizes = [each for place, each in reprojection.sizes if each.phase is Phase.DECODE]
    sizes = sizes or [each for _, each in reprojection.sizes]
    on = FittedOn(
        model=subject.model.name,
        cluster=subject.cluster.profile.name,
        engine="; ".join(dict.fromkeys(point.software for point in points)),
        deployments=tuple(dict.fromkeys(point.record.name for point in points)),
        num_points=len(numbers),
        num_ranks=_ends(layouts),
        num_seqs=_ends([each.num_seqs for each in sizes]),
        context=_ends([each.num_cached for each in sizes]),
        error_before=_error(whole, lambda each: each.projected),
        error_after=_error(whole, lambda each: each.corrected),
        framework=subject.framework or "",
    )
    return Corrections(on, factors)


def _ends(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def _error(numbers: Sequence[JudgedNumber], of: Callable[[JudgedNumber], float]) -> float:
    """Median relative error of the numbers that `of` gives, against measured ones."""
    return median([abs(each.measured / of(each) - 1) for each in numbers])


def _cautions(measured: Sequence[Results], points: Sequence[Point]) -> Iterator[str]:
    if any(point.record.source == "virtual" for point in points):
        yield (
            "In virtual time transfers are modelled, so links cannot be judged: ranks shared "
            "cores, and only their compute times were measured."
        )
    busy = max(each.foreign_cpu_share for each in measured)
    if busy >= FOREIGN_LOAD:
        yield f"Other processes used {busy:.0%} of the cores while it was measured."
    for point in points:
        cached = sum(serving.num_cached_tokens or 0 for serving, _ in point.loads)
        prompts = sum(serving.num_prompt_tokens or 0 for serving, _ in point.loads)
        if cached >= _MUCH * max(prompts, 1):
            yield (
                f"{cached / prompts:.0%} of the prompt tokens of {point.record.name} were in a "
                "prefix cache, which the projection does not model: its TTFT is not comparable."
            )
        for step in point.steps:
            unknown = step.terms_s.get(UNKNOWN, 0.0) / step.seconds.value
            if unknown >= _MUCH:
                yield (
                    f"{unknown:.0%} of the {step.phase.value} step of {point.record.name} is in "
                    "unknown kernels, which are compared with no projected time."
                )


def row_of(number: JudgedNumber) -> Row:
    """The number as a row of the exported table."""
    return {**vars(number), "ratio": number.ratio if number.projected else None}
