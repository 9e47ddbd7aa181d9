import math

import pytest
from safetensors import safe_open

from engine.model.families import FAMILIES
from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.model.stored_tensors import tensor_locations
from expertlane.spec.model import PRESETS
from expertlane.spec.tensors import (
    cut_dim,
    expert_name,
    layer_name,
    num_params,
    tensor_names,
    tensor_shape,
)


def test_the_paper_s_model_by_hand():
    tiny = PRESETS["paper-tiny"].with_overrides(num_hidden_layers=1, num_experts=2)
    assert list(tensor_names(tiny)) == [
        "embedding",
        "layers.0.attention_norm",
        "layers.0.query",
        "layers.0.key",
        "layers.0.value",
        "layers.0.output",
        "layers.0.moe_norm",
        "layers.0.router",
        "layers.0.experts.0.up",
        "layers.0.experts.0.down",
        "layers.0.experts.1.up",
        "layers.0.experts.1.down",
        "final_norm",
        "head",
    ]
    assert tensor_shape(tiny, "embedding") == (257, 64)
    assert tensor_shape(tiny, layer_name(0, "router")) == (2, 64)
    assert tensor_shape(tiny, expert_name(0, 1, "down")) == (64, 128)
    with pytest.raises(KeyError):
        tensor_shape(tiny, layer_name(0, "query_bias"))


def test_what_layouts_cut():
    assert cut_dim(layer_name(0, "output")) == 1
    assert cut_dim(expert_name(0, 0, "down")) == 1
    assert cut_dim(layer_name(0, "shared.down")) == 1
    for name in ("head", layer_name(0, "query"), expert_name(0, 0, "down_bias")):
        assert cut_dim(name) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_s_tensors_are_all_that_its_checkpoint_holds(checkpoints, family):
    folder = checkpoints.folder(family)
    checkpoint = Checkpoint(folder)
    model = checkpoint.model
    names = list(tensor_names(model))
    assert len(set(names)) == len(names)
    assert sum(math.prod(tensor_shape(model, name)) for name in names) == num_params(model)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name for name in file.keys() if not name.startswith("model.visual.")}  # noqa: SIM118
    kind = model.name if model.name != "deepseek_v2_lite" else "deepseek_v2"
    assert {tensor_locations(kind, name)[0].name for name in names} == stored
    checkpoint.check()
