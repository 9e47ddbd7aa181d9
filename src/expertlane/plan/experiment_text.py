"""The best deployments of a plan as an experiment file, for `expertlane compare`."""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

import tomli_w

from expertlane.plan.candidates import Candidate, PlanRequest
from expertlane.spec.deployment import Options
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.workload import Workload

_REBALANCE_STEPS = 64  # often enough for a comparison, whose runs are short


def experiment_text(
    request: PlanRequest,
    name: str,
    checkpoint: str | None,
    deployments: Sequence[Candidate],
    comment: str,
) -> str:
    """TOML; the first deployment is the baseline.

    What the engine does not run is left out: decode context parallelism and drafts. Experts that
    are placed by load begin in order and are moved to where the load of the run wants them.

    Args:
        checkpoint: the model's folder; None for a preset, or a model by its sizes.
        comment: a line that begins the file.
    """
    document = {
        "name": name,
        "seed": 0,
        "model": _model(request.model, checkpoint),
        "workload": sizes_of(request.workload),
        "cluster": {"ranks_per_node": request.cluster.profile.ranks_per_node},
        "deployments": [
            {"name": _named(each), "layout": str(each.layout), **_given(each.options)}
            for each in dict.fromkeys(map(_as_run, deployments))
        ],
    }
    return f"# {comment}\n\n{tomli_w.dumps(document)}"


def _as_run(candidate: Candidate) -> Candidate:
    options = candidate.options
    if options.placement == "load":
        options = replace(options, placement="linear", rebalance_steps=_REBALANCE_STEPS)
    return Candidate(replace(candidate.layout, dcp=1), options)


def _named(candidate: Candidate) -> str:
    """Its layout, and its options where they are not the default."""
    layout, options = str(candidate.layout), str(candidate.options)
    return layout if options == "plain" else f"{layout}; {options}"


def sizes_of(workload: Workload) -> dict[str, int]:
    """A workload without a seed: a plan draws no prompt."""
    return {key: num for key, num in asdict(workload).items() if key != "seed"}


def _model(model: ModelConfig, checkpoint: str | None) -> dict[str, Any]:
    if checkpoint is not None:
        return {"checkpoint": checkpoint}
    if PRESETS.get(model.name) == model:
        return {"preset": model.name}
    return _given(model)


def _given(settings: ModelConfig | Options) -> dict[str, Any]:
    """The settings that are not the default."""
    values = asdict(settings)
    return {
        each.name: values[each.name]
        for each in fields(settings)
        if each.default is MISSING or getattr(settings, each.name) != each.default
    }
