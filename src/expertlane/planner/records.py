"""Records, assumptions and the experiment file of a plan."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields, replace
from typing import Any

import numpy as np
import tomli_w

from expertlane.cost.laws.profile import Execution, kernels_of
from expertlane.cost.memory import FREE_SHARE
from expertlane.cost.routing import RoutingChoice
from expertlane.cost.step.operation import Floats
from expertlane.cost.step.step_list import GPU_LIBRARIES
from expertlane.cost.throughput import ACCEPTANCE_UNSURE, MultiToken, ThroughputCurve
from expertlane.planner.candidates import Candidate, PlanRequest
from expertlane.planner.ranking import pareto
from expertlane.planner.screen import ScreenedCandidate
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import (
    DECODE_POOL,
    PARETO,
    PREFILL_POOL,
    Conditions,
    DeploymentRecord,
)
from expertlane.results.results import Assumption
from expertlane.results.serving_record import ServingRecord, with_places
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import Projection
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.workload import Workload


def pareto_records(
    options: Sequence[ScreenedCandidate], num: int, conditions: Conditions, request: PlanRequest
) -> list[DeploymentRecord]:
    """Up to `num` points of the Pareto front, spread over TPOT, as screened."""
    front = pareto(options)
    places = np.unique(np.linspace(0, len(front) - 1, num).round().astype(int))
    return [
        candidate_record(option, place, PARETO, conditions, request)
        for option, place in (front[each] for each in places)
    ]


def candidate_record(
    candidate: ScreenedCandidate,
    place: int,
    role: str,
    conditions: Conditions,
    request: PlanRequest,
) -> DeploymentRecord:
    """The record at one of the numbers of sequences that were screened, or projected in full."""
    layout, options, num_drafts = candidate.candidate
    serving = serving_at(candidate.served, place)
    if role not in (PREFILL_POOL, DECODE_POOL):  # each of two pools has places of its own
        serving = with_wait(serving, request)
    memory = replace(candidate.capacity.record(), num_resident=candidate.capacity.num_resident)
    prefill_tps = Estimate.between(candidate.steps.prefill_tps)
    return DeploymentRecord(
        name=str(candidate.candidate),
        layout=layout,
        options=options,
        source="projected",
        roles=(role,),
        conditions=conditions,
        pools=(memory,),
        serving=(replace(serving, prefill_tps=prefill_tps),),
        num_drafts=num_drafts,
    )


def with_wait(serving: ServingRecord, request: PlanRequest) -> ServingRecord:
    """The record of a closed load with the wait for a place."""
    if serving.num_running is None or request.rate is not None:
        return serving
    requests_per_s = serving.output_tps / request.workload.output_len
    num_asked = request.workload.num_sequences
    return with_places(serving, serving.num_running, num_asked, requests_per_s)


def serving_at(served: ThroughputCurve, place: int) -> ServingRecord:
    """Throughput and latency at one number of sequences; times are means."""

    def mean(bounds: Floats) -> Summary | None:
        return Summary(mean=Estimate.between(bounds)) if np.isfinite(bounds).all() else None

    return ServingRecord(
        output_tps=Estimate.between(served.tps[:, place]),
        num_running=int(served.num_seqs[place]),
        ttft_s=mean(served.ttft_s[:, place]),
        tpot_s=mean(served.tpot_s[:, place]),
    )


_Row = tuple[str, str, str]  # assumption, its value, the options that change it

_OF_LIBRARIES: tuple[_Row, ...] = (
    ("kernels", "fused as in GPU libraries; flat dispatch without an exchange of counts", ""),
    (
        "data-parallel ranks",
        "each has a scheduler, which agree before every step; idle ones compute a dummy batch",
        "",
    ),
)


def plan_assumptions(request: PlanRequest, routing: RoutingChoice) -> tuple[Assumption, ...]:
    """The assumptions, the weightiest first."""
    workload, profile, setting = request.workload, request.cluster.profile, request.setting
    num, is_graph = workload.num_sequences, setting.execution is Execution.GRAPH
    kernels = kernels_of(profile)
    rows = (
        (
            "workload",
            f"steady state at concurrency {num:,}, as far as memory allows: "
            f"{workload.prompt_len:,} prompt + {workload.output_len:,} output tokens",
            "--batch, --prompt-len, --output-len",
        ),
        *_of_prefixes(request),
        (
            "ranking",
            "the few that may be the best are simulated request by request on one replica; a "
            "static formula screens all, and gives the Pareto front",
            "",
        ),
        ("outputs", request.load_at(num).outputs, "--output-len"),
        ("routing", routing.words, "--routing-trace, --skew"),
        (
            "placement of experts",
            "by the load of earlier tokens, in each layer; judged by later ones",
            "",
        ),
        ("types", f"weights in {setting.types}", "--dtype, --kv-dtype"),
        (
            "execution",
            "steps captured as CUDA graphs" if is_graph else "kernels launched one by one",
            "--execution",
        ),
        *(_OF_LIBRARIES if kernels is GPU_LIBRARIES else [("kernels", kernels.assumed, "")]),
        *_of_drafts(setting.multi_token),
        (
            "TPOT",
            "mean; aggregated: other requests' prefills between decode steps included; "
            "disaggregated: decoding alone",
            "",
        ),
        (
            "TTFT",
            "mean, with waits; aggregated: to the end of the prompt's last step; disaggregated: "
            "to the first decode step, KV transfer included",
            "",
        ),
        (
            "memory",
            f"{FREE_SHARE:.0%} of a device's {profile.device.memory_bytes / 1e9:.0f} "
            "GB; full-length sequences in the KV cache",
            "",
        ),
        ("profile", f"{profile.name}: {profile.device.origin}", "--cluster"),
        (
            "bounds",
            "all laws low together or high together: wider than independent errors; of ratios, "
            "what is left once shared errors cancel, the rest independent",
            "",
        ),
    )
    return tuple(Assumption(name, value, change=change) for name, value, change in rows)


def _of_prefixes(request: PlanRequest) -> list[_Row]:
    load, prefixes = request.load, request.prefixes
    if load is None or not prefixes.num:
        return []
    return [
        (
            "shared prefixes",
            f"{load.num_prefixes:,} of {load.prefix_len:,} tokens, equally likely; each "
            f"data-parallel rank caches {prefixes.num_tokens:,} tokens of each, in whole blocks, "
            "and evicts the least recently used first; a decode pool gets the keys and values of "
            "whole prompts",
            "--prefix-len, --num-prefixes",
        )
    ]


def _of_drafts(drafts: MultiToken) -> list[_Row]:
    if not drafts.num_drafts:
        return []
    fewest, _, most = sorted(drafts.tokens_bounds.tolist())
    return [
        (
            "multi-token prediction",
            f"each deployment with {drafts.num_drafts} drafts and without; "
            f"{drafts.acceptance:g} ± {ACCEPTANCE_UNSURE:g} accepted: "
            f"{drafts.tokens_per_step:.3g} tokens per step ({fewest:.3g} to {most:.3g})",
            "--mtp, --mtp-acceptance",
        )
    ]


_REBALANCE_STEPS = 64  # often enough for a comparison, whose runs are short


def experiment_text(
    request: PlanRequest,
    name: str,
    checkpoint: str | None,
    deployments: Sequence[ScreenedCandidate],
    comment: str,
    projection: Projection | None = None,
) -> str:
    """TOML; the first deployment is the baseline.

    What the engine does not run is left out: decode context parallelism and drafts. Experts that
    are placed by load begin in order and are moved to where the load of the run wants them.

    Args:
        checkpoint: the model's folder; None for a preset, or a model by its sizes.
        comment: a line that begins the file.
        projection: options of the deployments' projection; their numbers of sequences are added.
    """
    workload = request.workload
    if request.rate is not None:  # as many as the largest deployment runs
        workload = replace(workload, num_sequences=max(each.num_seqs for each in deployments))
    runs = {_named(run): (run, each) for each in deployments for run in (_as_run(each.candidate),)}
    document: dict[str, Any] = {
        "name": name,
        "seed": 0,
        "model": _model(request.model, checkpoint),
        "workload": _given(workload),
        "cluster": {"ranks_per_node": request.cluster.profile.ranks_per_node},
        "deployments": [
            {"name": called, "layout": str(run.layout), **_given(run.options)}
            for called, (run, _) in runs.items()
        ],
    }
    lines = [comment]
    if projection is not None:
        num_running = {
            called: each.num_seqs
            for called, (_, each) in runs.items()
            if not _is_changed(each.candidate) and each.num_seqs < request.workload.num_sequences
        }
        document["projection"] = _given(replace(projection, num_running=num_running))
        lines += _PROJECTED
        lines += [] if request.rate is None else [_WITHOUT_RATE]
    if any(_is_changed(each.candidate) for each in deployments):
        lines.append(_LEFT_OUT)
    return "\n".join(f"# {line}" for line in lines) + f"\n\n{tomli_w.dumps(document)}"


_PROJECTED = (
    "[projection] holds what the plan was asked; expertlane compare --project reads it, and gives",
    "the plan's numbers. num_running: concurrent sequences that the plan found within slo; delete",
    "it, and compare looks for them again. Runs on real ranks ignore the table.",
)
_WITHOUT_RATE = (
    "The plan was for arrivals at a rate; the projection gives the most that is served within slo."
)
_LEFT_OUT = (
    "Left out, since expertlane's engine does not run it: decode context parallelism, or drafts of "
    "multi-token prediction. So a projection differs from the plan's."
)


def _is_changed(candidate: Candidate) -> bool:
    """True if the deployment has something that the engine does not run, and is left out."""
    return candidate.layout.dcp > 1 or candidate.num_drafts > 0


def _as_run(candidate: Candidate) -> Candidate:
    options = candidate.options
    if options.placement == "load":
        options = replace(options, placement="linear", rebalance_steps=_REBALANCE_STEPS)
    return Candidate(replace(candidate.layout, dcp=1), options)


def _named(candidate: Candidate) -> str:
    """Its layout, and its options where they are not the default."""
    layout, options = str(candidate.layout), str(candidate.options)
    return layout if options == "plain" else f"{layout}; {options}"


def _model(model: ModelConfig, checkpoint: str | None) -> dict[str, Any]:
    if checkpoint is not None:
        return {"checkpoint": checkpoint}
    if PRESETS.get(model.name) == model:
        return {"preset": model.name}
    return _given(model)


def _given(settings: ModelConfig | Options | Projection | Workload) -> dict[str, Any]:
    """The settings that are not the default."""
    values = asdict(settings)
    return {
        each.name: values[each.name]
        for each in fields(settings)
        if getattr(settings, each.name) != _default(each)
    }


def _default(setting: Field[Any]) -> Any:
    """The default of a field; `MISSING` if it has none."""
    if setting.default_factory is MISSING:
        return setting.default
    return setting.default_factory()
