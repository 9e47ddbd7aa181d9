"""Readers of families that are planned alone, beside those of `spec.mixer_families`.

Families of grouped queries: layer norms, heads of their own in layers with a window, gates of a
value for each head, queries from a latent. And those whose tokens take part of what is there, by
chosen positions or experts. Each is read as its transformers class (5.24) does; Step-3 has none,
and is read as the code published with its checkpoint does.
"""

from typing import Any, TypeVar

from expertlane.spec.families import (
    Reader,
    attention,
    biased_attention,
    latent_attention,
    rope_parameters,
    rotary,
    windows_everywhere,
)
from expertlane.spec.hf_config import ConfigReader
from expertlane.spec.mixer_families import layer_types, mlp_types, types_of_all
from expertlane.spec.mixers import (
    CompressedAttention,
    Entries,
    Indexer,
    Mixing,
    RopeScaling,
    WindowHeads,
)
from expertlane.spec.model import LayerKind, ModelConfig, Routing
from expertlane.spec.ranges import shown

T = TypeVar("T", int, float, bool)

_WINDOW, _FULL = "sliding_attention", "full_attention"


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
    fields.expect("expert_hidden_dim", fields.get(int, "moe_intermediate_size"))
    scale = fields.get(float, "routed_scaling_factor")
    return {
        **biased_attention(fields),
        **mlp_types(fields),
        "qk_norm": "head",
        "routing": _sigmoid(scale),
    }


def _sigmoid(scale: float) -> Routing:
    return Routing(scoring_func="sigmoid", correction_bias=True, routed_scaling_factor=scale)


def _flags(fields: ConfigReader, key: str, num_layers: int) -> list[bool] | None:
    """A list of 0 and 1, one a layer, as truth values; None where it is null or missing."""
    if fields.raw(key) is None:
        return None
    flags = fields.integers(key)
    if len(flags) != num_layers or not set(flags) <= {0, 1}:
        raise fields.error(f"{key} must be a list of {num_layers}, each 0 or 1")
    return [flag == 1 for flag in flags]


def _mimo_v2_flash(fields: ConfigReader) -> dict[str, Any]:
    """Windows in five of six layers, with other heads of keys and values, and sinks."""
    for name in ("head_dim", "v_head_dim"):
        fields.expect(f"swa_{name}", fields.get(int, name))
    num_layers = fields.get(int, "num_hidden_layers")
    every = range(num_layers)
    types = types_of_all(fields, "layer_types", (_WINDOW, _FULL))
    has_window = _flags(fields, "hybrid_layer_pattern", num_layers)
    if has_window is None:
        has_window = [at > 0 and (at + 1) % 6 > 0 for at in every]
        has_window = has_window if types is None else [each == _WINDOW for each in types]
    sparse = _flags(fields, "moe_layer_freq", num_layers)
    if sparse is None:
        kinds = types_of_all(fields, "mlp_layer_types", ("dense", "sparse"))
        sparse = [at > 0 for at in every] if kinds is None else [each == "sparse" for each in kinds]
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
        fields.expect("moe_every_n_layer", 1)
        fields.expect("moe_layer_offset", 0)
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
    fields.expect("query_pre_attn_scalar", fields.get(int, "head_dim"))
    rotates = (
        _of_layers(fields, "use_rope_layers", bool, True) if fields.raw("use_rope_layers") else []
    )
    num_layers = fields.get(int, "num_hidden_layers")
    types = layer_types(fields, "layer_types", (_WINDOW, _FULL))
    types = [_FULL] * num_layers if types is None else types
    further = types[num_layers:]
    types = _each_layer(fields, types, num_layers, "layer_types")
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


def _longcat_flash(fields: ConfigReader) -> dict[str, Any]:
    """Each of its layers is two here: attention and a dense MLP, and experts beside the first MLP.

    What the experts give is added after the second.
    """
    num = fields.optional(int, "num_layers")
    if num is None:
        num = fields.get(int, "num_hidden_layers") // 2
    inner = fields.get(int, "intermediate_size")
    return {
        **latent_attention(fields),
        "num_hidden_layers": 2 * num,
        "rope_interleave": True,
        "dense_layers": tuple(range(1, 2 * num, 2)),
        "draft": (LayerKind(Mixing(), "dense"),),
        "intermediate_size": inner,
        "shared_expert_intermediate_size": inner,
        **fields.same(ModelConfig, "moe_intermediate_size"),
        "num_zero_experts": fields.optional(int, "zero_expert_num") or 0,
        "shortcut_experts": True,
        "routing": Routing(
            norm_topk_prob=False,
            correction_bias=True,
            **fields.same(Routing, "routed_scaling_factor"),
        ),
    }


_CHOSEN = "minimax_m3_sparse"
# Fields of its indexer, as transformers and as published configurations call them.
_INDEX_FIELDS = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}
_INDEX_SWITCHES = (
    "sparse_attention_freq",
    "use_sparse_attention",
    "sparse_disable_index_value",
    "sparse_init_block",
    "sparse_score_type",
)


def _minimax_m3(fields: ConfigReader) -> dict[str, Any]:
    """Grouped queries; in most layers an indexer chooses blocks for each head of keys and values.

    The language model: what stands beside `text_config` is not read.
    """
    num_layers = fields.get(int, "num_hidden_layers")
    indexer, without = _block_indexer(fields, num_layers)
    mlps = types_of_all(fields, "mlp_layer_types", ("dense", "sparse"))
    has_experts = None if mlps is None else [kind == "sparse" for kind in mlps]
    if has_experts is None:
        has_experts = _flags(fields, "moe_layer_freq", num_layers) or [True] * num_layers
    dense = tuple(layer for layer, has in enumerate(has_experts) if not has)
    rotated = fields.get(int, "rotary_dim") / fields.get(int, "head_dim")
    return {
        **attention(fields, share=rotated),
        "qk_norm": "head",
        "indexer": indexer,
        "unindexed_layers": without,
        "dense_layers": dense,
        "intermediate_size": fields.get(int, "dense_intermediate_size") if dense else 0,
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "shared_expert_intermediate_size": fields.get(int, "shared_intermediate_size"),
        **fields.same(ModelConfig, "swiglu_limit", "swiglu_alpha"),
        "routing": _sigmoid(fields.get(float, "routed_scaling_factor")),
    }


def _block_indexer(fields: ConfigReader, num_layers: int) -> tuple[Indexer | None, tuple[int, ...]]:
    """The indexer of blocks, and the layers without it; None where no layer has it."""
    own = fields.inside("sparse_attention_config", *_INDEX_FIELDS.values(), *_INDEX_SWITCHES)
    own.expect("sparse_init_block", 0)
    own.expect("sparse_score_type", "max")
    types = types_of_all(fields, "layer_types", (_CHOSEN, _FULL))
    has_index = None if types is None else [kind == _CHOSEN for kind in types]
    if has_index is None:
        has_index = _flags(own, "sparse_attention_freq", num_layers) or [False] * num_layers
    if any(has_index):
        own.expect("use_sparse_attention", True)
    without_values = _flags(own, "sparse_disable_index_value", num_layers) or has_index
    if any(has and not none for has, none in zip(has_index, without_values, strict=True)):
        raise own.error("sparse_disable_index_value is 0 in a layer with an indexer; it must be 1")
    index = {
        ours: own.get(int, theirs, default=fields.get(int, ours))
        for ours, theirs in _INDEX_FIELDS.items()
    }
    if not 1 <= index["index_local_blocks"] <= index["index_topk_blocks"]:
        raise fields.error(
            f"index_local_blocks is {index['index_local_blocks']}; it must be from 1 to "
            f"index_topk_blocks, {index['index_topk_blocks']}"
        )
    if not any(has_index):
        return None, ()
    indexer = Indexer(
        num_heads=index["index_n_heads"],
        head_dim=index["index_head_dim"],
        topk=index["index_topk_blocks"] * index["index_block_size"],
        block_size=index["index_block_size"],
        by_group=True,
    )
    return indexer, tuple(layer for layer, has in enumerate(has_index) if not has)


_SOME, _ALL = "compressed_sparse_attention", "heavily_compressed_attention"
_ENTRIES: dict[str, Entries | None] = {"sliding_attention": None, _SOME: "chosen", _ALL: "all"}
_OF_RATIO = {0: "sliding_attention", 4: _SOME, 128: _ALL}
_ROTATED = 64  # of 512 values of a head, where a configuration names no share


def _deepseek_v4(fields: ConfigReader) -> dict[str, Any]:
    """Compressed attention, several residual streams, and first layers that route by token."""
    num_layers, inner, window = (
        fields.get(int, key)
        for key in ("num_hidden_layers", "moe_intermediate_size", "sliding_window")
    )
    compressed = CompressedAttention(
        **fields.same(CompressedAttention, "q_lora_rank", "o_groups", "o_lora_rank"),
        **_rates(fields),
        layers=tuple(_ENTRIES[kind] for kind in _compressed_types(fields, num_layers)),
    )
    indexer = Indexer(
        num_heads=fields.get(int, "index_n_heads"),
        head_dim=fields.get(int, "index_head_dim"),
        topk=fields.get(int, "index_topk"),
    )
    return {
        **_positions(fields),
        "num_key_value_heads": 1,
        "attention_sinks": True,
        "sliding_window": (window,) * num_layers,
        "compressed": compressed,
        "draft": (LayerKind(Mixing(window=window), "experts"),),
        "indexer": indexer if "chosen" in compressed.layers else None,
        "num_streams": fields.get(int, "hc_mult"),
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner,
        "hash_layers": _hash_layers(fields, num_layers),
        "routing": Routing(
            scoring_func="sqrtsoftplus",
            correction_bias=True,
            **fields.same(Routing, "routed_scaling_factor"),
        ),
    }


def _rates(fields: ConfigReader) -> dict[str, int]:
    """Positions of an entry, of both kinds of layers."""
    default = {_SOME: 4, _ALL: 128}
    own = fields.inside("compress_rates", *default, defaults=default)
    old = {"chosen_rate": (_SOME, "compress_rate_csa"), "all_rate": (_ALL, "compress_rate_hca")}
    return {
        name: fields.get(int, key, default=own.get(int, kind)) for name, (kind, key) in old.items()
    }


def _compressed_types(fields: ConfigReader, num_layers: int) -> list[str]:
    """The type of each layer: by name, by the positions of an entry, or every second of each."""
    types = layer_types(fields, "layer_types", tuple(_ENTRIES))
    if types is None and (ratios := fields.integers("compress_ratios")):
        if unknown := [each for each in ratios if each not in _OF_RATIO]:
            raise fields.error(f"compress_ratios holds {unknown[0]}; valid: 0, 4, 128")
        types = [_OF_RATIO[each] for each in ratios]
    if types is None:
        types = [_SOME if layer % 2 else _ALL for layer in range(-2, num_layers - 2)]
        types[:2] = [_ALL] * 2
    return _each_layer(fields, types, num_layers, "layer_types or compress_ratios")


def _hash_layers(fields: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """The layers in which a token's number chooses its experts."""
    types = layer_types(fields, "mlp_layer_types", ("hash_moe", "moe"))
    if types is None:
        return tuple(range(min(num_layers, fields.get(int, "num_hash_layers", default=3))))
    types = _each_layer(fields, types, num_layers, "mlp_layer_types")
    return tuple(layer for layer, kind in enumerate(types) if kind == "hash_moe")


def _each_layer(fields: ConfigReader, types: list[str], num_layers: int, what: str) -> list[str]:
    """The types of all layers; those of layers that draft, after them, are left out."""
    if len(types) < num_layers:
        raise fields.error(f"{what} has {len(types)} entries for {num_layers} layers")
    return types[:num_layers]


def _positions(fields: ConfigReader) -> dict[str, Any]:
    """Rotary positions: those of layers with entries, which alone are scaled.

    The base is that of the others: it costs nothing.
    """
    head_dim = fields.get(int, "head_dim")
    rotated = fields.get(int, "qk_rope_head_dim", default=_ROTATED * head_dim // 512)
    rope = fields.raw("rope_scaling", "rope_parameters")
    if isinstance(rope, dict):
        own = rope.get("compress", rope)
        rope = {"attention_factor": 1.0} | own if isinstance(own, dict) else own
    scaled = fields.with_fields(rope_scaling=rope, rope_parameters=None)
    return {
        "head_dim": head_dim,
        **rotary(scaled, share=rotated / head_dim),
        "rope_theta": fields.get(float, "rope_theta"),
    }


PLANNED_READERS: dict[str, Reader] = {
    "phimoe": _phimoe,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
    "hy_v3": _hy_v3,
    "mimo_v2_flash": _mimo_v2_flash,
    "step3p5": _step3p5,
    "step3_text": _step3_text,
    "longcat_flash": _longcat_flash,
    "minimax_m3_vl": _minimax_m3,
    "deepseek_v4": _deepseek_v4,
}
