"""From a search to what is shown and kept."""

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from expertlane.cost.laws.execution import LIKELY
from expertlane.cost.step.operation import Floats
from expertlane.plan.explanation import best_of_families, pareto, why_it_loses
from expertlane.plan.request import Traffic
from expertlane.plan.search import Finalist, OnePool, Option, Search
from expertlane.plan.throughput import Steps, ThroughputCurve
from expertlane.plan.two_pools import TwoPools
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.plan import PlannedDeployment, PlannedPools
from expertlane.results.projection import Estimate, StepProjection
from expertlane.spec.model import ModelConfig
from expertlane.spec.paper import LAYOUTS, is_papers_model

_NUM_BEST = 8
_NUM_TIMELINES = 3
_PAPERS = ("the paper's baseline", "the paper's proposal")
_NUM_PARETO = 12


def best_deployments(
    found: OnePool, traffic: Traffic, search: Search
) -> tuple[PlannedDeployment, ...]:
    """The finalists, the best first; the first few with their timelines."""
    winner = found.finalists[0].option
    rows = []
    for place, each in enumerate(found.finalists[:_NUM_BEST]):
        row = _of_finalist(each, why_it_loses(winner, each.option, traffic) if place else "")
        if place < _NUM_TIMELINES:
            row = replace(row, timelines=search.timelines(each))
        rows.append(row)
    return tuple(rows)


def papers(
    found: OnePool, traffic: Traffic, search: Search, model: ModelConfig
) -> dict[str, PlannedDeployment]:
    """The paper's two layouts, each with its best options, in full where they keep the limits."""
    if not is_papers_model(asdict(model)):
        return {}
    winner = found.finalists[0].option
    rows = {}
    for name, layout in zip(_PAPERS, LAYOUTS, strict=True):
        options = [option for option in found.options if option.candidate.layout == layout]
        best = max(options, key=lambda option: option.tps, default=None)
        finalist = None if best is None else search.finish_within(best)
        if finalist is not None:
            why = why_it_loses(winner, finalist.option, traffic)
            rows[name] = replace(_of_finalist(finalist, why), timelines=search.timelines(finalist))
    return rows


def families(found: OnePool, traffic: Traffic) -> dict[str, PlannedDeployment]:
    """The best of each kind of deployment, as screened."""
    winner = found.finalists[0].option
    return {
        family: _of_option(option, option.place or 0, why_it_loses(winner, option, traffic))
        for family, option in best_of_families(found.options).items()
    }


def pareto_front(found: OnePool) -> tuple[PlannedDeployment, ...]:
    """Some points of it, spread over TPOT, as screened."""
    front = pareto(found.options)
    places = np.unique(np.linspace(0, len(front) - 1, _NUM_PARETO).round().astype(int))
    return tuple(_of_option(*front[place]) for place in places)


def pools(found: TwoPools) -> PlannedPools:
    """Two pools side by side."""
    return PlannedPools(
        prefill=_of_finalist(found.prefill, ""),
        decode=_of_finalist(found.decode, ""),
        num_prefill_devices=found.prefill.steps.layout.world_size,
        num_decode_devices=found.decode.steps.layout.world_size,
        tps=_estimate(found.served.tps[:, 0]),
        tpot_s=_estimate(found.served.tpot_s[:, 0]),
        ttft_s=_finite(found.served.ttft_s[:, 0]),
        transfer_s=_estimate(found.transfer_s),
    )


def _of_finalist(finalist: Finalist, why: str) -> PlannedDeployment:
    return _planned(
        finalist.option, finalist.steps, finalist.served, 0, why, finalist.decode, finalist.prefill
    )


def _of_option(option: Option, place: int, why: str = "") -> PlannedDeployment:
    return _planned(option, option.steps, option.served, place, why)


def _planned(
    option: Option,
    steps: Steps,
    served: ThroughputCurve,
    place: int,
    why: str,
    decode: StepProjection | None = None,
    prefill: StepProjection | None = None,
) -> PlannedDeployment:
    memory = option.screened.capacity.memory
    return PlannedDeployment(
        layout=LayoutSizes.of(option.candidate.layout),
        options=option.candidate.options,
        num_sequences=int(served.num_seqs[place]),
        tps=_estimate(served.tps[:, place]),
        tpot_s=_estimate(served.tpot_s[:, place]),
        ttft_s=_finite(served.ttft_s[:, place]),
        prefill_tps=_estimate(steps.prefill_tps[::-1]),
        why=why,
        decode=decode,
        prefill=prefill,
        weight_bytes=memory.weight_bytes,
        activation_bytes=memory.activation_bytes,
        sequence_bytes=memory.kv_bytes,
    )


def _estimate(bounds: Floats | Sequence[float]) -> Estimate:
    low, likely, high = (float(each) for each in bounds)
    return Estimate(likely, low, high)


def _finite(bounds: Floats) -> Estimate | None:
    return _estimate(bounds) if np.isfinite(bounds).all() else None


assert LIKELY == 1, "bounds are low, likely, high"
