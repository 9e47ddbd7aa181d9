"""Models of public sizes: their config.json, as far as from_hf reads it, is all that is needed."""

import json
from pathlib import Path

import pytest

from cli.screen import tells
from expertlane.errors import SpecError
from expertlane.spec.from_hf import from_hf, lacking_in_engine, read_model
from expertlane.spec.hf_config import FAMILIES, family_of, num_extra_layers
from expertlane.spec.model import PRESETS
from expertlane.spec.tensors import num_active_params, num_params, tensor_names

CONFIGS = json.loads(Path(__file__).with_name("published.json").read_text())
MIXERS = json.loads(Path(__file__).with_name("published_mixers.json").read_text())
# Scaling factors of Phi-3.5-MoE's positions are ones here: they change no size.
GROUPED = json.loads(Path(__file__).with_name("published_grouped.json").read_text())
ALL = CONFIGS | MIXERS | GROUPED
# Configurations were compared with second copies where there is one (aiconfigurator-core 0.12,
# transformers' defaults); of the others parameters add up to what the models' cards say.
# Step-3.5's vocabulary and windows are those of the copy that github.com/zml/zml has, and of
# Step-3.7-Flash's in aiconfigurator-core; Granite 4's sizes those of a copy without its
# multipliers.
NUMBERS = [
    # Parameters as the models' cards say, without layers for multi-token prediction and encoders of
    # images; billions of active ones, with as many digits as names or cards have.
    ("mixtral-8x7b", "mixtral", 46_702_792_704, "12.9"),
    ("qwen1.5-moe-a2.7b", "qwen2_moe", 14_315_784_192, "2.7"),
    ("qwen3-30b-a3b", "qwen3_moe", 30_532_122_624, "3.3"),
    ("olmoe-1b-7b", "olmoe", 6_919_161_856, "1.3"),
    ("deepseek-v2-lite", "deepseek_v2", 15_706_484_224, "2.4"),
    ("deepseek-v2", "deepseek_v2", 235_741_434_880, "21"),
    ("deepseek-v3", "deepseek_v3", 671_026_419_200, "37"),
    ("gpt-oss-20b", "gpt_oss", 20_914_757_184, "3.6"),
    ("glm-4.5-air", "glm4_moe", 106e9, "12"),
    ("kimi-k2", "deepseek_v3", 1026e9, "32"),
    ("dots.llm1", "dots1", 142e9, "14"),
    ("minimax-m2", "minimax_m2", 229e9, "10"),
    ("ernie-4.5-21b-a3b", "ernie4_5_moe", 21.8e9, "3"),
    ("qwen3-vl-30b-a3b", "qwen3_vl_moe", 30.5e9, "3.3"),
    ("granite-3.1-3b-a800m", "granitemoe", 3.3e9, "0.8"),
    ("glm-4.7-flash", "glm4_moe_lite", 30e9, "3"),
    ("qwen3-next-80b-a3b", "qwen3_next", 80e9, "3"),
    ("qwen3.5-397b-a17b", "qwen3_5_moe", 397e9, "17"),
    ("qwen3.5-122b-a10b", "qwen3_5_moe", 122e9, "10"),
    ("qwen3.6-35b-a3b", "qwen3_5_moe", 35e9, "3"),
    ("deepseek-v3.2", "deepseek_v32", 671e9, "37"),
    ("deepseek-v4-flash", "deepseek_v4", 284e9, "13"),
    ("deepseek-v4-pro", "deepseek_v4", 1573e9, "49"),  # 1.6 T on its card, rounded
    ("glm-5", "glm_moe_dsa", 744e9, "40"),
    ("glm-5.2", "glm_moe_dsa", 744e9, "40"),
    # The name's 48 leave out embedding and head: 48.4. The configuration is the published one.
    ("kimi-linear-48b-a3b", "kimi_linear", 49.1e9, "3"),
    # Its multipliers change neither sizes nor costs. `logits_scaling` alone is not from a copy of
    # the published file: 16, as Granite models of this width have.
    ("granite-4.0-h-small", "granitemoehybrid", 32.2e9, "9"),
    ("nemotron-3-nano-30b-a3b", "nemotron_h", 31.6e9, "3.2"),
    ("nemotron-3-super-120b-a12b", "nemotron_h", 120.6e9, "12"),
    ("jamba-v0.1", "jamba", 51.6e9, "12"),
    ("jamba-1.5-large", "jamba", 398e9, "94"),
    ("ling-3.0-flash", "bailing_hybrid", 124e9, "5.1"),
    ("ling-3.0-tiny", "bailing_hybrid", 7.9e9, None),
    ("ring-mini-linear-2.0", "bailing_moe_linear", 16.4e9, None),  # 16 in its report, rounded
    ("longcat-flash", "longcat_flash", 560e9, None),
    ("llama-4-maverick-17b-128e", "llama4", 400e9, "17"),
    ("llama-4-scout-17b-16e", "llama4", 108e9, "17"),  # 109 with the encoder of images
    # 428 with the encoder of images. The configuration is as far as public copies show it.
    ("minimax-m3", "minimax_m3_vl", 428e9, "23"),
    ("phi-3.5-moe", "phimoe", 41.9e9, "6.6"),
    ("hunyuan-a13b", "hunyuan_v1_moe", 80e9, "13"),
    ("hy3-preview", "hy_v3", 295e9, "21"),
    ("mimo-v2-flash", "mimo_v2_flash", 309e9, "15"),
    ("kimi-k2.5", "kimi_k25", 1026e9, "32"),
    ("step-3.5-flash", "step3p5", 196e9, "11"),
    ("step3", "step3_text", 316e9, "38"),
]


@pytest.mark.parametrize(("name", "family", "num", "active"), NUMBERS)
def test_parameters_add_up_to_the_published_numbers(name, family, num, active):
    """Active ones with the embedding and the output head, without the first, or without both.

    Cards differ in that. Up to the last digit, or 2.5 %: Qwen3's 3.3 are 3.35 with both.
    """
    assert family_of(ALL[name]) == family
    model = from_hf(ALL[name], name, weights=False)
    assert num_params(model) == (num if isinstance(num, int) else pytest.approx(num, rel=0.01))
    assert model.dtype == "bfloat16"
    if FAMILIES[family].is_planned_only:
        assert lacking_in_engine(model) is not None
        with pytest.raises(SpecError) as error:
            from_hf(ALL[name], name)
        assert tells(str(error.value), "not run plan simulate compare --engine")
    else:
        assert from_hf(ALL[name], name) == model
    if active is not None:
        found, of_table = num_active_params(model), model.vocab_size * model.hidden_size
        num_tables = 1 if model.tie_word_embeddings else 2
        counted = [(found - left_out * of_table) / 1e9 for left_out in range(num_tables + 1)]
        near = max(0.5 * 10 ** -len(active.partition(".")[2]), 0.025 * float(active))
        assert min(abs(each - float(active)) for each in counted) <= near


def test_active_parameters_of_a_model_by_hand():
    paper = PRESETS["paper"]
    expert = 2 * 8192 * 32_768
    assert num_params(paper) - num_active_params(paper) == 4 * (16 - 2) * expert


def test_kimi_k2_5_is_kimi_k2_inside():
    model, kimi = (from_hf(ALL[name], "kimi", weights=False) for name in ("kimi-k2.5", "kimi-k2"))
    assert [*tensor_names(model)] == [*tensor_names(kimi)]
    assert model.rope_scaling.factor == 64  # K2's is 32
    assert lacking_in_engine(model) == "tensors named as in kimi_k25"


def test_every_published_config_is_looked_at():
    assert {name for name, *_ in NUMBERS} == set(ALL)
    looked_at = {family for _, family, *_ in NUMBERS}
    assert looked_at == set(FAMILIES) - {"bailing_moe_v2_5"}  # no copy of its file was found


SPARSE = MIXERS["minimax-m3"]["text_config"]["sparse_attention_config"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi-3.5-moe", {"num_experts_per_tok": 3}, "num_experts_per_tok 3"),
        ("phi-3.5-moe", {"rope_scaling": {"type": "longrope"}}, "long_factor list 64"),
        ("phi-3.5-moe", {"rope_scaling": {"type": "own"}}, "rope_type own"),
        ("hunyuan-a13b", {"moe_topk": [8] * 31 + [4]}, "moe_topk 8"),
        ("hunyuan-a13b", {"moe_intermediate_size": [3072] * 31 + [1]}, "moe_intermediate_size"),
        ("hunyuan-a13b", {"num_shared_expert": 2}, "num_shared_expert 2"),
        ("hy3-preview", {"expert_hidden_dim": 1}, "expert_hidden_dim 1"),
        ("mimo-v2-flash", {"swa_head_dim": 128}, "swa_head_dim 128"),
        ("mimo-v2-flash", {"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern list 48"),
        ("mimo-v2-flash", {"moe_layer_freq": [2] * 48}, "moe_layer_freq list 48 0 1"),
        ("mimo-v2-flash", {"swa_num_key_value_heads": 7}, "num_key_value_heads 7 64 heads"),
        ("mimo-v2-flash", {"v_head_dim": 127, "swa_v_head_dim": 127}, "head_dim 192 127 even"),
        ("step-3.5-flash", {"moe_layers_enum": "3;4"}, "moe_layers_enum 3;4 numbers commas"),
        ("step-3.5-flash", {"attention_other_setting": 3}, "attention_other_setting 3 object"),
        ("step-3.5-flash", {"attention_other_setting": {"head_dim": 64}}, "head_dim 64"),
        ("step-3.5-flash", {"partial_rotary_factors": [1.0]}, "partial_rotary_factors 1 45 layers"),
        ("qwen3-next-80b-a3b", {"layer_types": ["sliding_attention"] * 48}, "sliding_attention"),
        ("qwen3-next-80b-a3b", {"layer_types": ["full_attention"]}, "layer_types 1 48 layers"),
        ("qwen3-next-80b-a3b", {"linear_num_key_heads": 5}, "num_key_heads 5 divide 32 heads"),
        ("qwen3-next-80b-a3b", {"linear_num_key_heads": 0}, "linear_num_key_heads 0"),
        ("deepseek-v3.2", {"index_topk": None}, "index_topk null"),
        ("deepseek-v3.2", {"q_lora_rank": None}, "indexer q_lora_rank"),
        ("glm-5.2", {"indexer_types": ["full", "shared"]}, "indexer_types 2 78 layers"),
        ("glm-5.2", {"indexer_types": ["shared"] * 78}, "first layer must have its own"),
        ("glm-5.2", {"indexer_types": ["full", "own"] * 39}, "indexer_types own full shared"),
        ("minimax-m3", {"moe_layer_freq": [0, 1]}, "moe_layer_freq list 60 0 1"),
        ("minimax-m3", {"layer_types": ["minimax_m3_sparse"]}, "layer_types 1 60 layers"),
        ("minimax-m3", {"layer_types": ["sliding_attention"] * 60}, "sliding_attention"),
        ("minimax-m3", {"num_key_value_heads": 8}, "indexer num_heads 4 keys and values 8"),
        ("minimax-m3", {"sparse_attention_config": 3}, "sparse_attention_config 3 object"),
        ("deepseek-v4-flash", {"compress_ratios": [0, 8]}, "compress_ratios 8 0 4 128"),
        ("deepseek-v4-flash", {"compress_ratios": [0, 4]}, "compress_ratios 2 43 layers"),
        ("deepseek-v4-flash", {"layer_types": ["full_attention"]}, "layer_types full_attention"),
        ("deepseek-v4-flash", {"mlp_layer_types": ["moe"]}, "mlp_layer_types 1 43 layers"),
        ("deepseek-v4-flash", {"compress_rates": 4}, "compress_rates 4 object"),
        ("deepseek-v4-flash", {"o_groups": 7}, "o_groups 7 divide 64 heads"),
        ("deepseek-v4-flash", {"sliding_window": None}, "sliding_window null"),
        ("deepseek-v4-flash", {"hc_mult": 0}, "hc_mult 0"),
        ("kimi-linear-48b-a3b", {"linear_attn_config": 3}, "linear_attn_config 3 object"),
        ("kimi-linear-48b-a3b", {"linear_attn_config": {"a": 1}}, "linear_attn_config a num_heads"),
        (
            "kimi-linear-48b-a3b",
            {"linear_attn_config": {"kda_layers": [1, 2]}},
            "kda_layers full_attn_layers each layer once 27",
        ),
        ("deepseek-v4-flash", {"compress_rates": {"heavy": 64}}, "compress_rates heavy"),
        ("nemotron-3-nano-30b-a3b", {"hybrid_override_pattern": ""}, "hybrid_override_pattern M E"),
        ("nemotron-3-nano-30b-a3b", {"conv_kernel": 0}, "conv_kernel 0"),
        (
            "nemotron-3-super-120b-a12b",
            {"num_nextn_predict_layers": -1},
            "num_nextn_predict_layers",
        ),
        (
            "nemotron-3-super-120b-a12b",
            {"mtp_hybrid_override_pattern": 1.5},
            "mtp_hybrid_override_pattern 1.5 string",
        ),
        ("granite-4.0-h-small", {"mamba_d_head": 32}, "mamba_d_head 32 128 8192"),
        ("nemotron-3-nano-30b-a3b", {"hybrid_override_pattern": "MX"}, "hybrid_override_pattern"),
        ("llama-4-scout-17b-16e", {"no_rope_layers": [0]}, "no_rope_layers 1 48 layers"),
        ("nemotron-3-nano-30b-a3b", {"mlp_hidden_act": "silu"}, "hidden_act silu"),
        ("jamba-v0.1", {"attn_layer_offset": 8}, "attn_layer_offset 8 under attn_layer_period"),
        ("jamba-v0.1", {"mamba_dt_rank": "few"}, "mamba_dt_rank few"),
        ("longcat-flash", {"moe_topk": 800}, "num_experts_per_tok 800 only 768 experts"),
        ("ling-3.0-tiny", {"layer_group_size": 5}, "24 layers last whole group 5"),
        ("ring-mini-linear-2.0", {"group_norm_size": 3}, "norm_groups 3 divide 16 heads"),
        (
            "minimax-m3",
            {"sparse_attention_config": SPARSE | {"sparse_score_type": "mean"}},
            "sparse_score_type mean",
        ),
        (
            "minimax-m3",
            {"sparse_attention_config": SPARSE | {"sparse_topk_block": 8}},
            "sparse_topk_block did you mean sparse_topk_blocks",
        ),
        (
            "minimax-m3",
            {"sparse_attention_config": SPARSE | {"sparse_init_block": 1}},
            "sparse_init_block 1",
        ),
        (
            "minimax-m3",
            {"sparse_attention_config": SPARSE | {"sparse_local_block": 0}},
            "index_local_blocks 0 from 1 16",
        ),
        (
            "minimax-m3",
            {"sparse_attention_config": SPARSE | {"sparse_topk_blocks": 0}},
            "sparse_topk_blocks 0",
        ),
        (
            "minimax-m3",
            {"sparse_attention_config": SPARSE | {"sparse_disable_index_value": [0] * 60}},
            "sparse_disable_index_value 0 must be 1",
        ),
        (
            "minimax-m3",
            {"sparse_attention_config": SPARSE | {"sparse_attention_freq": [0, 0, 0, 1]}},
            "sparse_attention_freq list 60 0 1",
        ),
        (
            "minimax-m3",
            {"sparse_attention_config": SPARSE | {"use_sparse_attention": False}},
            "use_sparse_attention False",
        ),
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
        ("minimax-m2", {"rotary_dim": 63}, "63 rotated"),
        ("ernie-4.5-21b-a3b", {"moe_norm_min": 0.1}, "moe_norm_min 0.1"),
        ("granite-3.1-3b-a800m", {"residual_multiplier": 0}, "residual_multiplier 0"),
        ("dots.llm1", {"n_shared_experts": None}, "n_shared_experts null"),
    ],
)
def test_what_cannot_be_computed_is_named(name, changes, message):
    with pytest.raises(SpecError) as error:
        from_hf(_changed(ALL[name], changes), "mine", weights=False)
    assert tells(str(error.value), message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ALL)
def test_a_value_that_a_family_cannot_have_is_named(name):
    for key in FAMILIES[family_of(ALL[name])].expects:
        with pytest.raises(SpecError) as error:
            from_hf(_changed(ALL[name], {key: "another"}), "mine", weights=False)
        assert str(error.value) == f"model mine: {key} 'another' is not supported"


def test_layers_with_an_indexer_have_one_meaning_however_they_are_told():
    told = MIXERS["glm-5.2"]
    model = from_hf(told, weights=False)
    assert model.shared_choice_layers[:6] == (3, 4, 5, 7, 8, 9)
    assert len(model.shared_choice_layers) == 57
    types = told["indexer_types"]
    by_step = {key: value for key, value in told.items() if key != "indexer_types"}
    pattern = "".join({"full": "F", "shared": "S"}[each] for each in types)
    for each in ({}, {"index_topk_pattern": pattern}, {"index_topk_pattern": types}):
        assert from_hf(by_step | each, weights=False) == model
    told = MIXERS["minimax-m3"]
    model = from_hf(told, weights=False)
    assert model.unindexed_layers == model.dense_layers == (0, 1, 2)
    flat = {"index_n_heads": 4, "index_head_dim": 128, "sparse_attention_config": None}
    flat["layer_types"] = ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57
    flat |= {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57, "moe_layer_freq": None}
    assert from_hf(_changed(told, flat), weights=False) == model
    alone = told["text_config"] | {"dtype": "bfloat16"}
    assert from_hf(alone, weights=False) == model
    dense = from_hf(_changed(told, {"sparse_attention_config": None}), weights=False)
    assert (dense.indexer, dense.unindexed_layers) == (None, ())


def _changed(config, changes):
    """Changed where a language model says what it is."""
    text = config.get("text_config")
    return config | (changes if text is None else {"text_config": text | changes})


def test_longcat_has_as_many_active_as_its_report_says():
    """18.6 to 31.3 billion, about 27 on average."""
    model = from_hf(MIXERS["longcat-flash"], weights=False)
    embedding = model.vocab_size * model.hidden_size
    least, mean, most = ((num_active_params(model, num) - embedding) / 1e9 for num in (0, 8, 12))
    assert least == pytest.approx(18.6, rel=0.01)
    assert mean == pytest.approx(27, rel=0.01)
    assert most == pytest.approx(31.3, rel=0.01)


def test_old_and_new_names_of_deepseek_v4_are_one():
    """transformers 5 writes types of layers, rates and positions of both kinds of layers."""
    from spec.reference import their_config

    for name in ("deepseek-v4-flash", "deepseek-v4-pro"):
        given = MIXERS[name]
        for left_out in ("", "compress_ratios", "num_hash_layers", "qk_rope_head_dim"):
            told = {key: each for key, each in given.items() if key != left_out}
            same = {key: given[key] for key in ("architectures", "torch_dtype")} | {"dtype": None}
            written = their_config(told).to_dict() | same
            assert from_hf(written, "a", weights=False) == from_hf(told, "a", weights=False)


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


def test_an_unknown_architecture_is_refused_with_the_nearest_known_one():
    told = MIXERS["deepseek-v3.2"] | {"compress_rates": {}, "hc_mult": 4}
    with pytest.raises(SpecError) as error:
        family_of(told | {"architectures": ["DeepseekV9ForCausalLM"]})
    assert tells(
        str(error.value), "DeepseekV9ForCausalLM nearest deepseek_v32 compress_rates hc_mult"
    )
    told = CONFIGS["minimax-m2"] | {"memory_block_size": 128}
    with pytest.raises(SpecError) as error:
        family_of(told | {"architectures": ["MiniMaxM2LinearForCausalLM"]})
    assert tells(str(error.value), "nearest minimax_m2 memory_block_size list families")
    dense = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense |= {"intermediate_size": 4, "vocab_size": 9, "max_position_embeddings": 7}
    with pytest.raises(SpecError) as error:
        family_of(dense | {"architectures": ["LlamaForCausalLM"]})
    assert tells(str(error.value), "LlamaForCausalLM names no experts")


@pytest.mark.parametrize(
    "config",
    [{}, {"architectures": ["X"]}, {"architectures": [3, 4]}, {"model_type": {}}],
)
def test_one_that_tells_too_little_is_refused_without_a_nearest(config):
    with pytest.raises(SpecError) as error:
        family_of(config)
    assert tells(str(error.value), "not supported expertlane list families")
    assert "nearest" not in str(error.value)


@pytest.mark.parametrize("name", ALL)
def test_a_published_one_under_another_name_differs_in_nothing(name):
    config = ALL[name]
    (architecture,) = config.get("architectures") or [FAMILIES[family_of(config)].architecture]
    with pytest.raises(SpecError) as error:
        family_of(config | {"architectures": [architecture.replace("For", "9For")]})
    assert tells(str(error.value), f"nearest {family_of(config)} all of its fields")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": "Qwen3_5MoeForCausalLM"}, "architectures Qwen3_5MoeForCausalLM list"),
        ({"text_config": [1]}, "text_config [1] object"),
        ({"text_config": None}, "config.json no hidden_size no num_experts"),
        (
            {"text_config": {"text_config": MIXERS["qwen3.5-397b-a17b"]["text_config"]}},
            "config.json no hidden_size no num_experts in text_config",
        ),
    ],
)
def test_one_without_a_language_model_is_refused(tmp_path, changes, message):
    told = json.dumps(MIXERS["qwen3.5-397b-a17b"] | changes)
    (tmp_path / "config.json").write_text(told)
    with pytest.raises(SpecError) as error:
        read_model(tmp_path, "mine", weights=False)
    assert tells(str(error.value), message)
    assert "\n" not in str(error.value)
    assert "\n" not in str(error.value)
