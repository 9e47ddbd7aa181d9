import json
import math

import pytest

from cli.screen import telling
from expertlane.errors import SpecError
from expertlane.spec.from_hf import from_hf, lacking_in_engine
from expertlane.spec.hf_config import (
    NarrowScheme,
    family_of,
    narrow_scheme,
    quantization_of,
    read_config,
)
from expertlane.spec.mixers import LatentAttention, RopeScaling
from expertlane.spec.model import Routing
from expertlane.spec.ranges import ANY_WHOLE, RANGES
from spec.test_published import CONFIGS

MIXTRAL = CONFIGS["mixtral-8x7b"]
QWEN2_MOE = CONFIGS["qwen1.5-moe-a2.7b"]
QWEN3_MOE = CONFIGS["qwen3-30b-a3b"]
OLMOE = CONFIGS["olmoe-1b-7b"]
DEEPSEEK_V2_LITE = CONFIGS["deepseek-v2-lite"]
DEEPSEEK_V2 = CONFIGS["deepseek-v2"]
DEEPSEEK_V3 = CONFIGS["deepseek-v3"]
GPT_OSS = CONFIGS["gpt-oss-20b"]


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
        "yarn", 32.0, 4096, truncate=False, attention_factor=pytest.approx(0.1 * math.log(32) + 1)
    )
    assert model.dtype == "bfloat16"  # MXFP4 without a dtype
    del (config := dict(GPT_OSS))["layer_types"]
    assert from_hf(config) == model


def test_spellings_of_transformers_5():
    theirs = dict(GPT_OSS)
    scaling, theta = theirs.pop("rope_scaling"), theirs.pop("rope_theta")
    theirs["rope_parameters"] = {**scaling, "rope_theta": theta}
    theirs["num_experts"] = theirs.pop("num_local_experts")
    theirs["dtype"] = "torch.bfloat16"
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
        (MIXTRAL, {"hidden_size": "big"}, f"hidden_size big {RANGES['hidden_size']}"),
        (MIXTRAL, {"hidden_size": True}, f"hidden_size True {RANGES['hidden_size']}"),
        (MIXTRAL, {"vocab_size": None}, f"vocab_size null {RANGES['vocab_size']}"),
        (
            MIXTRAL,
            {"num_local_experts": None},
            f"num_local_experts null {RANGES.get('num_local_experts', ANY_WHOLE)}",
        ),
        (MIXTRAL, {"rms_norm_eps": "x"}, f"rms_norm_eps x {RANGES['rms_norm_eps']}"),
        (MIXTRAL, {"hidden_act": "relu"}, "hidden_act relu"),
        (
            MIXTRAL,
            {"num_attention_heads": 0},
            f"num_attention_heads 0 {RANGES['num_attention_heads']}",
        ),
        (MIXTRAL, {"num_key_value_heads": 5}, "num_key_value_heads 5 divide 32"),
        (MIXTRAL, {"sliding_window": 0}, f"sliding_window 0 {RANGES['sliding_window']}"),
        (MIXTRAL, {"torch_dtype": "float64"}, "float64 float32 bfloat16 float16"),
        (MIXTRAL, {"eos_token_id": "</s>"}, f"eos_token_id </s> {RANGES['eos_token_id']}"),
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
        (DEEPSEEK_V2, {"n_group": 7}, "n_group 7 divide 160 experts"),
        (DEEPSEEK_V2, {"topk_group": 9}, "topk_group 9 1 n_group 8"),
        (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias True"),
        (DEEPSEEK_V2, {"n_group": None}, f"n_group null {RANGES['n_group']}"),
    ],
)
def test_what_is_not_supported_is_named(config, changes, message):
    with pytest.raises(SpecError, match=telling(f"mine {message}")):
        from_hf(config | changes, name="mine")


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
    with pytest.raises(SpecError, match=telling("not supported families")) as e:
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
        ({"quant_method": "awq"}, "awq supported compressed-tensors"),
        ({"quant_method": "fp8"}, "e4m3 weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size [128]"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [8, 8]}, "fmt e5m2"),
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
    with pytest.raises(SpecError, match=telling(message)):
        from_hf(MIXTRAL | {"quantization_config": quantization})


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
    model = from_hf(wrapped, "same", weights=False)
    assert lacking_in_engine(model) == "tensors named as in kimi_k25"
    inner = model.with_overrides(unread_family=None)
    assert inner == from_hf(DEEPSEEK_V3, "same", weights=False)
    assert quantization_of(wrapped).number_type == "int4"
    with pytest.raises(SpecError, match=telling("KimiK25ForConditionalGeneration not run plan")):
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


@pytest.mark.parametrize(
    ("told", "number_type", "others"),
    [
        ({"expert_dtype": "fp4"}, "mxfp4", "float8"),
        ({"quantization_config": {"expert_dtype": "fp4"}}, "mxfp4", "float8"),
        ({"quantization_config": {"moe_quant_algo": "NVFP4"}}, "nvfp4", "float8"),
        ({"expert_dtype": "fp8"}, "float8", None),
        ({}, "float8", None),
    ],
)
def test_experts_in_a_type_of_their_own(told, number_type, others):
    """As DeepSeek-V4 says it, NVIDIA's quantisation of it, and configurations of transformers 5."""
    own = {"quantization_config": {"quant_method": "fp8"} | told.get("quantization_config", {})}
    found = quantization_of(MIXTRAL | told | own)
    assert (found.method, found.number_type, found.others) == ("fp8", number_type, others)


@pytest.mark.parametrize("told", [4, "bf16", ["fp4"]])
def test_an_unknown_type_of_experts_is_refused(told):
    own = {"quantization_config": {"quant_method": "fp8"}, "expert_dtype": told}
    with pytest.raises(SpecError, match=telling("expert_dtype known fp4 fp8")):
        quantization_of(MIXTRAL | own)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "num_local_experts"])
def test_a_misspelt_field_is_no_default(name):
    misspelt = {f"{key}s" if key == name else key: value for key, value in MIXTRAL.items()}
    with pytest.raises(SpecError, match=telling(f"{name}s did you mean {name}")):
        from_hf(misspelt)
    assert from_hf(MIXTRAL | {f"{name}s": 1}) == from_hf(MIXTRAL)  # beside the field itself


def test_experts_in_every_zeroth_layer():
    config = CONFIGS["ernie-4.5-21b-a3b"] | {"moe_layer_interval": 0}
    with pytest.raises(SpecError, match=telling("moe_layer_interval 0")):
        from_hf(config)
