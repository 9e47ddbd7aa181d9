"""Readers of families of grouped queries that are planned alone.

What they have beside plain attention: layer norms, heads of their own in layers with a window,
gates of a value for each head, queries from a latent. Each is read as its transformers class (5.24)
does; Step-3 has none, and is read as the code published with its checkpoint does.
"""

from typing import Any, TypeVar

from expertlane.spec.families import (
    Reader,
    attention,
    biased_attention,
    rope_parameters,
    rotary,
    windows_everywhere,
)
from expertlane.spec.hf_config import ConfigReader
from expertlane.spec.mixer_families import layer_types, mlp_types
from expertlane.spec.mixers import Mixing, RopeScaling, WindowHeads
from expertlane.spec.model import LayerKind, ModelConfig, Routing
from expertlane.spec.ranges import shown

T = TypeVar("T", int, float, bool)

_WINDOW, _FULL = "sliding_attention", "full_attention"


def _expect_all(fields: ConfigReader, **allowed: object) -> None:
    for key, value in allowed.items():
        fields.expect(key, value)


def _phimoe(fields: ConfigReader) -> dict[str, Any]:
    fields.expect("num_experts_per_tok", 2)  # its router chooses two, one after the other
    bias = fields.get(bool, "attention_bias")
    return {
        **_longrope(fields),
        "qkv_bias": bias,
        "output_bias": bias,
        "sliding_window": windows_everywhere(fields),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "further_biases": ("norm", *["head"] * fields.get(bool, "lm_head_bias")),
        "routing": Routing(norm_topk_prob=False),
    }


def _longrope(fields: ConfigReader) -> dict[str, Any]:
    """Heads, and positions that may be scaled by a factor for each frequency."""
    rope = rope_parameters(fields)
    if rope.get(str, "rope_type", "type", default="default") != "longrope":
        return attention(fields)
    heads = fields.get(int, "num_attention_heads")
    head_dim = fields.get(int, "head_dim", default=fields.get(int, "hidden_size") // heads)
    for key in ("long_factor", "short_factor"):
        factors = rope.raw(key)
        if not isinstance(factors, list) or len(factors) != head_dim // 2:
            raise fields.error(f"{key} must be a list of {head_dim // 2} numbers")
    max_len = fields.get(int, "max_position_embeddings")
    trained = rope.get(int, "original_max_position_embeddings", default=max_len)
    scaling = RopeScaling(
        "longrope",
        factor=max_len / trained,
        original_max_position_embeddings=trained,
        attention_factor=rope.get(float, "long_mscale"),
    )
    theta = rope.optional(float, "rope_theta")
    return {
        "head_dim": head_dim,
        "num_key_value_heads": fields.get(int, "num_key_value_heads", default=heads),
        "rope_theta": fields.get(float, "rope_theta") if theta is None else theta,
        "rope_scaling": scaling,
    }


def _hunyuan_v1_moe(fields: ConfigReader) -> dict[str, Any]:
    """Queries and keys are normed after they are rotated; experts are as wide as the shared one."""
    fields.expect("group_limited_greedy", False)
    for key in ("use_cla", "use_mla", "mlp_bias", "position_embedding_xdrope"):
        fields.expect(key, False)
    for key in ("use_qk_norm", "use_rotary_pos_emb", "norm_topk_prob", "use_mixed_mlp_moe"):
        fields.expect(key, True)
    for key in ("n_group", "topk_group"):
        fields.expect(key, 1)
    _expect_all(fields, norm_type="rms", routed_scaling_factor=1.0, moe_layer_num_skipped=0)
    inner = fields.get(int, "intermediate_size")
    for key, value in (("moe_intermediate_size", inner), ("num_shared_expert", 1)):
        given = fields.raw(key)
        if given is not None and any(
            each != value for each in (given if isinstance(given, list) else [given])
        ):
            raise fields.unsupported(key)
    return {
        **_ntk_positions(fields),
        "qk_norm": "rotated_head",
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner,
    }


def _ntk_positions(fields: ConfigReader) -> dict[str, Any]:
    """Attention; with an `alpha` of dynamic scaling, frequencies are of a larger base."""
    head_dim = fields.raw("head_dim", "attention_head_dim")
    found = biased_attention(fields.with_fields(head_dim=head_dim))
    alpha, dim = rope_parameters(fields).optional(float, "alpha"), found["head_dim"]
    if alpha is not None:
        found["rope_theta"] *= alpha ** (dim / (dim - 2))
    return found


def _hy_v3(fields: ConfigReader) -> dict[str, Any]:
    fields.expect("mlp_bias", False)
    fields.expect("expert_hidden_dim", fields.get(int, "moe_intermediate_size"))
    for key in ("qk_norm", "route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias"):
        fields.expect(key, True)
    scale = fields.get(float, "routed_scaling_factor")
    return {
        **biased_attention(fields),
        **mlp_types(fields),
        "qk_norm": "head",
        "routing": _sigmoid(scale),
    }


def _sigmoid(scale: float) -> Routing:
    return Routing(scoring_func="sigmoid", correction_bias=True, routed_scaling_factor=scale)


def _flags(fields: ConfigReader, key: str) -> list[bool] | None:
    """A list of 0 and 1, one for each layer; None where it is null or missing."""
    if fields.raw(key) is None:
        return None
    numbers, num_layers = fields.integers(key), fields.get(int, "num_hidden_layers")
    if len(numbers) != num_layers or not set(numbers) <= {0, 1}:
        raise fields.error(f"{key} must be a list of {num_layers} times 0 or 1")
    return [number == 1 for number in numbers]


def _mimo_v2_flash(fields: ConfigReader) -> dict[str, Any]:
    """Windows in five of six layers, with other heads of keys and values, and sinks."""
    _expect_all(fields, scoring_func="sigmoid", topk_method="noaux_tc", n_shared_experts=0)
    fields.expect("use_qk_norm", False)
    for name in ("head_dim", "v_head_dim"):
        fields.expect(f"swa_{name}", fields.get(int, name))
    num_layers = fields.get(int, "num_hidden_layers")
    every = range(num_layers)
    types = layer_types(fields, "layer_types", (_WINDOW, _FULL))
    has_window = _flags(fields, "hybrid_layer_pattern")
    if has_window is None:
        has_window = [at > 0 and (at + 1) % 6 > 0 for at in every]
        has_window = has_window if types is None else [each == _WINDOW for each in types]
    sparse = _flags(fields, "moe_layer_freq")
    if sparse is None:
        kinds = layer_types(fields, "mlp_layer_types", ("dense", "sparse"))
        sparse = [at > 0 for at in every] if kinds is None else [each == "sparse" for each in kinds]
    if {len(has_window), len(sparse)} != {num_layers}:
        raise fields.error(f"layer_types and mlp_layer_types must have {num_layers} entries")
    earlier = fields.optional(int, "sliding_window_size")
    window = fields.get(int, "sliding_window") if earlier is None else earlier + 1
    heads, kv_heads = (fields.get(int, f"num_{name}_heads") for name in ("attention", "key_value"))
    own = WindowHeads(
        fields.get(int, "swa_num_attention_heads", default=heads),
        fields.get(int, "swa_num_key_value_heads", default=2 * kv_heads),
        sinks=fields.get(bool, "add_swa_attention_sink_bias", default=True),
    )
    dense = tuple(at for at in every if not sparse[at])
    return {
        **_positions_by_type(fields),
        "head_dim": fields.get(int, "head_dim"),
        "v_head_dim": fields.get(int, "v_head_dim"),
        "num_key_value_heads": kv_heads,
        "qkv_bias": fields.get(bool, "attention_bias"),
        "sliding_window": tuple(window if each else None for each in has_window),
        "window_heads": own if any(has_window) else None,
        "attention_sinks": fields.get(bool, "add_full_attention_sink_bias", default=False),
        **fields.same(ModelConfig, "moe_intermediate_size"),
        "dense_layers": dense,
        "draft": (LayerKind(Mixing(window=window if any(has_window) else None), "dense"),),
        "intermediate_size": fields.get(int, "intermediate_size"),
        "routing": Routing(
            scoring_func="sigmoid",
            norm_topk_prob=fields.get(bool, "norm_topk_prob"),
            correction_bias=True,
            routed_scaling_factor=fields.get(float, "routed_scaling_factor", default=1.0),
            **fields.same(Routing, "n_group", "topk_group"),
            group_score="top2_sum",
        ),
    }


def _positions_by_type(fields: ConfigReader) -> dict[str, Any]:
    """Positions of the layers without a window; those with one differ in base and share alone."""
    given = fields.raw("rope_parameters")
    if not isinstance(given, dict) or not isinstance(own := given.get(_FULL), dict):
        return rotary(fields, share=fields.get(float, "partial_rotary_factor"))
    inside = ConfigReader(own, fields.name, fields.defaults)
    return rotary(inside, share=inside.get(float, "partial_rotary_factor"))


def _of_layers(fields: ConfigReader, key: str, kind: type[T], default: T) -> list[T]:
    """One value for each layer, of a list (layers that draft come last) or for all of them."""
    given, num_layers = fields.raw(key), fields.get(int, "num_hidden_layers")
    values = given if isinstance(given, list) else [default if given is None else given]
    if isinstance(given, list) and len(given) < num_layers:
        raise fields.error(f"{key} has {len(given)} entries for {num_layers} layers")
    found = [fields.typed(kind, key, each) for each in values]
    return found[:num_layers] if isinstance(given, list) else found * num_layers


def _sparse_layers(fields: ConfigReader, default: range) -> list[int]:
    """The layers with experts, by `moe_layers_enum`: numbers, or a text of them."""
    given = fields.raw("moe_layers_enum")
    if given is None:
        _expect_all(fields, moe_every_n_layer=1, moe_layer_offset=0)
    if isinstance(given, str):
        numbers = given.split(",")
        if not all(each.strip().isdecimal() and len(each) < 9 for each in numbers):
            raise fields.error(f"moe_layers_enum is {shown(given)}; it must be numbers and commas")
        return [int(each) for each in numbers]
    return [*default] if given is None else fields.integers("moe_layers_enum")


def _step_mlps(fields: ConfigReader, first: int) -> dict[str, Any]:
    """MLPs of Step models: dense ones first, a shared expert beside all experts."""
    num_layers = fields.get(int, "num_hidden_layers")
    sparse = set(_sparse_layers(fields, range(first, num_layers)))
    dense = tuple(at for at in range(num_layers) if at not in sparse)
    return {
        **fields.same(ModelConfig, "moe_intermediate_size"),
        "shared_expert_intermediate_size": fields.get(int, "share_expert_dim", "share_expert_dims"),
        "dense_layers": dense,
        "intermediate_size": fields.get(int, "intermediate_size") if dense else 0,
    }


def _step3p5(fields: ConfigReader) -> dict[str, Any]:
    """Windows in three of four layers, with more heads of queries; a gate for each head."""
    _expect_all(fields, moe_router_activation="sigmoid", att_impl_type="GQA", gating=True)
    for key in ("use_head_wise_attn_gate", "use_moe_router_bias", "norm_expert_weight"):
        fields.expect(key, True)
    for key in ("use_moe", "use_qk_norm"):
        fields.expect(key, True)
    for key in ("use_mfa", "mlp_bias", "sparse_attention_config", "sparse_config"):
        fields.expect(key, False)
    fields.expect("query_pre_attn_scalar", fields.get(int, "head_dim"))
    rotates = (
        _of_layers(fields, "use_rope_layers", bool, True) if fields.raw("use_rope_layers") else []
    )
    num_layers = fields.get(int, "num_hidden_layers")
    types = layer_types(fields, "layer_types", (_WINDOW, _FULL))
    types = [_FULL] * num_layers if types is None else types
    types, further = types[:num_layers], types[num_layers:]
    if len(types) != num_layers:
        raise fields.error(f"layer_types has {len(types)} entries for {num_layers} layers")
    kinds = layer_types(fields, "mlp_layer_types", ("dense", "sparse"))
    mlps = _step_mlps(fields, 3)
    if kinds is not None:
        dense = tuple(at for at, each in enumerate(kinds[:num_layers]) if each == "dense")
        mlps["dense_layers"] = dense
    window = fields.get(int, "sliding_window") if _WINDOW in types else None
    # Layers that draft come last in `layer_types`, and are not in `moe_layers_enum`.
    of_draft = Mixing(window=window if further[:1] in ([], [_WINDOW]) else None)
    mlps["draft"] = (LayerKind(of_draft, "dense"),)
    mlps["intermediate_size"] = fields.get(int, "intermediate_size")
    heads, kv_heads = (
        fields.get(int, *keys)
        for keys in (["num_attention_heads"], ["num_key_value_heads", "num_attention_groups"])
    )
    own = _other_heads(fields, heads, kv_heads)
    first_full = types.index(_FULL) if _FULL in types else 0
    thetas = _of_layers(fields, "rope_theta", float, 10_000.0)
    shares = _of_layers(fields, "partial_rotary_factors", float, 1.0)
    positions = fields.with_fields(rope_theta=thetas[first_full], partial_rotary_factor=None)
    bias = fields.get(bool, "attention_bias")
    return {
        "max_position_embeddings": fields.get(int, "max_position_embeddings", "max_seq_len"),
        **rotary(positions, share=shares[first_full]),
        "head_dim": fields.get(int, "head_dim"),
        "num_key_value_heads": kv_heads,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "head",
        "attention_gate": "head",
        "unrotated_layers": tuple(at for at, each in enumerate(rotates) if not each),
        "sliding_window": tuple(window if each == _WINDOW else None for each in types),
        "window_heads": own if _WINDOW in types else None,
        **mlps,
        "routing": _sigmoid(fields.get(float, "moe_router_scaling_factor")),
    }


def _other_heads(fields: ConfigReader, heads: int, kv_heads: int) -> WindowHeads:
    """Heads of the layers with a window, by `attention_other_setting`."""
    sizes = ("num_attention_heads", "num_key_value_heads", "num_attention_groups", "head_dim")
    own = fields.inside("attention_other_setting", "attention_type", "true_head_dim", *sizes)
    own.expect("attention_type", _WINDOW)
    own.expect("head_dim", fields.get(int, "head_dim"))
    num = fields.get(int, "num_sliding_attention_heads", default=heads)
    return WindowHeads(
        own.get(int, "num_attention_heads", default=num),
        own.get(int, "num_key_value_heads", "num_attention_groups", default=kv_heads),
    )


def _step3_text(fields: ConfigReader) -> dict[str, Any]:
    """Multi-matrix factorization attention: queries from a latent, one head of keys and values."""
    fields.expect("num_attention_groups", 1)
    fields.expect("moe_router_activation", "softmax")
    fields.expect("use_mfa", True)
    for key in ("use_moe_router_bias", "use_head_wise_attn_gate", "use_qk_norm"):
        fields.expect(key, False)
    return {
        "max_position_embeddings": fields.get(
            int, "max_position_embeddings", "max_position_embedding", "max_seq_len"
        ),
        **rotary(fields),
        "head_dim": fields.get(int, "head_dim"),
        "num_key_value_heads": 1,
        "query_rank": fields.get(int, "share_q_dim"),
        **_step_mlps(fields, 1),
        "routing": Routing(
            norm_topk_prob=fields.get(bool, "norm_expert_weight"),
            routed_scaling_factor=fields.get(float, "moe_router_scaling_factor"),
        ),
    }


GROUPED_READERS: dict[str, Reader] = {
    "phimoe": _phimoe,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
    "hy_v3": _hy_v3,
    "mimo_v2_flash": _mimo_v2_flash,
    "step3p5": _step3p5,
    "step3_text": _step3_text,
}
