"""Readers of the `config.json` fields that differ by family.

Each gives the fields of a `ModelConfig` that differ by family. Those of families with mixers beside
plain attention are in `spec.mixer_families`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from expertlane.spec.hf_config import ConfigReader
from expertlane.spec.mixers import LatentAttention, Mixing, RopeScaling
from expertlane.spec.model import LayerKind, ModelConfig, Routing
from expertlane.spec.ranges import shown

Reader = Callable[[ConfigReader], dict[str, Any]]


def rope_parameters(fields: ConfigReader) -> ConfigReader:
    """The fields of `rope_scaling` (transformers 4) or `rope_parameters` (5); null: the default."""
    parameters = fields.raw("rope_scaling", "rope_parameters")
    parameters = fields.defaults["rope_parameters"] if parameters is None else parameters
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        raise fields.error("rope parameters that differ by layer are not supported")
    return ConfigReader(parameters, fields.name, {"truncate": True})


def rotary(fields: ConfigReader, share: float | None = None) -> dict[str, Any]:
    """Rotary positions.

    Args:
        share: of a head's values that are rotated where a configuration names none; None where
            all have to be.
    """
    rope, partial = rope_parameters(fields), {}
    if share is None:
        for holder in (fields, rope):
            holder.expect("partial_rotary_factor", 1, 1.0)
    else:
        share = fields.get(float, "partial_rotary_factor", default=share)
        share = rope.get(float, "partial_rotary_factor", default=share)
        partial = {"partial_rotary_factor": share}
    theta = rope.optional(float, "rope_theta")
    theta = fields.get(float, "rope_theta") if theta is None else theta
    kind = rope.get(str, "rope_type", "type", default="default")
    if kind in ("default", "dynamic"):  # dynamic differs only beyond max_position_embeddings
        return {"rope_theta": theta, **partial}
    max_len = fields.get(int, "max_position_embeddings")
    trained = rope.get(int, "original_max_position_embeddings", default=max_len)
    trained = fields.get(int, "original_max_position_embeddings", default=trained)
    match kind:
        case "linear":
            sizes = rope.same(RopeScaling, "factor")
        case "llama3":
            sizes = rope.same(RopeScaling, "factor", "low_freq_factor", "high_freq_factor")
        case "yarn":
            sizes = _yarn(rope, default_factor=max_len / trained)
        case _:
            raise fields.error(
                f"rope_type {kind!r} is not supported; supported: default, dynamic, linear, "
                "llama3, yarn"
            )
    sizes |= {"rope_type": kind, "original_max_position_embeddings": trained}
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**sizes), **partial}


def _yarn(rope: ConfigReader, default_factor: float) -> dict[str, Any]:
    factor = rope.get(float, "factor", default=default_factor)
    mscale, mscale_all_dim = rope.optional(float, "mscale"), rope.optional(float, "mscale_all_dim")
    if mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = yarn_mscale(factor, 1.0)
    return {
        "factor": factor,
        "beta_fast": rope.optional(float, "beta_fast") or 32.0,
        "beta_slow": rope.optional(float, "beta_slow") or 1.0,
        "truncate": bool(rope.optional(bool, "truncate")),
        "attention_factor": rope.get(float, "attention_factor", default=attention_factor),
    }


def yarn_mscale(factor: float, mscale: float) -> float:
    """The growth of attention's logits with the context (Peng et al. 2023, equation 25)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention(fields: ConfigReader, share: float | None = None) -> dict[str, Any]:
    """Attention with keys and values of their own: heads and rotary positions as of `rotary`."""
    heads = fields.get(int, "num_attention_heads")
    head_dim = fields.get(int, "head_dim", default=fields.get(int, "hidden_size") // heads)
    return {
        "head_dim": head_dim,
        "num_key_value_heads": fields.get(int, "num_key_value_heads", default=heads),
        **rotary(fields, share),
    }


def biased_attention(fields: ConfigReader, share: float | None = None) -> dict[str, Any]:
    """Attention with biases of all projections or of none."""
    bias = fields.get(bool, "attention_bias")
    return {**attention(fields, share), "qkv_bias": bias, "output_bias": bias}


def _has_window(fields: ConfigReader) -> list[bool] | None:
    """Whether each layer has a window, by `layer_types`; None where that is null or missing."""
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


def windows_by_type(fields: ConfigReader, default: list[bool]) -> tuple[int | None, ...]:
    """One window a layer; which have one `layer_types` says, else a family's default."""
    has_window = _has_window(fields)
    has_window = default if has_window is None else has_window
    if not any(has_window):
        return ()
    window = fields.get(int, "sliding_window")
    return tuple(window if has else None for has in has_window)


def windows_everywhere(fields: ConfigReader) -> tuple[int | None, ...]:
    """One window for every layer, if there is one."""
    window = fields.optional(int, "sliding_window")
    return () if window is None else (window,) * fields.get(int, "num_hidden_layers")


def _mixtral(fields: ConfigReader) -> dict[str, Any]:
    return {
        **attention(fields),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "sliding_window": windows_everywhere(fields),
    }


def qwen_moe(fields: ConfigReader) -> dict[str, Any]:
    """Layers with experts of the Qwen families, and their widths."""
    mlp_only = fields.integers("mlp_only_layers")
    step = fields.get(int, "decoder_sparse_step")
    layers = range(fields.get(int, "num_hidden_layers"))
    dense = tuple(layer for layer in layers if layer in mlp_only or (layer + 1) % step)
    return {
        **fields.same(ModelConfig, "moe_intermediate_size"),
        "intermediate_size": fields.get(int, "intermediate_size") if dense else 0,
        "dense_layers": dense,
    }


def norms_as_told(fields: ConfigReader) -> Routing:
    """A softmax over all experts, whose weights add up to 1 if the configuration says so."""
    return Routing(**fields.same(Routing, "norm_topk_prob"))


def _qwen2_moe(fields: ConfigReader) -> dict[str, Any]:
    windows: tuple[int | None, ...] = ()
    if fields.get(bool, "use_sliding_window"):
        first_full = fields.get(int, "max_window_layers")
        layers = range(fields.get(int, "num_hidden_layers"))
        has_window = [i % 2 == 0 and i < first_full for i in layers]
        windows = windows_by_type(fields, has_window)
    elif any(_has_window(fields) or ()):
        # transformers 5 then masks all positions in such layers, which no model can mean.
        raise fields.error(
            "layer_types has 'sliding_attention' but use_sliding_window is false; make one agree "
            "with the other"
        )
    return {
        **attention(fields),
        **qwen_moe(fields),
        **fields.same(ModelConfig, "qkv_bias", "shared_expert_intermediate_size"),
        "sliding_window": windows,
        "shared_expert_gate": True,
        "routing": norms_as_told(fields),
    }


def _qwen3_moe(fields: ConfigReader) -> dict[str, Any]:
    has_windows = fields.get(bool, "use_sliding_window")
    return {
        **qwen_moe(fields),
        **biased_attention(fields),
        "qk_norm": "head",
        "sliding_window": windows_everywhere(fields) if has_windows else (),
        "routing": norms_as_told(fields),
    }


def _olmoe(fields: ConfigReader) -> dict[str, Any]:
    return {
        **biased_attention(fields),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "qk_norm": "full",
        "routing": norms_as_told(fields),
    }


_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def latent_attention(fields: ConfigReader) -> dict[str, Any]:
    """Latent attention."""
    fields.expect("attention_bias", False)
    rope, all_dim = rotary(fields), rope_parameters(fields).optional(float, "mscale_all_dim")
    scaling: RopeScaling | None = rope.get("rope_scaling")
    latent = LatentAttention(
        **fields.same(LatentAttention, *_LATENT),
        q_lora_rank=fields.optional(int, "q_lora_rank"),
        mscale=yarn_mscale(scaling.factor, all_dim) if scaling and all_dim else 1.0,
    )
    return {**rope, "head_dim": latent.qk_nope_head_dim + latent.qk_rope_head_dim, "latent": latent}


def dense_and_shared(fields: ConfigReader, dense: Iterable[int]) -> dict[str, Any]:
    """MLPs where some layers have no experts, and all others `n_shared_experts` besides."""
    dense, expert = tuple(dense), fields.get(int, "moe_intermediate_size")
    return {
        "moe_intermediate_size": expert,
        "intermediate_size": fields.get(int, "intermediate_size") if dense else 0,
        "dense_layers": dense,
        "shared_expert_intermediate_size": fields.get(int, "n_shared_experts") * expert,
    }


def first_dense(fields: ConfigReader) -> dict[str, Any]:
    """MLPs where the first layers have no experts."""
    num_dense = fields.get(int, "first_k_dense_replace")
    num_dense = min(num_dense, fields.get(int, "num_hidden_layers"))
    return dense_and_shared(fields, range(num_dense))


def _deepseek(fields: ConfigReader) -> dict[str, Any]:
    """Parts common to DeepSeek-V2 and V3: latent attention, dense first layers."""
    return {**latent_attention(fields), **first_dense(fields)}


def _deepseek_v2(fields: ConfigReader) -> dict[str, Any]:
    in_groups = fields.get(str, "topk_method") == "group_limited_greedy"
    routing = Routing(
        norm_topk_prob=False,
        routed_scaling_factor=fields.get(float, "routed_scaling_factor"),
        n_group=fields.get(int, "n_group") if in_groups else 1,
        topk_group=fields.get(int, "topk_group") if in_groups else 1,
        group_score="max",
    )
    return {**_deepseek(fields), "rope_interleave": True, "routing": routing}


def sigmoid_routing(fields: ConfigReader) -> Routing:
    """Sigmoids, a bias for the choice alone, and groups that are compared by their two best."""
    return Routing(
        scoring_func="sigmoid",
        norm_topk_prob=bool(fields.optional(bool, "norm_topk_prob")),
        correction_bias=True,
        **fields.same(Routing, "routed_scaling_factor", "n_group", "topk_group"),
        group_score="top2_sum",
    )


def interleaved(fields: ConfigReader) -> bool:
    """Whether rotary pairs are neighbours."""
    return bool(fields.optional(bool, "rope_interleave"))


def _deepseek_v3(fields: ConfigReader) -> dict[str, Any]:
    return {
        **_deepseek(fields),
        "rope_interleave": interleaved(fields),
        "routing": sigmoid_routing(fields),
    }


def _glm4_moe(fields: ConfigReader) -> dict[str, Any]:
    return {
        **attention(fields, share=0.5),
        **first_dense(fields),
        "qkv_bias": fields.get(bool, "attention_bias"),
        "qk_norm": "head" if fields.get(bool, "use_qk_norm") else None,
        "routing": sigmoid_routing(fields),
    }


def _glm4_moe_lite(fields: ConfigReader) -> dict[str, Any]:
    num_layers = fields.get(int, "num_hidden_layers")
    kinds = fields.raw("mlp_layer_types")
    kinds = ["dense"] + ["sparse"] * (num_layers - 1) if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error(f"mlp_layer_types must be a list of {num_layers}, one for each layer")
    if unknown := [kind for kind in kinds if kind not in ("dense", "sparse")]:
        raise fields.error(f"mlp_layer_types holds {shown(unknown[0])}; valid: dense, sparse")
    dense = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
    return {
        **latent_attention(fields),
        **dense_and_shared(fields, dense),
        "rope_interleave": interleaved(fields),
        "routing": sigmoid_routing(fields),
    }


def _dots1(fields: ConfigReader) -> dict[str, Any]:
    window = fields.optional(int, "sliding_window")
    first = fields.get(int, "max_window_layers") if window is not None else 0
    layers = range(fields.get(int, "num_hidden_layers"))
    has_window = [window is not None and layer >= first for layer in layers]
    return {
        **biased_attention(fields),
        **first_dense(fields),
        "qk_norm": "head",
        "sliding_window": windows_by_type(fields, has_window),
        "routing": sigmoid_routing(fields),
    }


def _minimax_m2(fields: ConfigReader) -> dict[str, Any]:
    kinds = fields.raw("attn_type_list")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != 1 for kind in kinds)):
        raise fields.unsupported("attn_type_list")
    rotated = fields.optional(int, "rotary_dim")
    head_dim = fields.get(int, "head_dim")
    return {
        **attention(fields, share=1.0 if rotated is None else rotated / head_dim),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "qk_norm": "full",
        "routing": Routing(scoring_func="sigmoid", correction_bias=True),
    }


def _ernie4_5_moe(fields: ConfigReader) -> dict[str, Any]:
    if fields.get(float, "moe_norm_min") > 1e-9:  # sums of weights never come near
        raise fields.unsupported("moe_norm_min")
    num_layers = fields.get(int, "num_hidden_layers")
    first, last = (fields.get(int, f"moe_layer_{end}_index") for end in ("start", "end"))
    last, step = num_layers - 1 if last == -1 else last, fields.get(int, "moe_layer_interval")
    layers = range(num_layers)
    dense = tuple(i for i in layers if (i + 1) % step or not first <= i <= last)
    expert, num_shared = (
        fields.get(int, f"moe_{name}") for name in ("intermediate_size", "num_shared_experts")
    )
    return {
        **attention(fields),
        "rope_interleave": True,
        "moe_intermediate_size": expert,
        "intermediate_size": fields.get(int, "intermediate_size"),
        "dense_layers": dense,
        "draft": (LayerKind(Mixing(), "dense"),),
        "shared_expert_intermediate_size": num_shared * expert,
        "routing": Routing(correction_bias=True),
    }


def _granitemoe(fields: ConfigReader) -> dict[str, Any]:
    multipliers = [f"{name}_multiplier" for name in ("attention", "embedding", "residual")]
    return {
        **biased_attention(fields),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        **{name: fields.get(float, name) for name in (*multipliers, "logits_scaling")},
    }


def _qwen3_vl_moe(fields: ConfigReader) -> dict[str, Any]:
    """The language model; positions of text are the same in all three sections."""
    return {**qwen_moe(fields), **biased_attention(fields), "qk_norm": "head"}


def _gpt_oss(fields: ConfigReader) -> dict[str, Any]:
    layers = range(fields.get(int, "num_hidden_layers"))
    return {
        **biased_attention(fields),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "attention_sinks": True,
        "sliding_window": windows_by_type(fields, [i % 2 == 0 for i in layers]),
        **fields.same(ModelConfig, "swiglu_limit", "swiglu_alpha"),
        "expert_bias": True,
        "routing": Routing(router_bias=True),
    }


READERS: dict[str, Reader] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "glm4_moe_lite": _glm4_moe_lite,
    "dots1": _dots1,
    "minimax_m2": _minimax_m2,
    "ernie4_5_moe": _ernie4_5_moe,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "granitemoe": _granitemoe,
}
