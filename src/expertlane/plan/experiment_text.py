"""The winner as an experiment file that `expertlane compare` takes."""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

import tomli_w

from expertlane.plan.candidates import Candidate
from expertlane.plan.setting import Traffic
from expertlane.spec.deployment import Options
from expertlane.spec.model import PRESETS, ModelConfig


def experiment_text(
    name: str,
    model: ModelConfig,
    checkpoint: str | None,
    traffic: Traffic,
    ranks_per_node: int,
    deployments: Sequence[tuple[str, Candidate]],
    comment: str,
) -> str:
    """TOML; the first deployment is the baseline.

    Args:
        checkpoint: its folder; None for a preset, or a model by its sizes.
        comment: a line that begins the file.
    """
    document = {
        "name": name,
        "seed": 0,
        "model": _model(model, checkpoint),
        "workload": {
            "num_sequences": traffic.num_sequences,
            "prompt_len": traffic.prompt_len,
            "output_len": traffic.output_len,
        },
        "cluster": {"ranks_per_node": ranks_per_node},
        "deployments": [
            {"name": label, "layout": str(candidate.layout), **_options(candidate.options)}
            for label, candidate in deployments
        ],
    }
    return f"# {comment}\n\n{tomli_w.dumps(document)}"


def _model(model: ModelConfig, checkpoint: str | None) -> dict[str, Any]:
    if checkpoint is not None:
        return {"checkpoint": checkpoint}
    if PRESETS.get(model.name) == model:
        return {"preset": model.name}
    sizes = asdict(model)
    return {
        each.name: sizes[each.name]
        for each in fields(model)
        if each.default is MISSING or getattr(model, each.name) != each.default
    }


def _options(options: Options) -> dict[str, Any]:
    """Those that are not the default."""
    plain = Options()
    return {
        each.name: getattr(options, each.name)
        for each in fields(options)
        if getattr(options, each.name) != getattr(plain, each.name)
    }
