"""The best layouts that a planner finds, beside an experiment's own deployments."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from expertlane.errors import UserError
from expertlane.planner.candidates import PlanRequest
from expertlane.planner.results import candidate_record, pareto_records
from expertlane.planner.screen import ScreenedCandidate, fitting
from expertlane.planner.search import OnePool, Search
from expertlane.planner.simulated import simulated_pool
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
        What was looked at; and `own`, the fastest of them in that role, followed by what the
        planner adds.
    """
    num_seqs = request.workload.num_sequences
    # Prompts of one token and outputs around the context: next to nothing but decode steps.
    around = replace(request.workload, prompt_len=1, output_len=2 * context - 1)
    of_decode = replace(request, workload=around)
    decoding = _Screened(Search(of_decode))
    progress.advance()
    search = Search(replace(request, setting=replace(request.setting, step_tokens=None)))
    found = _best(search)
    progress.advance()
    rows = list(own)
    if (fastest := _fastest(decoding, context, num_seqs, own, row_of)) is not None:
        place = next((place for place, row in enumerate(own) if row is fastest), len(own))
        rows[place : place + 1] = [replace(fastest, roles=(*fastest.roles, FASTEST))]
    if found is not None:
        rows.append(candidate_record(found.finalists[0], 0, BEST, conditions, request))
    if decoding.options:
        rows += pareto_records(decoding.options, _NUM_PARETO, conditions, of_decode)
    summary = PlanSummary(
        top_k=request.model.num_experts_per_tok,
        num_candidates=found.num_candidates if found else 0,
        num_too_large=found.num_too_large if found else 0,
        num_simulated=found.num_simulated if found else 0,
    )
    return summary, rows


class _Screened:
    """What fits, and how to project it in full."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.options = fitting(search.screen())


def _best(search: Search) -> OnePool | None:
    try:
        return simulated_pool(search, search.screen(), lambda _: None, with_families=False)
    except UserError:  # nothing fits
        return None


def _fastest(
    found: _Screened,
    context: int,
    num_seqs: int,
    own: Sequence[DeploymentRecord],
    row_of: Callable[[Deployment], DeploymentRecord],
) -> DeploymentRecord | None:
    rows = list(own)
    able = sorted((each for each in found.options if each.num_seqs >= num_seqs), key=_tps)
    of_layout = {each.candidate.layout: each for each in reversed(able)}
    best = sorted(of_layout.values(), key=_tps)[:_NUM_IN_FULL]
    for finalist in best:
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


def _tps(option: ScreenedCandidate) -> float:
    return -option.tps
