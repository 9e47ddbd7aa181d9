"""The paper's model and layouts, by which its experiment is recognised."""

from collections.abc import Mapping
from typing import Any

from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS

LAYOUTS = (Layout(tp=8, pp=2), Layout(dp=16, ep=16))
TOP_KS = (2, 1)  # it gives none

_SIZES = (
    "num_hidden_layers",
    "num_experts",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "moe_intermediate_size",
    "gated_mlp",
)


def is_papers_model(model: Mapping[str, Any]) -> bool:
    """Whether it has all the sizes that the paper gives; `model`: a `ModelConfig`'s fields."""
    return all(model.get(name) == getattr(PRESETS["paper"], name) for name in _SIZES)
