"""A `ModelConfig` from a Hugging Face `config.json`, in the spellings of transformers 4 and 5.

A family computes what its transformers class does; `docs/families.md` has the table. That class
also decides what a field means where it is left out or null.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from expertlane.errors import SpecError
from expertlane.spec.hf_config import (
    FAMILIES,
    ConfigReader,
    family_of,
    narrow_scheme,
    read_config,
)
from expertlane.spec.model import LatentAttention, ModelConfig, RopeScaling, Routing
from expertlane.spec.names import Dtype

_SAME = (  # in every family
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_experts_per_tok",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def from_hf(
    config: dict[str, Any], name: str | None = None, *, weights: bool = True
) -> ModelConfig:
    """The model that a Hugging Face configuration describes.

    Args:
        config: the parsed `config.json`, or `to_dict()` of a configuration object.
        name: what the model is called in messages; its family's name if None.
        weights: whether they are to be read; else they may be quantised in any way.

    Raises:
        SpecError: an architecture or a feature that is not supported, or a missing or wrong value.
    """
    family = family_of(config)
    if weights:
        narrow_scheme(config)
    fields = ConfigReader(config, name or family, FAMILIES[family].defaults)
    if fields.get(str, "hidden_act") != "silu":
        raise fields.unsupported("hidden_act")
    num_experts = fields.get(int, *FAMILIES[family].num_experts)
    return ModelConfig(num_experts=num_experts, **_common(fields) | _READERS[family](fields))


def read_model(folder: Path, given: str, *, weights: bool = True) -> ModelConfig:
    """The model of a checkpoint's folder.

    Args:
        given: the path or hub id that the folder was found by; its last part is the model's name.
        weights: as for `from_hf`.

    Raises:
        SpecError: no checkpoint is there, or it is of a kind that cannot be read.
    """
    config = read_config(folder)
    if not (config.get("architectures") or config.get("model_type")):
        raise SpecError(f"{folder / 'config.json'} names no architecture")
    return from_hf(config, Path(os.path.abspath(given)).name, weights=weights)


def _common(fields: ConfigReader) -> dict[str, Any]:
    """What every family says in the same way."""
    eos = fields.raw("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    dtype = fields.raw("dtype", "torch_dtype")
    if dtype is None:  # what quantised checkpoints were made from
        dtype = "bfloat16" if fields.raw("quantization_config") else "float32"
    if dtype not in get_args(Dtype):
        valid = ", ".join(get_args(Dtype))
        raise fields.error(f"dtype {dtype!r} is not supported; supported: {valid}")
    return {
        "name": fields.name,
        **_same(fields, ModelConfig, *_SAME),
        "gated_mlp": True,
        "hidden_act": "silu",
        "eos_token_ids": tuple(fields.typed(int, "eos_token_id", token) for token in eos),
        "dtype": dtype,
    }


def _same(fields: ConfigReader, kind: type[Any], *names: str) -> dict[str, Any]:
    """What a `config.json` calls as the dataclass `kind` does."""
    types = {each.name: each.type for each in dataclasses.fields(kind)}
    return {name: fields.get((get_args(types[name]) or (types[name],))[0], name) for name in names}


def _attention(fields: ConfigReader) -> dict[str, Any]:
    """Attention with keys and values of their own: heads and rotary positions."""
    heads = fields.get(int, "num_attention_heads")
    head_dim = fields.get(int, "head_dim", default=fields.get(int, "hidden_size") // heads)
    return {
        "head_dim": head_dim,
        "num_key_value_heads": fields.get(int, "num_key_value_heads", default=heads),
        **_rope(fields),
    }


def _biased_attention(fields: ConfigReader) -> dict[str, Any]:
    """The same, with biases of all projections or of none."""
    bias = fields.get(bool, "attention_bias")
    return {**_attention(fields), "qkv_bias": bias, "output_bias": bias}


def _rope_parameters(fields: ConfigReader) -> ConfigReader:
    """The fields of `rope_scaling` (transformers 4) or `rope_parameters` (5); null: the default."""
    parameters = fields.raw("rope_scaling", "rope_parameters")
    parameters = fields.defaults["rope_parameters"] if parameters is None else parameters
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        raise fields.error("rope parameters that differ by layer are not supported")
    return ConfigReader(parameters, fields.name, {"truncate": True})


def _rope(fields: ConfigReader) -> dict[str, Any]:
    """Rotary positions."""
    rope = _rope_parameters(fields)
    for holder in (fields, rope):
        holder.expect("partial_rotary_factor", 1, 1.0)
    theta = rope.optional(float, "rope_theta")
    theta = fields.get(float, "rope_theta") if theta is None else theta
    kind = rope.get(str, "rope_type", "type", default="default")
    if kind == "default":
        return {"rope_theta": theta}
    max_len = fields.get(int, "max_position_embeddings")
    trained = rope.get(int, "original_max_position_embeddings", default=max_len)
    trained = fields.get(int, "original_max_position_embeddings", default=trained)
    match kind:
        case "linear":
            sizes = _same(rope, RopeScaling, "factor")
        case "llama3":
            sizes = _same(rope, RopeScaling, "factor", "low_freq_factor", "high_freq_factor")
        case "yarn":
            sizes = _yarn(rope, default_factor=max_len / trained)
        case _:
            raise fields.error(
                f"rope_type {kind!r} is not supported; supported: default, linear, llama3, yarn"
            )
    sizes |= {"rope_type": kind, "original_max_position_embeddings": trained}
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**sizes)}


def _yarn(rope: ConfigReader, default_factor: float) -> dict[str, Any]:
    factor = rope.get(float, "factor", default=default_factor)
    mscale, mscale_all_dim = rope.optional(float, "mscale"), rope.optional(float, "mscale_all_dim")
    if mscale and mscale_all_dim:
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    return {
        "factor": factor,
        "beta_fast": rope.optional(float, "beta_fast") or 32.0,
        "beta_slow": rope.optional(float, "beta_slow") or 1.0,
        "truncate": bool(rope.optional(bool, "truncate")),
        "attention_factor": rope.get(float, "attention_factor", default=attention_factor),
    }


def _yarn_mscale(factor: float, mscale: float) -> float:
    """The growth of attention's logits with the context (Peng et al. 2023, equation 25)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _has_window(fields: ConfigReader) -> list[bool] | None:
    """Whether each layer has one, by `layer_types`; None where that is null or missing."""
    types = fields.raw("layer_types")
    if types is None:
        return None
    if not isinstance(types, list):
        raise fields.error(f"layer_types is {types!r}; it must be a list")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.error(f"layer type {kind!r} is not supported")
    if len(types) != (num_layers := fields.get(int, "num_hidden_layers")):
        raise fields.error(f"layer_types has {len(types)} entries for {num_layers} layers")
    return [kind == "sliding_attention" for kind in types]


def _windows_by_type(fields: ConfigReader, default: list[bool]) -> tuple[int | None, ...]:
    """One window a layer; which have one `layer_types` says, else a family's default."""
    has_window = _has_window(fields)
    has_window = default if has_window is None else has_window
    if not any(has_window):
        return ()
    window = fields.get(int, "sliding_window")
    return tuple(window if has else None for has in has_window)


def _windows_everywhere(fields: ConfigReader) -> tuple[int | None, ...]:
    window = fields.optional(int, "sliding_window")
    return () if window is None else (window,) * fields.get(int, "num_hidden_layers")


def _mixtral(fields: ConfigReader) -> dict[str, Any]:
    return {
        **_attention(fields),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "sliding_window": _windows_everywhere(fields),
    }


def _qwen_moe(fields: ConfigReader) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE have in common."""
    mlp_only = fields.integers("mlp_only_layers")
    step = fields.get(int, "decoder_sparse_step")
    layers = range(fields.get(int, "num_hidden_layers"))
    dense = tuple(layer for layer in layers if layer in mlp_only or (layer + 1) % step)
    return {
        **_same(fields, ModelConfig, "moe_intermediate_size"),
        "intermediate_size": fields.get(int, "intermediate_size") if dense else 0,
        "dense_layers": dense,
        "routing": Routing(**_same(fields, Routing, "norm_topk_prob")),
    }


def _qwen2_moe(fields: ConfigReader) -> dict[str, Any]:
    windows: tuple[int | None, ...] = ()
    if fields.get(bool, "use_sliding_window"):
        first_full = fields.get(int, "max_window_layers")
        layers = range(fields.get(int, "num_hidden_layers"))
        has_window = [i % 2 == 0 and i < first_full for i in layers]
        windows = _windows_by_type(fields, has_window)
    elif any(_has_window(fields) or ()):
        # transformers 5 then masks all positions in such layers, which no model can mean.
        raise fields.error(
            "layer_types has 'sliding_attention' but use_sliding_window is false; make one agree "
            "with the other"
        )
    return {
        **_attention(fields),
        **_qwen_moe(fields),
        **_same(fields, ModelConfig, "qkv_bias", "shared_expert_intermediate_size"),
        "sliding_window": windows,
        "shared_expert_gate": True,
    }


def _qwen3_moe(fields: ConfigReader) -> dict[str, Any]:
    has_windows = fields.get(bool, "use_sliding_window")
    return {
        **_qwen_moe(fields),
        **_biased_attention(fields),
        "qk_norm": "head",
        "sliding_window": _windows_everywhere(fields) if has_windows else (),
    }


def _olmoe(fields: ConfigReader) -> dict[str, Any]:
    fields.expect("clip_qkv")
    return {
        **_biased_attention(fields),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "qk_norm": "full",
        "routing": Routing(**_same(fields, Routing, "norm_topk_prob")),
    }


_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _deepseek(fields: ConfigReader) -> dict[str, Any]:
    """What DeepSeek-V2 and V3 have in common: latent attention, dense first layers."""
    for key in ("attention_bias", "mlp_bias"):
        fields.expect(key, False)
    fields.expect("moe_layer_freq", 1)
    rope, all_dim = _rope(fields), _rope_parameters(fields).optional(float, "mscale_all_dim")
    scaling: RopeScaling | None = rope.get("rope_scaling")
    latent = LatentAttention(
        **_same(fields, LatentAttention, *_LATENT),
        q_lora_rank=fields.optional(int, "q_lora_rank"),
        mscale=_yarn_mscale(scaling.factor, all_dim) if scaling and all_dim else 1.0,
    )
    num_dense = fields.get(int, "first_k_dense_replace")
    expert = fields.get(int, "moe_intermediate_size")
    return {
        **rope,
        "head_dim": latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        "latent": latent,
        "moe_intermediate_size": expert,
        "intermediate_size": fields.get(int, "intermediate_size") if num_dense else 0,
        "dense_layers": tuple(range(min(num_dense, fields.get(int, "num_hidden_layers")))),
        "shared_expert_intermediate_size": fields.get(int, "n_shared_experts") * expert,
    }


def _deepseek_v2(fields: ConfigReader) -> dict[str, Any]:
    fields.expect("scoring_func", "softmax")
    fields.expect("norm_topk_prob", False)
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    in_groups = fields.get(str, "topk_method") == "group_limited_greedy"
    routing = Routing(
        norm_topk_prob=False,
        routed_scaling_factor=fields.get(float, "routed_scaling_factor"),
        n_group=fields.get(int, "n_group") if in_groups else 1,
        topk_group=fields.get(int, "topk_group") if in_groups else 1,
        group_score="max",
    )
    return {**_deepseek(fields), "rope_interleave": True, "routing": routing}


def _deepseek_v3(fields: ConfigReader) -> dict[str, Any]:
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    routing = Routing(
        scoring_func="sigmoid",
        norm_topk_prob=bool(fields.optional(bool, "norm_topk_prob")),
        correction_bias=True,
        **_same(fields, Routing, "routed_scaling_factor", "n_group", "topk_group"),
        group_score="top2_sum",
    )
    interleave = bool(fields.optional(bool, "rope_interleave"))
    return {**_deepseek(fields), "rope_interleave": interleave, "routing": routing}


def _gpt_oss(fields: ConfigReader) -> dict[str, Any]:
    layers = range(fields.get(int, "num_hidden_layers"))
    return {
        **_biased_attention(fields),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "attention_sinks": True,
        "sliding_window": _windows_by_type(fields, [i % 2 == 0 for i in layers]),
        **_same(fields, ModelConfig, "swiglu_limit", "swiglu_alpha"),
        "expert_bias": True,
        "routing": Routing(router_bias=True),
    }


_READERS: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
