"""Prefill with another dispatch form than decode, where one pool computes both."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import inf

from expertlane.cost.laws.execution import LIKELY
from expertlane.cost.throughput import Arriving, one_pool
from expertlane.planner.candidates import Candidate, PlanRequest
from expertlane.planner.screen import ScreenedCandidate
from expertlane.spec.deployment import Options
from expertlane.spec.dispatch import DispatchForm

_LEAST_GAIN = 0.02  # share of prefill saved: less is not worth a second form


def with_fastest_prefill(
    options: Sequence[ScreenedCandidate], request: PlanRequest
) -> list[ScreenedCandidate]:
    """Further options: the same with the prefill of the fastest form, where that is another.

    Nothing else of a step turns on how the other phase dispatches, so none is to be screened anew.
    """
    fastest: dict[object, ScreenedCandidate] = {}
    keys = [_but_form(each.candidate) for each in options]
    prompt_s = [_prompt_s(each) for each in options]
    least: dict[object, float] = {}
    for key, seconds, each in zip(keys, prompt_s, options, strict=True):
        if seconds < least.get(key, inf):
            least[key], fastest[key] = seconds, each
    arriving: dict[object, Arriving] = {}
    pairs = [
        (each, prefilled_as(each, fastest[key], request, arriving))
        for key, seconds, each in zip(keys, prompt_s, options, strict=True)
        if seconds > (1 + _LEAST_GAIN) * least[key]
    ]
    return [after for before, after in pairs if after.tps >= before.tps]


def _prompt_s(option: ScreenedCandidate) -> float:
    """Key for the fastest prefill: seconds of a lone prompt plus one beside those of all ranks."""
    return float(option.steps.alone_s[LIKELY] + option.steps.batched_s[LIKELY])


def _but_form(candidate: Candidate) -> object:
    layout, options, num_drafts = candidate
    how = options.overlap, options.num_micro_batches, options.micro_batch_schedule
    return layout, how, options.num_redundant_experts, num_drafts


def prefilled_as(
    option: ScreenedCandidate,
    best: ScreenedCandidate,
    request: PlanRequest,
    arriving: dict[object, Arriving],
) -> ScreenedCandidate:
    """An option with another's prefill.

    Args:
        arriving: known `Arriving` by numbers of sequences; new ones are added.
    """
    form = best.candidate.options.dispatch
    assert form != "auto", "candidates name their form"
    steps = replace(
        option.steps,
        prefill_s=best.steps.prefill_s,
        prompts=best.steps.prompts,
        alone_s=best.steps.alone_s,
    )
    layout, num_drafts = option.candidate.layout, option.candidate.num_drafts
    key = layout.replicas, layout.dp, num_drafts, steps.num_seqs.tobytes()
    if key not in arriving:
        arriving[key] = steps.arriving(request.workload)
    served = one_pool(steps, request.workload, arriving[key])
    candidate = option.candidate._replace(options=_prefilling(option.candidate.options, form))
    return replace(
        option, candidate=candidate, steps=steps, served=served, place=served.best(request.goals)
    )


@cache
def _prefilling(options: Options, form: DispatchForm) -> Options:
    return replace(options, prefill_dispatch=form)
