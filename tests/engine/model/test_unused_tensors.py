"""What of a checkpoint no model uses, by its headers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertlane.engine.model.checkpoint import Checkpoint

_VECTOR = torch.zeros(64)
_PARTS = ("gate", "up", "down")


def _unused(folder):
    return Checkpoint(folder).check()


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        ("mixtral", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen2_moe", "model.layers.0.self_attn.o_proj.bias"),
        ("olmoe", "model.layers.3.self_attn.k_proj.bias"),
        ("deepseek_v3", "model.layers.0.mlp.gate.weight"),  # a dense layer's router
        ("deepseek_v3", "model.layers.0.self_attn.q_proj.weight"),  # beside its latent
        ("mixtral", "model.layers.4.input_layernorm.weight"),
        ("olmoe", "model.layers.0.mlp.experts.8.up_proj.weight"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj"),  # beside each expert's own
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight_scale_inv"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_scales"),
        ("gpt_oss", "lm_head.bias"),
        ("mixtral", "model.vision_tower.weight"),
        ("qwen3_vl_moe", "model.layers.0.input_layernorm.weight"),  # beside the language model
        ("dots1", "model.layers.4.input_layernorm.weight"),
        ("minimax_m2", "model.layers.4.input_layernorm.weight"),
        ("deepseek_v2", "model.layers.4.input_layernorm.weight"),
        ("deepseek_v3", "model.layers.5.input_layernorm.weight"),
    ],
)
def test_a_tensor_without_a_use(rewrite, family, stored):
    assert _unused(rewrite(family, {stored: _VECTOR})) == [stored]


@pytest.mark.parametrize(
    ("family", "config", "stored"),
    [
        ("qwen2_moe", {"qkv_bias": False}, "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3_moe", {"attention_bias": False}, "model.layers.3.self_attn.o_proj.bias"),
        ("mixtral", {"num_hidden_layers": 3}, "model.layers.3.input_layernorm.weight"),
    ],
)
def test_a_tensor_that_a_config_makes_superfluous(rewrite, family, config, stored):
    assert stored in _unused(rewrite(family, None, config))


@pytest.mark.parametrize(
    ("family", "config", "stored"),
    [
        ("mixtral", {}, "model.layers.2.self_attn.rotary_emb.inv_freq"),
        ("olmoe", {}, "model.rotary_emb.inv_freq"),
        ("qwen3_moe", {}, "model.layers.1.self_attn.k_scale"),
        ("mixtral", {}, "model.layers.0.self_attn.v_proj.v_scale"),
        ("deepseek_v3", {}, "model.layers.4.mlp.experts.3.up_proj.weight"),
        ("deepseek_v3", {"num_nextn_predict_layers": 2}, "model.layers.5.eh_proj.weight"),
        ("glm4_moe", {}, "model.layers.4.eh_proj.weight"),
        ("glm4_moe_lite", {"num_nextn_predict_layers": 1}, "model.layers.4.eh_proj.weight"),
        ("ernie4_5_moe", {}, "model.mtp_block.0.input_layernorm.weight"),
        ("qwen3_vl_moe", {}, "model.visual.pos_embed.weight"),
        ("qwen3_moe", {}, "lm_head.weight"),  # tied: judged by its values
    ],
)
def test_what_is_left_unread_without_a_word(rewrite, family, config, stored):
    tensor = torch.zeros(97, 64) if stored == "lm_head.weight" else _VECTOR
    assert _unused(rewrite(family, {stored: tensor}, config)) == []


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_shared_experts_where_config_has_none(rewrite, family):
    stored = "model.layers.0.mlp.shared_experts.gate_proj.weight"
    assert _unused(rewrite(family, {stored: torch.zeros(0, 64)})) == []
    assert _unused(rewrite(family, {stored: torch.zeros(8, 64)})) == [stored]


@pytest.mark.parametrize("type_name", ["float8", "int8"])
def test_quantised_shared_experts_of_no_width(rewrite, type_name):
    prefix = "model.layers.3.mlp.shared_experts."
    if type_name == "float8":
        method = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        values, scale = torch.float8_e4m3fn, "weight_scale_inv"
    else:
        method = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        **{"num_bits": 8, "type": "int", "symmetric": True},
                        **{"strategy": "channel", "dynamic": False},
                    },
                }
            },
        }
        values, scale = torch.int8, "weight_scale"
    tensors = {}
    for name, shape in zip(_PARTS, ((0, 64), (0, 64), (64, 0)), strict=True):
        tensors[f"{prefix}{name}_proj.weight"] = torch.zeros(shape, dtype=values)
        scales = (
            (-(-shape[0] // 16), -(-shape[1] // 16)) if type_name == "float8" else (shape[0], 1)
        )
        tensors[f"{prefix}{name}_proj.{scale}"] = torch.ones(scales)
    changed = {"n_shared_experts": 0, "quantization_config": method}
    others = {f"model.layers.2.mlp.shared_experts.{name}_proj.weight": None for name in _PARTS}
    assert _unused(rewrite("deepseek_v3", tensors | others, changed)) == []


def test_no_extra_layers(rewrite):
    stored = "model.layers.4.eh_proj.weight"
    folder = rewrite("deepseek_v3", {stored: _VECTOR}, {"num_nextn_predict_layers": 0})
    assert _unused(folder) == [stored]


def test_a_tensor_that_the_index_leaves_out(rewrite):
    folder = rewrite("mixtral")
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert _unused(folder) == []
    save_file(names | {"other": _VECTOR}, folder / "model.safetensors")
    assert _unused(folder) == ["other"]


def test_a_head_beside_the_embedding_it_is_tied_to(rewrite):
    folder = rewrite("qwen3_moe")
    assert not Checkpoint(folder).has_head_of_its_own()
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert not Checkpoint(rewrite("qwen3_moe", {"lm_head.weight": embedding})).has_head_of_its_own()
    embedding[-1, -1] += 1e-3  # the last value alone
    assert Checkpoint(rewrite("qwen3_moe", {"lm_head.weight": embedding})).has_head_of_its_own()
    assert not Checkpoint(rewrite("mixtral")).has_head_of_its_own()  # not tied
