"""Models of public sizes: their config.json, as far as from_hf reads it, is all that is needed."""

import json
from pathlib import Path

import pytest

from cli.screen import tells
from expertlane.errors import SpecError
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import family_of, num_extra_layers
from expertlane.spec.model import num_active_params, num_params

CONFIGS = json.loads(Path(__file__).with_name("published.json").read_text())
MIXERS = json.loads(Path(__file__).with_name("published_mixers.json").read_text())


@pytest.mark.parametrize(
    ("name", "family", "num"),
    [  # as the models' cards say
        ("mixtral-8x7b", "mixtral", 46_702_792_704),
        ("qwen1.5-moe-a2.7b", "qwen2_moe", 14_315_784_192),
        ("qwen3-30b-a3b", "qwen3_moe", 30_532_122_624),
        ("olmoe-1b-7b", "olmoe", 6_919_161_856),
        ("deepseek-v2-lite", "deepseek_v2", 15_706_484_224),
        ("deepseek-v2", "deepseek_v2", 235_741_434_880),
        ("deepseek-v3", "deepseek_v3", 671_026_419_200),
        ("gpt-oss-20b", "gpt_oss", 20_914_757_184),
        ("glm-4.5-air", "glm4_moe", 106e9),
        ("kimi-k2", "deepseek_v3", 1026e9),
        ("dots.llm1", "dots1", 142e9),
        ("minimax-m2", "minimax_m2", 229e9),
        ("ernie-4.5-21b-a3b", "ernie4_5_moe", 21.8e9),
        ("qwen3-vl-30b-a3b", "qwen3_vl_moe", 30.5e9),
        ("granite-3.1-3b-a800m", "granitemoe", 3.3e9),
        ("glm-4.7-flash", "glm4_moe_lite", 30e9),
    ],
)
def test_parameters_add_up_to_the_published_number(name, family, num):
    assert family_of(CONFIGS[name]) == family
    model = from_hf(CONFIGS[name])
    assert num_params(model) == (num if isinstance(num, int) else pytest.approx(num, rel=0.01))
    assert model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "family", "num"),
    [  # as the models' cards say, without layers for multi-token prediction
        ("qwen3-next-80b-a3b", "qwen3_next", 80e9),
        ("qwen3.5-397b-a17b", "qwen3_5_moe", 397e9),
        ("qwen3.5-122b-a10b", "qwen3_5_moe", 122e9),
        ("qwen3.6-35b-a3b", "qwen3_5_moe", 35e9),
        ("deepseek-v3.2", "deepseek_v32", 671e9),
        ("glm-5", "glm_moe_dsa", 744e9),
        ("kimi-linear-48b-a3b", "kimi_linear", 49e9),  # as the hub counts; its name says 48
        ("granite-4.0-h-small", "granitemoehybrid", 32e9),
        ("nemotron-3-nano-30b-a3b", "nemotron_h", 31.6e9),
        ("nemotron-3-super-120b-a12b", "nemotron_h", 120.6e9),
        ("jamba-v0.1", "jamba", 51.6e9),
        ("jamba-1.5-large", "jamba", 398e9),
        ("ling-3.0-flash", "bailing_hybrid", 124e9),
        ("ling-3.0-tiny", "bailing_hybrid", 7.9e9),
        ("ring-mini-linear-2.0", "bailing_moe_linear", 16.4e9),  # 16 in its report, rounded
        ("longcat-flash", "longcat_flash", 560e9),
        ("llama-4-maverick-17b-128e", "llama4", 400e9),
        ("llama-4-scout-17b-16e", "llama4", 108e9),  # 109 with the encoder of images
    ],
)
def test_models_with_mixers_add_up_too(name, family, num):
    assert family_of(MIXERS[name]) == family
    model = from_hf(MIXERS[name], name, weights=False)
    assert num_params(model) == pytest.approx(num, rel=0.01)
    assert model.dtype == "bfloat16"
    assert model.planned_only is not None
    with pytest.raises(SpecError) as error:
        from_hf(MIXERS[name], name)
    assert tells(str(error.value), "not run plan simulate compare --engine")


def test_every_published_config_is_looked_at():
    assert len(CONFIGS) == 16
    assert len(MIXERS) == 18


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3-next-80b-a3b", {"layer_types": ["sliding_attention"] * 48}, "sliding_attention"),
        ("qwen3-next-80b-a3b", {"layer_types": ["full_attention"]}, "layer_types 1 48 layers"),
        ("qwen3-next-80b-a3b", {"linear_num_key_heads": 5}, "num_key_heads 5 divide 32 heads"),
        ("qwen3-next-80b-a3b", {"linear_num_key_heads": 0}, "linear_num_key_heads 0"),
        ("deepseek-v3.2", {"index_topk": None}, "index_topk null"),
        ("deepseek-v3.2", {"q_lora_rank": None}, "indexer q_lora_rank"),
        ("glm-5", {"indexer_types": ["full", "shared"] * 39}, "shared by layers"),
        ("glm-5", {"index_topk_freq": 4}, "index_topk_freq 4"),
        ("kimi-linear-48b-a3b", {"linear_attn_config": 3}, "linear_attn_config 3 object"),
        ("kimi-linear-48b-a3b", {"mla_use_nope": False}, "mla_use_nope False"),
        ("granite-4.0-h-small", {"mamba_d_head": 32}, "mamba_d_head 32 128 8192"),
        ("nemotron-3-nano-30b-a3b", {"hybrid_override_pattern": "MX"}, "hybrid_override_pattern"),
        ("llama-4-scout-17b-16e", {"no_rope_layers": [0]}, "no_rope_layers 1 48 layers"),
        ("nemotron-3-nano-30b-a3b", {"mlp_hidden_act": "silu"}, "hidden_act silu"),
        ("jamba-v0.1", {"attn_layer_offset": 8}, "attn_layer_offset 8 under attn_layer_period"),
        ("jamba-v0.1", {"mamba_dt_rank": "few"}, "mamba_dt_rank few"),
        ("longcat-flash", {"zero_expert_type": "copy"}, "zero_expert_type copy"),
        ("longcat-flash", {"router_bias": True}, "router_bias True"),
        ("longcat-flash", {"moe_topk": 800}, "num_experts_per_tok 800 only 768 experts"),
        ("ling-3.0-tiny", {"no_kda_lora": False}, "no_kda_lora False"),
        ("ling-3.0-tiny", {"layer_group_size": 5}, "24 layers last whole group 5"),
        ("ring-mini-linear-2.0", {"use_bias": True}, "use_bias True"),
        ("ring-mini-linear-2.0", {"linear_silu": True}, "linear_silu True"),
        ("ring-mini-linear-2.0", {"group_norm_size": 3}, "norm_groups 3 divide 16 heads"),
        ("ring-mini-linear-2.0", {"score_function": "softmax"}, "score_function softmax"),
    ],
)
def test_mixers_that_cannot_be_computed_are_named(name, changes, message):
    with pytest.raises(SpecError) as error:
        from_hf(_changed(MIXERS[name], changes), "mine", weights=False)
    assert tells(str(error.value), message)
    assert "\n" not in str(error.value)


def _changed(config, changes):
    """Changed where a language model says what it is."""
    text = config.get("text_config")
    return config | (changes if text is None else {"text_config": text | changes})


@pytest.mark.parametrize(
    ("name", "num"),
    [  # as the models' cards say
        ("jamba-v0.1", 12e9),
        ("jamba-1.5-large", 94e9),
        ("ling-3.0-flash", 5.1e9),
    ],
)
def test_active_parameters_are_those_that_cards_name(name, num):
    model = from_hf(MIXERS[name], name, weights=False)
    assert num_active_params(model) == pytest.approx(num, rel=0.05)


def test_longcat_has_as_many_active_as_its_report_says():
    """18.6 to 31.3 billion, about 27 on average."""
    model = from_hf(MIXERS["longcat-flash"], weights=False)
    least, mean, most = (num_active_params(model, num) / 1e9 for num in (0, 8, 12))
    assert least == pytest.approx(18.6, rel=0.01)
    assert mean == pytest.approx(27, rel=0.01)
    assert most == pytest.approx(31.3, rel=0.01)


def test_old_and_new_names_of_layers_are_one():
    config = MIXERS["granite-4.0-h-small"]
    new = [
        "full_attention" if kind == "attention" else "linear_attention"
        for kind in config["layer_types"]
    ]
    assert from_hf(config | {"layer_types": new}, weights=False) == from_hf(config, weights=False)
    config = MIXERS["nemotron-3-nano-30b-a3b"]
    names = {"M": "mamba", "*": "attention", "E": "moe"}
    listed = {key: each for key, each in config.items() if key != "hybrid_override_pattern"}
    listed["layers_block_type"] = [names[each] for each in config["hybrid_override_pattern"]]
    assert from_hf(listed, weights=False) == from_hf(config, weights=False)


def test_kimi_k2_is_deepseek_v3_whatever_it_calls_itself():
    kimi = CONFIGS["kimi-k2"]
    assert from_hf(kimi, "k") == from_hf(kimi | {"model_type": "deepseek_v3"}, "k")
    assert num_extra_layers(kimi) == 0


def test_granite_multiplies():
    model = from_hf(CONFIGS["granite-3.1-3b-a800m"])
    assert model.softmax_scale == 1 / 64
    assert model.hidden_norm_eps == pytest.approx(1e-6 / 0.22**2)
    assert (model.embedding_multiplier, model.logits_scaling) == (12, 6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "glm-4.5-air",
            {"head_dim": 20, "partial_rotary_factor": 0.25},
            "head_dim 20 5 rotary positions even",
        ),
        ("glm-4.5-air", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ("glm-4.7-flash", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("glm-4.7-flash", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types list 47 layer"),
        (
            "glm-4.7-flash",
            {"mlp_layer_types": ["dense"] * 46 + ["mamba"]},
            "mlp_layer_types mamba dense",
        ),
        ("minimax-m2", {"attn_type_list": [0] * 62}, "attn_type_list [0, 0, "),
        ("minimax-m2", {"shared_intermediate_size": 64}, "shared_intermediate_size 64"),
        ("minimax-m2", {"rotary_dim": 63}, "63 rotated"),
        ("ernie-4.5-21b-a3b", {"use_bias": True}, "use_bias True"),
        ("ernie-4.5-21b-a3b", {"moe_norm_min": 0.1}, "moe_norm_min 0.1"),
        ("granite-3.1-3b-a800m", {"residual_multiplier": 0}, "residual_multiplier 0"),
        ("dots.llm1", {"n_shared_experts": None}, "n_shared_experts null"),
    ],
)
def test_what_cannot_be_computed_is_named(name, changes, message):
    with pytest.raises(SpecError) as error:
        from_hf(CONFIGS[name] | changes, "mine")
    assert str(error.value).startswith("model mine: ")
    assert tells(str(error.value), message)
    assert "\n" not in str(error.value)
