"""The best deployments of a plan as an experiment file, for `expertlane compare`."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields, replace
from typing import Any

import tomli_w

from expertlane.planner.candidates import Candidate, PlanRequest
from expertlane.planner.screen import ScreenedCandidate
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import Projection
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.workload import Workload

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
