"""Contract 1 against transformers, for a checkpoint of every family."""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from engine.model.families import FAMILIES
from expertlane.engine.model.attention import RotaryEmbedding, rotary_frequencies
from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.spec.from_hf import from_hf
from parity.against_transformers import check_against_transformers

CPU = torch.device("cpu")

LAYOUTS = (
    "tp=1",
    pytest.param("dp=4,ep=4", marks=pytest.mark.numerical),
    "tp=2,ep=2",
    "pp=2,dp=2,ep=2",
    "tp=4",
)


@pytest.mark.smoke(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_steps", [24, pytest.param(64, marks=pytest.mark.full)])
def test_transformers_logits_and_tokens(
    pools, checkpoints, num_steps: int, family: str, layout: str
) -> None:
    folder = checkpoints.folder(family)
    check_against_transformers(pools, folder, Checkpoint(folder).model, layout, num_steps)


def _scaled(kind: str, **more: float) -> transformers.MixtralConfig:
    rope = {"rope_type": kind, "rope_theta": 500_000.0, **more}
    return transformers.MixtralConfig(head_dim=128, rope_parameters=rope)


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROTATED = {
    "default": transformers.MixtralConfig(head_dim=128),
    "partial": transformers.Glm4MoeConfig(head_dim=128),
    "linear": _scaled("linear", factor=3.0),
    "llama3": _scaled("llama3", factor=8.0, original_max_position_embeddings=8_192, **_LLAMA3),
    "yarn": _scaled("yarn", factor=40.0, original_max_position_embeddings=4_096),
    "yarn, not truncated": transformers.GptOssConfig(head_dim=64),
}


@pytest.mark.parametrize("name", _ROTATED)
def test_rotary_angles_are_rounded_as_in_transformers(name):
    """A difference in a frequency's last bit grows with the position."""
    config, position = _ROTATED[name], 39_999
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        of_family = MixtralRotaryEmbedding if name == "default" else Glm4MoeRotaryEmbedding
        wanted = of_family.compute_default_rope_parameters(config)[0]
    else:
        wanted = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0]
    architecture = type(config).__name__.removesuffix("Config") + "ForCausalLM"
    model = from_hf(config.to_dict() | {"architectures": [architecture]})
    assert torch.equal(rotary_frequencies(model), wanted)
    table = RotaryEmbedding(replace(model, max_position_embeddings=position + 1), CPU)
    factor = 1.0 if model.rope_scaling is None else model.rope_scaling.attention_factor
    angles = torch.tensor([float(position)]) * wanted
    assert torch.equal(table.cos[position, 0, : len(wanted)], angles.cos() * factor)
    assert torch.equal(table.sin[position, 0, len(wanted) :], angles.sin() * factor)
