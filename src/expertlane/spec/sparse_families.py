"""Readers of families whose tokens take part of what is there: by chosen positions or experts.

The planner takes them; the engine does not run them. Each is read as its transformers class (5.24)
does.
"""

from typing import Any

from expertlane.spec.compressed import CompressedAttention
from expertlane.spec.families import Reader, latent_attention, rotary
from expertlane.spec.hf_config import ConfigReader
from expertlane.spec.mixer_families import layer_types
from expertlane.spec.mixers import Entries, Indexer
from expertlane.spec.model import ModelConfig, Routing
from expertlane.spec.ranges import shown


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


_CHOSEN, _ALL = "compressed_sparse_attention", "heavily_compressed_attention"
_ENTRIES: dict[str, Entries | None] = {"sliding_attention": None, _CHOSEN: "chosen", _ALL: "all"}
_OF_RATIO = {0: "sliding_attention", 4: _CHOSEN, 128: _ALL}
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
    num_layers, inner = (
        fields.get(int, key) for key in ("num_hidden_layers", "moe_intermediate_size")
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
        "sliding_window": (fields.get(int, "sliding_window"),) * num_layers,
        "compressed": compressed,
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
    given = fields.raw("compress_rates")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise fields.error(f"compress_rates is {shown(given)}; it must be an object")
    own = ConfigReader(given, f"{fields.name}: compress_rates", {_CHOSEN: 4, _ALL: 128})
    old = {"chosen_rate": (_CHOSEN, "compress_rate_csa"), "all_rate": (_ALL, "compress_rate_hca")}
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
        types = [_CHOSEN if layer % 2 else _ALL for layer in range(-2, num_layers - 2)]
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
    "deepseek_v4": _deepseek_v4,
}
