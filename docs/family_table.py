"""Write family_table.md, the tables of families.md: what families can do, what layers have.

`make docs` writes it, as docs/conf.py does; the page is not in the repository. The first table
is what `expertlane list families` says, the second is read from published configurations.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import FAMILIES, Family
from expertlane.spec.model import ModelConfig

_HERE = Path(__file__).parent
_CONFIGS = _HERE.parent / "tests" / "spec"
_NAMES = ("published", "published_grouped", "published_mixers")
_HEAD = """| family | architectures | mixers | run, serve | draft | tools | reasoning |
| --- | --- | --- | --- | --- | --- | --- |
"""
_HEAD_OF_LAYERS = """
| published model | layers | attention and other mixers | router | experts and other MLPs |
| --- | ---: | --- | --- | --- |
"""


def render() -> str:
    """Both tables."""
    capabilities = (_row(name, family) for name, family in FAMILIES.items())
    layers = (_layers(from_hf(config, name, weights=False)) for name, config in published())
    return "".join((_HEAD, *capabilities, _HEAD_OF_LAYERS, *layers))


def published() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and configurations of published models."""
    for name in _NAMES:
        yield from json.loads((_CONFIGS / f"{name}.json").read_text(encoding="utf-8")).items()


def _line(cells: list[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n"


def _row(name: str, family: Family) -> str:
    """What a family can do."""
    runs = not family.is_planned_only
    return _line(
        [
            f"`{name}`",
            ", ".join(f"`{each}`" for each in (family.architecture, *family.wrappers)),
            family.mixers,
            "yes" if runs else "",
            "yes" if family.has_drafts else "",
            ", ".join(family.calls) if runs else "",
            ", ".join(family.thoughts) if runs else "",
        ]
    )


def _layers(model: ModelConfig) -> str:
    """What a model's layers have."""
    parts = (_attention(model), _router(model), _mlps(model))
    return _line([model.name, str(model.num_hidden_layers), *("; ".join(each) for each in parts)])


def _attention(model: ModelConfig) -> Iterator[str]:
    if model.state is not None:
        yield f"`{model.state.kind}` in {len(model.state_layers)} layers"
    if model.latent is not None:
        yield "latent"
    elif model.compressed is not None:
        yield "compressed"
    else:
        yield f"{model.num_attention_heads} heads, {model.num_kv_heads} of keys and values"
    if model.query_rank is not None:
        yield f"queries from a latent of {model.query_rank:,}"
    if model.qkv_bias:
        yield "biases"
    norms = {"head": "each head", "rotated_head": "each rotated head", "full": "all heads together"}
    if model.qk_norm is not None:
        yield f"norm of {norms[model.qk_norm]}"
    if model.attention_gate is not None:
        yield "a gate"
    windows = [each for each in model.sliding_window if each is not None]
    if windows:
        yield f"a window of {windows[0]:,} in {len(windows)} layers"
    if model.window_heads is not None:
        heads = model.window_heads
        yield f"there {heads.num_heads} heads, {heads.num_key_value_heads} of keys and values"
    if model.attention_sinks or (model.window_heads is not None and model.window_heads.sinks):
        yield "sinks"
    if model.indexer is not None:
        yield f"an indexer chooses {model.indexer.topk:,} positions"
    if model.shared_choice_layers:
        yield f"{len(model.shared_choice_layers)} layers take another's choice"
    if model.partial_rotary_factor != 1:
        yield f"{model.partial_rotary_factor:g} of a head is rotated"
    if model.rope_interleave:
        yield "pairs (2i, 2i + 1)"
    if model.unrotated_layers:
        yield f"{len(model.unrotated_layers)} layers without positions"
    if model.attention_multiplier is not None:
        yield f"scale {model.attention_multiplier:g}"


def _router(model: ModelConfig) -> Iterator[str]:
    routing = model.routing
    yield routing.scoring_func
    if routing.router_bias:
        yield "a bias"
    if routing.correction_bias:
        yield "a bias for the choice alone"
    if routing.n_group > 1:
        yield f"{routing.topk_group} of {routing.n_group} groups"
    if not routing.norm_topk_prob:
        yield "weights do not add up to 1"
    if routing.routed_scaling_factor != 1:
        yield f"factor {routing.routed_scaling_factor:g}"
    if model.hash_layers:
        yield f"{len(model.hash_layers)} layers by a table"


def _mlps(model: ModelConfig) -> Iterator[str]:
    yield f"{model.num_experts_per_tok} of {model.num_routed_experts}"
    if model.num_zero_experts:
        yield f"{model.num_zero_experts} compute nothing"
    if model.moe_latent_size is not None:
        yield f"experts at a width of {model.moe_latent_size:,}"
    if model.shared_expert_intermediate_size:
        yield "a shared expert" + (" with a gate" if model.shared_expert_gate else "")
    if model.shortcut_experts:
        yield "experts beside the next layer"
    if model.dense_layers:
        yield f"dense layers: {len(model.dense_layers)}"
    if model.mlp_only_layers or model.mixer_only_layers:
        yield "layers of a mixer or an MLP alone"
    if model.expert_bias:
        yield "biases"
    if not model.gated_mlp:
        yield f"{model.hidden_act}, no gate"
    if model.swiglu_limit is not None:
        yield "clamped"
    if model.num_streams > 1:
        yield f"{model.num_streams} residual streams"


if __name__ == "__main__":
    (_HERE / "family_table.md").write_text(render(), encoding="utf-8")
