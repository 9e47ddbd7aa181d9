"""Readers of families whose tokens take part of what is there: by chosen positions or experts.

The planner takes them; the engine does not run them. Each is read as its transformers class (5.24)
does.
"""

from typing import Any

from expertlane.spec.compressed import CompressedAttention
from expertlane.spec.families import Reader, attention, latent_attention, rotary
from expertlane.spec.hf_config import ConfigReader
from expertlane.spec.mixer_families import layer_types
from expertlane.spec.mixers import Entries, Indexer, Mixing
from expertlane.spec.model import LayerKind, ModelConfig, Routing


def _longcat_flash(fields: ConfigReader) -> dict[str, Any]:
    """Each of its layers is two here: attention and a dense MLP, and experts beside the first MLP.

    What the experts give is added after the second.
    """
    fields.expect("zero_expert_type", "identity")
    fields.expect("attention_method", "MLA")
    for key in ("attention_bias", "router_bias", "ngram_vocab_size_ratio"):
        fields.expect(key, False)
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


def _flags(fields: ConfigReader, key: str, num_layers: int) -> list[bool] | None:
    """A list of 0 and 1, one a layer, as truth values; None where it is null or missing."""
    if fields.raw(key) is None:
        return None
    flags = fields.integers(key)
    if len(flags) != num_layers or not set(flags) <= {0, 1}:
        raise fields.error(f"{key} must be a list of {num_layers}, each 0 or 1")
    return [flag == 1 for flag in flags]


def _minimax_m3(fields: ConfigReader) -> dict[str, Any]:
    """Grouped queries; in most layers an indexer chooses blocks for each head of keys and values.

    The language model: what stands beside `text_config` is not read.
    """
    num_layers = fields.get(int, "num_hidden_layers")
    fields.expect("scoring_func", "sigmoid")
    for key in ("use_qk_norm", "use_routing_bias", "use_gemma_norm"):
        fields.expect(key, True)
    fields.expect("qk_norm_type", "per_head")
    fields.expect("n_shared_experts", 1)
    indexer, without = _block_indexer(fields, num_layers)
    mlps = layer_types(fields, "mlp_layer_types", ("dense", "sparse"))
    has_experts = None if mlps is None else [kind == "sparse" for kind in mlps]
    if has_experts is None:
        has_experts = _flags(fields, "moe_layer_freq", num_layers) or [True] * num_layers
    if len(has_experts) != num_layers:
        raise fields.error(
            f"mlp_layer_types has {len(has_experts)} entries for {num_layers} layers"
        )
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
        "routing": Routing(
            scoring_func="sigmoid",
            correction_bias=True,
            **fields.same(Routing, "routed_scaling_factor"),
        ),
    }


def _block_indexer(fields: ConfigReader, num_layers: int) -> tuple[Indexer | None, tuple[int, ...]]:
    """The indexer of blocks, and the layers without it; None where no layer has it."""
    own = fields.inside("sparse_attention_config", *_INDEX_FIELDS.values(), *_INDEX_SWITCHES)
    own.expect("sparse_init_block", 0)
    own.expect("sparse_score_type", "max")
    types = layer_types(fields, "layer_types", (_CHOSEN, "full_attention"))
    has_index = None if types is None else [kind == _CHOSEN for kind in types]
    if has_index is None:
        has_index = _flags(own, "sparse_attention_freq", num_layers) or [False] * num_layers
    if len(has_index) != num_layers:
        raise fields.error(f"layer_types has {len(has_index)} entries for {num_layers} layers")
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
    for key in ("attention_bias", "mlp_bias"):
        fields.expect(key, False)
    fields.expect("scoring_func", "sqrtsoftplus")
    fields.expect("topk_method", "noaux_tc")
    fields.expect("norm_topk_prob", True)
    for key in ("num_key_value_heads", "n_shared_experts"):
        fields.expect(key, 1)
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


SPARSE_READERS: dict[str, Reader] = {
    "longcat_flash": _longcat_flash,
    "minimax_m3_vl": _minimax_m3,
    "deepseek_v4": _deepseek_v4,
}
