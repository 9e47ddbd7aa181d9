import json
import math

import pytest

from cli.screen import telling, tells
from expertlane.errors import SpecError
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import (
    NarrowScheme,
    family_of,
    narrow_scheme,
    quantization_of,
    read_config,
)
from expertlane.spec.model import LatentAttention, RopeScaling, Routing, num_params
from expertlane.spec.ranges import ANY_WHOLE, RANGES

# What these models publish, as transformers 4 wrote it, without what from_hf does not read.
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": [151645, 151643],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
}
_DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": _DEEPSEEK_YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V2 = DEEPSEEK_V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
DEEPSEEK_V3 = DEEPSEEK_V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": _DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


@pytest.mark.parametrize(
    ("config", "published"),
    [  # as published
        (MIXTRAL, 46_702_792_704),
        (QWEN2_MOE, 14_315_784_192),
        (QWEN3_MOE, 30_532_122_624),
        (OLMOE, 6_919_161_856),
        (DEEPSEEK_V2_LITE, 15_706_484_224),
        (DEEPSEEK_V2, 235_741_434_880),
        (DEEPSEEK_V3, 671_026_419_200),
        (GPT_OSS, 20_914_757_184),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else "",
)
def test_parameters_add_up_to_the_published_number(config, published):
    assert num_params(from_hf(config)) == published


def test_mixtral():
    model = from_hf(MIXTRAL, name="Mixtral-8x7B")
    assert model.name == "Mixtral-8x7B"
    assert (model.num_hidden_layers, model.hidden_size, model.vocab_size) == (32, 4096, 32000)
    assert (model.num_attention_heads, model.num_kv_heads, model.head_dim) == (32, 8, 128)
    assert (model.num_experts, model.num_experts_per_tok) == (8, 2)
    assert model.moe_intermediate_size == 14336
    assert (model.rope_theta, model.rope_scaling, model.rms_norm_eps) == (1e6, None, 1e-5)
    assert (model.gated_mlp, model.hidden_act, model.swiglu_limit) == (True, "silu", None)
    assert model.routing == Routing(norm_topk_prob=True)
    assert (model.sliding_window, model.eos_token_ids, model.dtype) == ((), (2,), "bfloat16")
    windowed = from_hf(MIXTRAL | {"sliding_window": 4096, "num_hidden_layers": 3})
    assert windowed.sliding_window == (4096, 4096, 4096)


def test_qwen2_moe():
    model = from_hf(QWEN2_MOE)
    assert model.name == "qwen2_moe"
    assert (model.qkv_bias, model.output_bias, model.qk_norm) == (True, False, None)
    assert (model.head_dim, model.num_kv_heads) == (128, 16)
    assert (model.moe_intermediate_size, model.shared_expert_intermediate_size) == (1408, 5632)
    assert model.shared_expert_gate
    assert (model.dense_layers, model.sliding_window) == ((), ())
    assert model.routing == Routing(norm_topk_prob=False)


def test_qwen2_moe_with_windows_and_dense_layers():
    changes = {
        "num_hidden_layers": 6,
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 4,
        "mlp_only_layers": [3],
        "decoder_sparse_step": 2,
    }
    model = from_hf(QWEN2_MOE | changes)
    assert model.sliding_window == (100, None, 100, None, None, None)
    assert model.dense_layers == (0, 2, 3, 4)  # all but every second one, and layer 3
    assert model.intermediate_size == 5632
    types = ["full_attention"] * 5 + ["sliding_attention"]
    model = from_hf(QWEN2_MOE | changes | {"layer_types": types})
    assert model.sliding_window == (None, None, None, None, None, 100)


def test_qwen3_moe():
    model = from_hf(QWEN3_MOE)
    assert (model.qk_norm, model.qkv_bias, model.output_bias) == ("head", False, False)
    assert (model.attention_size, model.kv_size) == (4096, 512)
    assert (model.routing, model.eos_token_ids) == (Routing(), (151645, 151643))
    biased = from_hf(QWEN3_MOE | {"attention_bias": True})
    assert (biased.qkv_bias, biased.output_bias) == (True, True)
    windowed = from_hf(QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 64})
    assert windowed.sliding_window == (64,) * 48


def test_olmoe():
    model = from_hf(OLMOE)
    assert (model.qk_norm, model.head_dim, model.num_kv_heads) == ("full", 128, 16)
    assert (model.moe_intermediate_size, model.num_experts_per_tok) == (1024, 8)
    assert model.routing == Routing(norm_topk_prob=False)


def test_deepseek_v2_lite():
    model = from_hf(DEEPSEEK_V2_LITE)
    mscale = 0.1 * 0.707 * math.log(40) + 1
    assert model.latent == LatentAttention(512, 128, 64, 128, None, pytest.approx(mscale), 1e-6)
    assert (model.head_dim, model.rotary_dim, model.rope_interleave) == (192, 64, True)
    assert model.softmax_scale == pytest.approx(192**-0.5 * 1.2608**2, rel=1e-4)
    # Both mscales are one, so cosines and sines are left as they are.
    assert model.rope_scaling == RopeScaling("yarn", 40.0, 4096, attention_factor=1.0)
    assert (model.dense_layers, model.intermediate_size) == ((0,), 10944)
    assert (model.shared_expert_intermediate_size, model.shared_expert_gate) == (2816, False)
    assert model.routing == Routing(norm_topk_prob=False)


def test_deepseek_v2():
    model = from_hf(DEEPSEEK_V2)
    assert model.latent.q_lora_rank == 1536
    assert model.routing == Routing(
        norm_topk_prob=False, routed_scaling_factor=16.0, n_group=8, topk_group=3, group_score="max"
    )


def test_deepseek_v3():
    model = from_hf(DEEPSEEK_V3)
    assert model.dense_layers == (0, 1, 2)
    assert model.routing == Routing(
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        correction_bias=True,
        n_group=8,
        topk_group=4,
        group_score="top2_sum",
    )
    assert model.latent.mscale == pytest.approx(0.1 * math.log(40) + 1)
    scheme = narrow_scheme(DEEPSEEK_V3)
    assert (scheme.type, scheme.rows, scheme.columns) == ("float8", 128, 128)
    assert not from_hf(DEEPSEEK_V3 | {"rope_interleave": False}).rope_interleave


def test_gpt_oss():
    model = from_hf(GPT_OSS)
    assert (model.qkv_bias, model.output_bias, model.attention_sinks) == (True, True, True)
    assert model.sliding_window == (128, None) * 12
    assert (model.window_of_layer(0), model.window_of_layer(1)) == (128, None)
    assert (model.swiglu_limit, model.swiglu_alpha, model.expert_bias) == (7.0, 1.702, True)
    assert model.routing == Routing(router_bias=True)
    assert model.rope_scaling == RopeScaling(
        "yarn",
        32.0,
        4096,
        truncate=False,
        attention_factor=pytest.approx(0.1 * math.log(32) + 1),
    )
    assert model.dtype == "bfloat16"  # MXFP4 without a dtype
    del (config := dict(GPT_OSS))["layer_types"]
    assert from_hf(config) == model


def test_spellings_of_transformers_5():
    theirs = dict(GPT_OSS)
    scaling, theta = theirs.pop("rope_scaling"), theirs.pop("rope_theta")
    theirs["rope_parameters"] = {**scaling, "rope_theta": theta}
    theirs["num_experts"] = theirs.pop("num_local_experts")
    theirs["dtype"] = "bfloat16"
    assert from_hf(theirs) == from_hf(GPT_OSS)
    theirs = dict(QWEN3_MOE)
    theirs["num_local_experts"], theirs["dtype"] = theirs.pop("num_experts"), "bfloat16"
    theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": theirs.pop("rope_theta")}
    del theirs["torch_dtype"], theirs["rope_scaling"], theirs["architectures"]
    assert from_hf(theirs) == from_hf(QWEN3_MOE)


def test_base_of_positions_where_none_is_given():
    del (config := dict(MIXTRAL))["rope_theta"]
    assert from_hf(config).rope_theta == 1e6
    del (config := dict(OLMOE))["rope_theta"]
    assert from_hf(config).rope_theta == 1e4


def test_rope_scalings():
    def scaling(**rope):
        return from_hf(QWEN3_MOE | {"rope_scaling": rope}).rope_scaling

    assert scaling(type="linear", factor=2) == RopeScaling("linear", 2.0, 40960)
    assert scaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.5,
        high_freq_factor=5.0,
        original_max_position_embeddings=8192,
    ) == RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.5, high_freq_factor=5.0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    expected = RopeScaling("yarn", 4.0, 32768, attention_factor=pytest.approx(1.1386294361))
    assert scaling(**yarn) == expected
    assert scaling(**yarn, attention_factor=1.5).attention_factor == 1.5
    assert scaling(**yarn, beta_fast=16, beta_slow=2).beta_fast == 16.0
    # Without a factor: by how much the context has grown.
    assert scaling(type="yarn", original_max_position_embeddings=10240).factor == 4.0
    # No stretch, no mscale.
    assert scaling(**yarn | {"factor": 1.0}).attention_factor == 1.0
    ratio = (0.1 * 0.5 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    both = scaling(**yarn, mscale=0.5, mscale_all_dim=1.0)
    assert both.attention_factor == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            MIXTRAL,
            {"hidden_size": "big"},
            f"hidden_size big {RANGES['hidden_size']}",
        ),
        (
            MIXTRAL,
            {"hidden_size": True},
            f"hidden_size True {RANGES['hidden_size']}",
        ),
        (
            MIXTRAL,
            {"vocab_size": None},
            f"vocab_size null {RANGES['vocab_size']}",
        ),
        (
            MIXTRAL,
            {"num_local_experts": None},
            f"num_local_experts null {RANGES.get('num_local_experts', ANY_WHOLE)}",
        ),
        (
            MIXTRAL,
            {"rms_norm_eps": "x"},
            f"rms_norm_eps x {RANGES['rms_norm_eps']}",
        ),
        (MIXTRAL, {"hidden_act": "relu"}, "hidden_act relu"),
        (
            MIXTRAL,
            {"num_attention_heads": 0},
            f"num_attention_heads 0 {RANGES['num_attention_heads']}",
        ),
        (
            MIXTRAL,
            {"num_key_value_heads": 5},
            "num_key_value_heads 5 divide 32",
        ),
        (
            MIXTRAL,
            {"sliding_window": 0},
            f"sliding_window 0 {RANGES['sliding_window']}",
        ),
        (
            MIXTRAL,
            {"torch_dtype": "float64"},
            "float64 float32 bfloat16 float16",
        ),
        (
            MIXTRAL,
            {"eos_token_id": "</s>"},
            f"eos_token_id </s> {RANGES['eos_token_id']}",
        ),
        (
            MIXTRAL,
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "rope_type longrope dynamic llama3",
        ),
        (MIXTRAL, {"rope_scaling": {"type": "linear"}}, "factor missing"),
        (
            MIXTRAL,
            {"rope_scaling": {"type": "linear", "factor": -1.0}},
            f"factor -1.0 {RANGES['factor']}",
        ),
        (
            MIXTRAL,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope differ layer",
        ),
        (MIXTRAL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (QWEN2_MOE, {"mlp_only_layers": 3}, "mlp_only_layers 3 list"),
        (
            QWEN2_MOE,
            {"decoder_sparse_step": 0},
            f"decoder_sparse_step 0 {RANGES['decoder_sparse_step']}",
        ),
        (
            QWEN2_MOE,
            {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 24},
            "layer chunked_attention",
        ),
        (
            GPT_OSS,
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types 2 24 layers",
        ),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob True"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method noaux_tc"),
        (DEEPSEEK_V2, {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        (DEEPSEEK_V2, {"n_group": 7}, "n_group 7 divide 160 experts"),
        (DEEPSEEK_V2, {"topk_group": 9}, "topk_group 9 1 n_group 8"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func softmax"),
        (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias True"),
        (DEEPSEEK_V2, {"n_group": None}, f"n_group null {RANGES['n_group']}"),
    ],
)
def test_what_is_not_supported_is_named(config, changes, message):
    with pytest.raises(SpecError) as error:
        from_hf(config | changes, name="mine")
    assert tells(str(error.value), f"mine {message}")


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM'"),
        ({"architectures": ["MixtralForSequenceClassification"]}, None),
        ({"architectures": None, "model_type": "llama"}, "'llama'"),
        ({"architectures": None, "model_type": None}, "None"),
    ],
)
def test_another_architecture(changes, shown):
    with pytest.raises(SpecError, match=telling("supported mixtral")) as e:
        family_of(MIXTRAL | changes)
    assert str(e.value).startswith(f"architecture {shown or repr(changes['architectures'][0])} is")
    assert "\n" not in str(e.value)


def test_the_family_without_an_architecture_is_the_model_type():
    assert family_of(MIXTRAL | {"architectures": None}) == "mixtral"


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def compressed(*weights, **more):
    """An entry of compressed-tensors."""
    groups = {f"group_{number}": {"weights": each} for number, each in enumerate(weights)}
    own = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return {**own, "config_groups": groups, **more}


def test_compressed_tensors():
    assert narrow_scheme({"quantization_config": compressed(INT8)}) == NarrowScheme(
        "int8", 1, None, "_scale"
    )
    groups = INT8 | {"strategy": "group", "group_size": 128}
    packed = compressed(groups, format="pack-quantized")
    assert narrow_scheme({"quantization_config": packed}) == NarrowScheme(
        "int8", 1, 128, "_scale", is_packed=True
    )


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "awq"},
            "awq supported compressed-tensors",
        ),
        ({"quant_method": "fp8"}, "e4m3 weight_block_size None"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "weight_block_size [128]",
        ),
        (
            {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [8, 8]},
            "fmt e5m2",
        ),
        ("int4", "quantization_config int4 object"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors without config_groups"),
        (
            compressed({"num_bits": 8, "type": "int"}, {"num_bits": 4, "type": "int"}),
            "weights several",
        ),
        (
            compressed({"num_bits": 4, "type": "int", "strategy": "channel"}),
            "int-quantized weights int num_bits 4 None channel group_size",
        ),
        *(
            (compressed(INT8 | more), "is not supported; supported: symmetric ones of 8 bits in")
            for more in (
                {"symmetric": False},
                {"actorder": "group"},
                {"strategy": "token"},
                {"strategy": ["channel"]},
                {"strategy": "group", "group_size": -1},
                {"strategy": "group", "group_size": "128"},
                {"strategy": "block", "block_structure": [128]},
                {"type": "float"},
            )
        ),
        (compressed(INT8, format="marlin-24"), "format marlin-24 weights"),
        (compressed(INT8, config_groups={"group_0": 3}), "without config_groups"),
    ],
)
def test_other_quantisations(quantization, message):
    with pytest.raises(SpecError) as error:
        from_hf(MIXTRAL | {"quantization_config": quantization})
    assert tells(str(error.value), message)


def test_a_configuration_alone_may_be_quantised_in_any_way():
    assert from_hf(MIXTRAL | {"quantization_config": {"quant_method": "awq"}}, weights=False)
    for wrong in ("int4", {"bits": 4}):
        with pytest.raises(SpecError, match="quantization_config"):
            quantization_of(MIXTRAL | {"quantization_config": wrong})


def test_block_sizes():
    assert narrow_scheme(MIXTRAL) is None
    assert narrow_scheme(GPT_OSS) is None


def test_reading_the_file(tmp_path):
    with pytest.raises(SpecError, match=telling("config.json folder")):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(SpecError, match=telling("config.json JSON")):
        read_config(tmp_path)
    path.write_text("[1]")
    with pytest.raises(SpecError, match=telling("JSON object")):
        read_config(tmp_path)
    with pytest.raises(SpecError, match=telling("file folder")):
        read_config(path)
    path.write_text(json.dumps(MIXTRAL))
    assert read_config(tmp_path) == MIXTRAL


_INT_OF_FOUR = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4, "group_size": 32}}},
}


def test_modelopts_file_beside_a_config_says_how_weights_are_quantised(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text('{"producer": {}, "quantization": {"quant_algo": "NVFP4"}}')
    assert quantization_of(read_config(tmp_path)).number_type == "nvfp4"
    own = MIXTRAL | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert quantization_of(read_config(tmp_path)).method == "fp8"
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    beside.write_text('{"quantization": "NVFP4"}')
    with pytest.raises(SpecError, match=telling("hf_quant_config.json quantization object")):
        read_config(tmp_path)


def test_a_language_model_inside_another_configuration_is_projected(tmp_path):
    inside = DEEPSEEK_V3 | {"quantization_config": _INT_OF_FOUR}
    wrapped = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": inside,
    }
    model = from_hf(wrapped, weights=False)
    assert model == from_hf(DEEPSEEK_V3, weights=False)
    assert quantization_of(wrapped).number_type == "int4"
    with pytest.raises(SpecError, match=telling("weights KimiK25ForConditionalGeneration plan")):
        from_hf(wrapped)


@pytest.mark.parametrize(
    ("entry", "number_type"),
    [
        ({"quant_method": "fp8"}, "float8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float8"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "float8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "int4"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, None),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, None),
        (_INT_OF_FOUR, "int4"),
        ({"quant_method": "modelopt", "quant_algo": 4}, None),
    ],
)
def test_number_types_of_quantised_weights(entry, number_type):
    found = quantization_of(MIXTRAL | {"quantization_config": entry})
    assert (found.method, found.number_type) == (entry["quant_method"], number_type)
