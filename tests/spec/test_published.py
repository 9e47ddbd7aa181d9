"""Models of public sizes: their config.json, as far as from_hf reads it, is all that is needed."""

import json
from importlib.util import find_spec
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
# Where a second copy of a config.json is, in aiconfigurator-core 0.12 (model_configs/), all of its
# fields are as here, save what a test below names.
COPIES = {
    "mixtral-8x7b": "mistralai--Mixtral-8x7B-v0.1",
    "gpt-oss-20b": "openai--gpt-oss-20b",
    "deepseek-v3": "deepseek-ai--DeepSeek-V3",
    "kimi-k2": "moonshotai--Kimi-K2-Instruct",
    "qwen3-30b-a3b": "Qwen--Qwen3-30B-A3B",
    "qwen3.5-397b-a17b": "Qwen--Qwen3.5-397B-A17B",
    "qwen3.5-122b-a10b": "Qwen--Qwen3.5-122B-A10B",
    "qwen3.6-35b-a3b": "nvidia--Qwen3.6-35B-A3B-NVFP4",
    "deepseek-v3.2": "deepseek-ai--DeepSeek-V3.2",
    "glm-5": "zai-org--GLM-5",
    "nemotron-3-nano-30b-a3b": "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nemotron-3-super-120b-a12b": "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
    "llama-4-maverick-17b-128e": "meta-llama--Llama-4-Maverick-17B-128E-Instruct",
    "llama-4-scout-17b-16e": "meta-llama--Llama-4-Scout-17B-16E-Instruct",
    "mimo-v2-flash": "XiaomiMiMo--MiMo-V2-Flash",
    "kimi-k2.5": "moonshotai--Kimi-K2.5",
}
# Sizes that are the defaults of their transformers classes (5.24), which were made for them; and
# the fields that are not.
OF_CLASSES = {
    "jamba-v0.1": set(),
    "longcat-flash": set(),
    "hy3-preview": {"max_position_embeddings"},
    "step-3.5-flash": {"max_position_embeddings", "vocab_size", "sliding_window"},
}
# The others (Phi-3.5-MoE, Hunyuan-A13B, Step-3, Granite 4, Ling, Ring, Jamba 1.5, Kimi-Linear,
# Qwen3-Next and those of published.json) had no second copy to compare with: their parameters add
# up to what the models' cards say. Step-3.5's vocabulary and windows are those of the copy that
# github.com/zml/zml has, and of Step-3.7-Flash's in aiconfigurator-core; Granite 4's sizes those
# of a copy without its multipliers.


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
        ("deepseek-v4-flash", "deepseek_v4", 284e9),
        ("deepseek-v4-pro", "deepseek_v4", 1573e9),  # 1.6 T on its card, rounded
        ("glm-5", "glm_moe_dsa", 744e9),
        ("glm-5.2", "glm_moe_dsa", 744e9),
        # The name's 48 leave out embedding and head: 48.4. The configuration is the published one.
        ("kimi-linear-48b-a3b", "kimi_linear", 49.1e9),
        # Its multipliers change neither sizes nor costs. `logits_scaling` alone is not from a copy
        # of the published file: 16, as Granite models of this width have.
        ("granite-4.0-h-small", "granitemoehybrid", 32.2e9),
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
        # 428 with the encoder of images. The configuration is as far as public copies show it.
        ("minimax-m3", "minimax_m3_vl", 428e9),
    ],
)
def test_models_with_mixers_add_up_too(name, family, num):
    assert family_of(MIXERS[name]) == family
    model = from_hf(MIXERS[name], name, weights=False)
    assert num_params(model) == pytest.approx(num, rel=0.01)
    assert model.dtype == "bfloat16"
    assert lacking_in_engine(model) is not None
    with pytest.raises(SpecError) as error:
        from_hf(MIXERS[name], name)
    assert tells(str(error.value), "not run plan simulate compare --engine")


@pytest.mark.parametrize(
    ("name", "family", "num"),
    [  # as the models' cards say, without layers for multi-token prediction and encoders of images
        ("phi-3.5-moe", "phimoe", 41.9e9),
        ("hunyuan-a13b", "hunyuan_v1_moe", 80e9),
        ("hy3-preview", "hy_v3", 295e9),
        ("mimo-v2-flash", "mimo_v2_flash", 309e9),
        ("step-3.5-flash", "step3p5", 196e9),
        ("step3", "step3_text", 316e9),
    ],
)
def test_models_of_grouped_queries_that_are_planned_alone_add_up_too(name, family, num):
    assert family_of(GROUPED[name]) == family
    model = from_hf(GROUPED[name], name, weights=False)
    assert num_params(model) == pytest.approx(num, rel=0.01)
    assert model.dtype == "bfloat16"
    assert lacking_in_engine(model) is not None
    with pytest.raises(SpecError) as error:
        from_hf(GROUPED[name], name)
    assert tells(str(error.value), "not run plan simulate compare --engine")


def _all_fields(config):
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


@pytest.mark.parametrize("name", COPIES)
def test_configurations_are_those_of_another_copy(name):
    found = find_spec("aiconfigurator_core")
    if found is None or found.origin is None:
        pytest.skip("aiconfigurator-core is not installed (extra: calibration)")
    file = Path(found.origin).with_name("model_configs") / f"{COPIES[name]}_config.json"
    ours, theirs = (
        _all_fields(each)
        for each in ((CONFIGS | MIXERS | GROUPED)[name], json.loads(file.read_text()))
    )
    # Ends of a text are told beside the configuration; those of NVIDIA are quantised.
    apart = {"architectures", "quantization_config", "transformers_version", "eos_token_id"}
    apart |= {"torch_dtype", "dtype", "text_config", "vision_config", "auto_map", "ep_size"}
    of_both = (ours.keys() & theirs.keys()) - apart
    assert {key: ours[key] for key in of_both} == {key: theirs[key] for key in of_both}
    assert ours.keys() - theirs.keys() - apart <= {"mlp_only_layers"}


@pytest.mark.parametrize("name", OF_CLASSES)
def test_sizes_are_those_that_the_class_was_made_for(name):
    transformers = pytest.importorskip("transformers")
    config = (CONFIGS | MIXERS | GROUPED)[name]
    own = transformers.CONFIG_MAPPING[config["model_type"]]()
    differing = {
        key
        for key, value in config.items()
        if type(value) is int and getattr(own, key, value) not in (value, None)
    }
    assert differing <= OF_CLASSES[name] | {"num_nextn_predict_layers"}


@pytest.mark.parametrize(
    ("name", "num"),
    [  # billions, with as many digits as the models' names or cards have
        ("mixtral-8x7b", "12.9"),
        ("qwen1.5-moe-a2.7b", "2.7"),
        ("qwen3-30b-a3b", "3.3"),
        ("qwen3-vl-30b-a3b", "3.3"),
        ("olmoe-1b-7b", "1.3"),
        ("deepseek-v2-lite", "2.4"),
        ("deepseek-v2", "21"),
        ("deepseek-v3", "37"),
        ("gpt-oss-20b", "3.6"),
        ("glm-4.5-air", "12"),
        ("glm-4.7-flash", "3"),
        ("kimi-k2", "32"),
        ("dots.llm1", "14"),
        ("minimax-m2", "10"),
        ("ernie-4.5-21b-a3b", "3"),
        ("granite-3.1-3b-a800m", "0.8"),
        ("qwen3-next-80b-a3b", "3"),
        ("qwen3.5-397b-a17b", "17"),
        ("qwen3.5-122b-a10b", "10"),
        ("qwen3.6-35b-a3b", "3"),
        ("deepseek-v3.2", "37"),
        ("deepseek-v4-flash", "13"),
        ("deepseek-v4-pro", "49"),
        ("glm-5", "40"),
        ("glm-5.2", "40"),
        ("minimax-m3", "23"),
        ("kimi-linear-48b-a3b", "3"),
        ("granite-4.0-h-small", "9"),
        ("nemotron-3-nano-30b-a3b", "3.2"),
        ("nemotron-3-super-120b-a12b", "12"),
        ("jamba-v0.1", "12"),
        ("jamba-1.5-large", "94"),
        ("ling-3.0-flash", "5.1"),
        ("llama-4-maverick-17b-128e", "17"),
        ("llama-4-scout-17b-16e", "17"),
        ("phi-3.5-moe", "6.6"),
        ("hunyuan-a13b", "13"),
        ("hy3-preview", "21"),
        ("mimo-v2-flash", "15"),
        ("kimi-k2.5", "32"),
        ("step-3.5-flash", "11"),
        ("step3", "38"),
    ],
)
def test_active_parameters_are_the_published_number(name, num):
    """With the embedding and the output head, without the first, or without both: cards differ.

    Up to the last digit, or 2.5 %: Qwen3's 3.3 are 3.35 with both.
    """
    model = from_hf((CONFIGS | MIXERS | GROUPED)[name], name, weights=False)
    active, table = num_active_params(model), model.vocab_size * model.hidden_size
    num_tables = 1 if model.tie_word_embeddings else 2
    counted = [(active - left_out * table) / 1e9 for left_out in range(num_tables + 1)]
    near = max(0.5 * 10 ** -len(num.partition(".")[2]), 0.025 * float(num))
    assert min(abs(each - float(num)) for each in counted) <= near


def test_active_parameters_of_a_model_by_hand():
    paper = PRESETS["paper"]
    expert = 2 * 8192 * 32_768
    assert num_params(paper) - num_active_params(paper) == 4 * (16 - 2) * expert


def test_kimi_k2_5_is_kimi_k2_inside():
    model = from_hf(GROUPED["kimi-k2.5"], "kimi", weights=False)
    kimi = from_hf(CONFIGS["kimi-k2"], "kimi", weights=False)
    assert num_params(model) == num_params(kimi)
    assert [*tensor_names(model)] == [*tensor_names(kimi)]
    assert model.rope_scaling.factor == 64  # K2's is 32
    assert lacking_in_engine(model) == "tensors named as in kimi_k25"
    assert family_of(GROUPED["kimi-k2.5"]) == "kimi_k25"
    with pytest.raises(SpecError) as error:
        from_hf(GROUPED["kimi-k2.5"], "kimi")
    assert tells(str(error.value), "KimiK25ForConditionalGeneration plan simulate")


def test_every_published_config_is_looked_at():
    assert len(GROUPED) == 7
    looked_at = {family_of(each) for each in (CONFIGS | MIXERS | GROUPED).values()}
    assert looked_at == set(FAMILIES) - {"bailing_moe_v2_5"}  # no copy of its file was found
    assert len(CONFIGS) == 16
    assert len(MIXERS) == 22


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi-3.5-moe", {"num_experts_per_tok": 3}, "num_experts_per_tok 3"),
        ("phi-3.5-moe", {"rope_scaling": {"type": "longrope"}}, "long_factor list 64"),
        ("phi-3.5-moe", {"rope_scaling": {"type": "own"}}, "rope_type own"),
        ("hunyuan-a13b", {"use_cla": True}, "use_cla True"),
        ("hunyuan-a13b", {"moe_topk": [8] * 31 + [4]}, "moe_topk 8"),
        ("hunyuan-a13b", {"moe_intermediate_size": [3072] * 31 + [1]}, "moe_intermediate_size"),
        ("hunyuan-a13b", {"num_shared_expert": 2}, "num_shared_expert 2"),
        ("hy3-preview", {"qk_norm": False}, "qk_norm False"),
        ("hy3-preview", {"expert_hidden_dim": 1}, "expert_hidden_dim 1"),
        ("mimo-v2-flash", {"swa_head_dim": 128}, "swa_head_dim 128"),
        ("mimo-v2-flash", {"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern list 48"),
        ("mimo-v2-flash", {"moe_layer_freq": [2] * 48}, "moe_layer_freq list 48 0 1"),
        ("mimo-v2-flash", {"swa_num_key_value_heads": 7}, "num_key_value_heads 7 64 heads"),
        ("mimo-v2-flash", {"v_head_dim": 127, "swa_v_head_dim": 127}, "head_dim 192 127 even"),
        ("mimo-v2-flash", {"n_shared_experts": 1}, "n_shared_experts 1"),
        ("step-3.5-flash", {"use_head_wise_attn_gate": False}, "use_head_wise_attn_gate False"),
        ("step-3.5-flash", {"moe_layers_enum": "3;4"}, "moe_layers_enum 3;4 numbers commas"),
        ("step-3.5-flash", {"attention_other_setting": 3}, "attention_other_setting 3 object"),
        ("step-3.5-flash", {"attention_other_setting": {"head_dim": 64}}, "head_dim 64"),
        ("step-3.5-flash", {"partial_rotary_factors": [1.0]}, "partial_rotary_factors 1 45 layers"),
        ("step3", {"num_attention_groups": 2}, "num_attention_groups 2"),
        ("step3", {"use_mfa": False}, "use_mfa False"),
    ],
)
def test_grouped_queries_that_cannot_be_computed_are_named(name, changes, message):
    with pytest.raises(SpecError) as error:
        from_hf(_changed(GROUPED[name], changes), "mine", weights=False)
    assert tells(str(error.value), message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3-next-80b-a3b", {"layer_types": ["sliding_attention"] * 48}, "sliding_attention"),
        ("qwen3-next-80b-a3b", {"layer_types": ["full_attention"]}, "layer_types 1 48 layers"),
        ("qwen3-next-80b-a3b", {"linear_num_key_heads": 5}, "num_key_heads 5 divide 32 heads"),
        ("qwen3-next-80b-a3b", {"linear_num_key_heads": 0}, "linear_num_key_heads 0"),
        ("deepseek-v3.2", {"index_topk": None}, "index_topk null"),
        ("deepseek-v3.2", {"q_lora_rank": None}, "indexer q_lora_rank"),
        ("glm-5.2", {"indexer_types": ["full", "shared"]}, "indexer_types 2 78 layers"),
        ("glm-5.2", {"indexer_types": ["shared"] * 78}, "first layer must have its own"),
        ("glm-5.2", {"indexer_types": ["full", "own"] * 39}, "indexer_types own full shared"),
        ("minimax-m3", {"use_gemma_norm": False}, "use_gemma_norm False"),
        ("minimax-m3", {"qk_norm_type": "per_layer"}, "qk_norm_type per_layer"),
        ("minimax-m3", {"n_shared_experts": 2}, "n_shared_experts 2"),
        ("minimax-m3", {"moe_layer_freq": [0, 1]}, "moe_layer_freq list 60 0 1"),
        ("minimax-m3", {"layer_types": ["minimax_m3_sparse"]}, "layer_types 1 60 layers"),
        ("minimax-m3", {"layer_types": ["sliding_attention"] * 60}, "sliding_attention"),
        ("minimax-m3", {"num_key_value_heads": 8}, "indexer num_heads 4 keys and values 8"),
        ("minimax-m3", {"sparse_attention_config": 3}, "sparse_attention_config 3 object"),
        ("deepseek-v4-flash", {"scoring_func": "sigmoid"}, "scoring_func sigmoid"),
        ("deepseek-v4-flash", {"n_shared_experts": 2}, "n_shared_experts 2"),
        ("deepseek-v4-flash", {"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ("deepseek-v4-flash", {"norm_topk_prob": False}, "norm_topk_prob False"),
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
        ("kimi-linear-48b-a3b", {"mla_use_nope": False}, "mla_use_nope False"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_score_type": "mean"}, "sparse_score_type mean"),
        ({"sparse_topk_block": 8}, "sparse_topk_block did you mean sparse_topk_blocks"),
        ({"sparse_init_block": 1}, "sparse_init_block 1"),
        ({"sparse_local_block": 0}, "index_local_blocks 0 from 1 16"),
        ({"sparse_topk_blocks": 0}, "sparse_topk_blocks 0"),
        ({"sparse_disable_index_value": [0] * 60}, "sparse_disable_index_value 0 must be 1"),
        ({"sparse_attention_freq": [0, 0, 0, 1]}, "sparse_attention_freq list 60 0 1"),
        ({"use_sparse_attention": False}, "use_sparse_attention False"),
    ],
)
def test_block_sparse_attention_that_cannot_be_computed_is_named(changes, message):
    config = MIXERS["minimax-m3"]
    own = config["text_config"]["sparse_attention_config"] | changes
    with pytest.raises(SpecError) as error:
        from_hf(_changed(config, {"sparse_attention_config": own}), "mine", weights=False)
    assert tells(str(error.value), message)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("name", CONFIGS | MIXERS | GROUPED)
def test_a_published_one_under_another_name_differs_in_nothing(name):
    config = (CONFIGS | MIXERS | GROUPED)[name]
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
