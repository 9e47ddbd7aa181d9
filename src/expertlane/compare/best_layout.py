"""The best layouts that a planner finds, beside an experiment's own deployments."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from expertlane.errors import UserError
from expertlane.plan.candidates import Candidate, PlanRequest
from expertlane.plan.results import candidate_record, pareto_records
from expertlane.plan.screen import Screen, fitting
from expertlane.plan.search import OnePool, Search
from expertlane.progress import Progress
from expertlane.results.record import BEST, FASTEST, Conditions, DeploymentRecord
from expertlane.results.results import PlanSummary
from expertlane.spec.deployment import Deployment

_NUM_PARETO = 24
_NUM_IN_FULL = 4  # finalists whose decode steps are projected at every context


def plan_beside(
    request: PlanRequest,
    conditions: Conditions,
    context: int,
    own: Sequence[DeploymentRecord],
    row_of: Callable[[Deployment], DeploymentRecord],
    progress: Progress,
) -> tuple[PlanSummary, list[DeploymentRecord]]:
    """The fastest decode step at a context, and the most output of the whole workload.

    Args:
        request: for the whole workload.
        own: the experiment's deployments under the same conditions.
        row_of: projects a deployment in full.

    Returns:
        What was looked at; and `own`, with the role of the fastest or how the whole workload is
        served, followed by what the planner adds.
    """
    num_seqs = request.workload.num_sequences
    # Prompts of one token and outputs around the context: next to nothing but decode steps.
    around = replace(request.workload, prompt_len=1, output_len=2 * context - 1)
    decoding = _found(Search(replace(request, workload=around)))
    progress.advance()
    search = Search(request)
    found = _found(search)
    progress.advance()
    rows = list(own)
    if (fastest := _fastest(decoding, context, num_seqs, own, row_of)) is not None:
        place = next((place for place, row in enumerate(own) if row is fastest), len(own))
        rows[place : place + 1] = [replace(fastest, roles=(*fastest.roles, FASTEST))]
    if found is not None:
        rows.append(candidate_record(found.finalists[0], 0, BEST, conditions))
        known = {option.candidate for option in found.options}
        for place, row in enumerate(own):
            candidate = Candidate(row.known_layout, row.known_options)
            if _as_planned(candidate) not in known:
                continue
            for option in fitting(Screen(request, search.known).run([candidate], lambda _: None)):
                if option.place is not None:
                    planned = candidate_record(search.finish(option), 0, BEST, conditions)
                    rows[place] = replace(rows[place], serving=planned.serving)
    if decoding is not None:
        rows += pareto_records(decoding.options, _NUM_PARETO, conditions)
    summary = PlanSummary(
        top_k=request.model.num_experts_per_tok,
        num_candidates=found.num_candidates if found else 0,
        num_too_large=found.num_too_large if found else 0,
    )
    return summary, rows


def _as_planned(candidate: Candidate) -> Candidate:
    """The same with experts placed as a planner places them."""
    if candidate.layout.ep == 1:
        return candidate
    options = replace(candidate.options, placement="load", rebalance_steps=0)
    return candidate._replace(options=options)


def _found(search: Search) -> OnePool | None:
    try:
        return search.one_pool()
    except UserError:  # nothing fits
        return None


def _fastest(
    found: OnePool | None,
    context: int,
    num_seqs: int,
    own: Sequence[DeploymentRecord],
    row_of: Callable[[Deployment], DeploymentRecord],
) -> DeploymentRecord | None:
    finalists = [] if found is None else found.finalists
    rows = list(own)
    for finalist in [each for each in finalists if each.num_seqs >= num_seqs][:_NUM_IN_FULL]:
        layout, options, _ = finalist.candidate
        if any((row.layout, row.options) == (layout, options) for row in own):
            continue
        rows.append(row_of(Deployment(str(finalist.candidate), layout, options)))
    timed = [
        (step.round_s.value, place, row)
        for place, row in enumerate(rows)
        if (step := row.decode_of(context, num_seqs)) is not None and step.fits
    ]
    return min(timed)[2] if timed else None
