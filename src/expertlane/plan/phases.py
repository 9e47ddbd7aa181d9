"""Prefill with another dispatch form than decode, where one pool computes both."""

from collections.abc import Sequence
from dataclasses import replace

from expertlane.cost.laws.execution import LIKELY
from expertlane.plan.candidates import PlanRequest
from expertlane.plan.screen import ScreenedCandidate
from expertlane.plan.throughput import one_pool

_LEAST_GAIN = 0.02  # of prefill: less is not worth a second form


def with_fastest_prefill(
    options: Sequence[ScreenedCandidate], request: PlanRequest
) -> list[ScreenedCandidate]:
    """Further options: the same with the prefill of the fastest form, where that is another.

    Nothing else of a step turns on how the other phase dispatches, so none is to be screened anew.
    """
    fastest: dict[object, ScreenedCandidate] = {}
    for each in options:
        known = fastest.setdefault(_but_form(each), each)
        if _prefill_tps(each) > _prefill_tps(known):
            fastest[_but_form(each)] = each
    pairs = [(each, fastest[_but_form(each)]) for each in options]
    return [
        _prefilled_as(each, best, request)
        for each, best in pairs
        if _prefill_tps(best) > (1 + _LEAST_GAIN) * _prefill_tps(each)
    ]


def _but_form(option: ScreenedCandidate) -> object:
    candidate = option.candidate
    return candidate._replace(options=replace(candidate.options, dispatch="all_to_all"))


def _prefill_tps(option: ScreenedCandidate) -> float:
    return float(option.steps.prefill_tps[LIKELY])


def _prefilled_as(
    option: ScreenedCandidate, best: ScreenedCandidate, request: PlanRequest
) -> ScreenedCandidate:
    form = best.candidate.options.dispatch
    assert form != "auto", "candidates name their form"
    options = replace(option.candidate.options, prefill_dispatch=form)
    steps = replace(option.steps, prefill_s=best.steps.prefill_s, prompts=best.steps.prompts)
    served = one_pool(steps, request.workload)
    return replace(
        option,
        candidate=option.candidate._replace(options=options),
        steps=steps,
        served=served,
        place=served.best(request.goals),
    )
