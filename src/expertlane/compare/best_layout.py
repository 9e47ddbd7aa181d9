"""The best layouts that a planner finds, beside an experiment's own deployments."""

from collections.abc import Callable, Sequence

import numpy as np

from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.step.operation import Floats
from expertlane.errors import UserError
from expertlane.plan.explanation import pareto
from expertlane.plan.request import Goals, PlanRequest, Setting, Traffic
from expertlane.plan.search import Finalist, OnePool, Option, Search
from expertlane.plan.throughput import ThroughputCurve
from expertlane.progress import Progress
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.projection import (
    Estimate,
    Planned,
    ProjectedDeployment,
    ServedDeployment,
)
from expertlane.spec.deployment import Deployment
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Workload

_NUM_PARETO = 24
_NUM_IN_FULL = 4  # finalists whose decode steps are projected at every context


def plan_beside(
    model: ModelConfig,
    cluster: ModelledCluster,
    workload: Workload,
    setting: Setting,
    context: int,
    own: Sequence[ProjectedDeployment],
    row_of: Callable[[Deployment], ProjectedDeployment],
    progress: Progress,
) -> Planned:
    """The fastest decode step at a context, and the most output of the whole workload.

    Args:
        own: the experiment's deployments under the same conditions.
        row_of: projects a deployment in full.
    """
    num_seqs = workload.num_sequences
    # Prompts of one token and outputs around the context: next to nothing but decode steps.
    decoding = _search(model, cluster, Traffic(num_seqs, 1, 2 * context - 1), setting)
    progress.advance()
    whole = Traffic(num_seqs, workload.prompt_len, workload.output_len)
    search = Search(PlanRequest(model, cluster, whole, Goals(), setting))
    try:
        found = search.one_pool()
    except UserError:  # nothing fits
        found = None
    progress.advance()
    return Planned(
        top_k=model.num_experts_per_tok,
        num_candidates=found.num_candidates if found else 0,
        num_too_large=found.num_too_large if found else 0,
        decode=_fastest(decoding, context, num_seqs, own, row_of),
        served=_served(search, found, own) if found else (),
        pareto=_pareto(decoding) if decoding else (),
    )


def _search(
    model: ModelConfig, cluster: ModelledCluster, traffic: Traffic, setting: Setting
) -> OnePool | None:
    try:
        return Search(PlanRequest(model, cluster, traffic, Goals(), setting)).one_pool()
    except UserError:  # nothing fits
        return None


def _fastest(
    found: OnePool | None,
    context: int,
    num_seqs: int,
    own: Sequence[ProjectedDeployment],
    row_of: Callable[[Deployment], ProjectedDeployment],
) -> ProjectedDeployment | None:
    finalists = [] if found is None else found.finalists
    rows = list(own)
    for finalist in [each for each in finalists if each.num_seqs >= num_seqs][:_NUM_IN_FULL]:
        layout, options = finalist.option.candidate
        if any((row.layout.layout, row.options) == (layout, options) for row in own):
            continue
        rows.append(row_of(Deployment(str(finalist.option.candidate), layout, options)))
    timed = [
        (step.step_s.value, place, row)
        for place, row in enumerate(rows)
        if (step := row.decode_of(context, num_seqs)) is not None and step.fits
    ]
    return min(timed)[2] if timed else None


def _served(
    search: Search, found: OnePool, own: Sequence[ProjectedDeployment]
) -> tuple[ServedDeployment, ...]:
    best = found.finalists[0]
    by_candidate = {tuple(option.candidate): option for option in found.options}
    rows = [_of_finalist(str(best.option.candidate), best)]
    for row in own:
        option = by_candidate.get((row.layout.layout, row.options))
        if option is not None and option.place is not None:
            rows.append(_of_finalist(row.name, search.finish(option)))
    return tuple(rows)


def _pareto(found: OnePool) -> tuple[ServedDeployment, ...]:
    front = pareto(found.options)
    places = np.unique(np.linspace(0, len(front) - 1, _NUM_PARETO).round().astype(int))
    return tuple(
        _served_at(str(option.candidate), option, option.served, place)
        for option, place in (front[each] for each in places)
    )


def _of_finalist(name: str, finalist: Finalist) -> ServedDeployment:
    return _served_at(name, finalist.option, finalist.served, 0)


def _served_at(name: str, option: Option, served: ThroughputCurve, place: int) -> ServedDeployment:
    """At one of its numbers of sequences."""
    layout, options = option.candidate
    return ServedDeployment(
        name=name,
        layout=LayoutSizes.of(layout),
        options=options,
        num_seqs=int(served.num_seqs[place]),
        tps=_estimate(served.tps[:, place]),
        tpot_s=_estimate(served.tpot_s[:, place]),
    )


def _estimate(bounds: Floats) -> Estimate:
    low, likely, high = (float(each) for each in np.sort(bounds))
    return Estimate(likely, low, high)
