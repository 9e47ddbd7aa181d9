"""Readers of families with mixers beside plain attention, or layers unlike Mixtral's.

The planner takes them; the engine does not run them yet. Each is read as its transformers class
(5.24) does.
"""

from typing import Any

from expertlane.spec.families import (
    Reader,
    attention,
    biased_attention,
    dense_and_shared,
    interleaved,
    latent_attention,
    norms_as_told,
    qwen_moe,
    sigmoid_routing,
)
from expertlane.spec.hf_config import ConfigReader
from expertlane.spec.mixers import Indexer, Mixing, StateMixer
from expertlane.spec.model import LayerKind, ModelConfig, Routing
from expertlane.spec.ranges import shown

_STATE, _FULL = "linear_attention", "full_attention"
_FULL_WITH_EXPERTS = (LayerKind(Mixing(), "experts"),)
_OLD_TYPES = {"mamba": _STATE, "attention": _FULL}  # as transformers 4 calls them


def layer_types(fields: ConfigReader, key: str, valid: tuple[str, ...]) -> list[str] | None:
    """The type of each layer, by a list of them; None where it is null or missing."""
    types = fields.raw(key)
    if types is None:
        return None
    if not isinstance(types, list):
        raise fields.error(f"{key} is {shown(types)}; it must be a list")
    found = [_OLD_TYPES.get(kind, kind) if isinstance(kind, str) else kind for kind in types]
    for kind in found:
        if kind not in valid:
            raise fields.error(f"{key} holds {shown(kind)}; valid: {', '.join(valid)}")
    return found


def types_of_all(fields: ConfigReader, key: str, valid: tuple[str, ...]) -> list[str] | None:
    """The types of `layer_types`, which must be as many as there are layers."""
    types, num_layers = layer_types(fields, key, valid), fields.get(int, "num_hidden_layers")
    if types is not None and len(types) != num_layers:
        raise fields.error(f"{key} has {len(types)} entries for {num_layers} layers")
    return types


def _state_layers(fields: ConfigReader, default: list[bool]) -> tuple[int, ...]:
    """The layers with a state, by `layer_types`, else a family's default."""
    types = types_of_all(fields, "layer_types", (_STATE, _FULL))
    has_state = default if types is None else [kind == _STATE for kind in types]
    return tuple(layer for layer, has in enumerate(has_state) if has)


def _with_state(state: StateMixer, layers: tuple[int, ...]) -> dict[str, Any]:
    return {"state": state if layers else None, "state_layers": layers}


def _gated_delta(fields: ConfigReader) -> dict[str, Any]:
    """Gated attention in every fourth layer, Gated DeltaNet in the others."""
    every = fields.get(int, "full_attention_interval", default=4)
    num_layers = fields.get(int, "num_hidden_layers")
    layers = _state_layers(fields, [bool((layer + 1) % every) for layer in range(num_layers)])
    state = StateMixer(
        "gated_delta",
        num_heads=fields.get(int, "linear_num_value_heads"),
        num_key_heads=fields.get(int, "linear_num_key_heads"),
        key_dim=fields.get(int, "linear_key_head_dim"),
        value_dim=fields.get(int, "linear_value_head_dim"),
        conv_kernel=fields.get(int, "linear_conv_kernel_dim"),
    )
    return {
        **biased_attention(fields, share=0.25),
        "qk_norm": "head",
        "attention_gate": "sigmoid",
        **_with_state(state, layers),
        "draft": _FULL_WITH_EXPERTS,
        **fields.same(ModelConfig, "shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }


def _qwen3_next(fields: ConfigReader) -> dict[str, Any]:
    return {**_gated_delta(fields), **qwen_moe(fields), "routing": norms_as_told(fields)}


def _qwen3_5_moe(fields: ConfigReader) -> dict[str, Any]:
    if fields.integers("mlp_only_layers"):
        raise fields.unsupported("mlp_only_layers")
    return {**_gated_delta(fields), **fields.same(ModelConfig, "moe_intermediate_size")}


def mlp_types(fields: ConfigReader) -> dict[str, Any]:
    """MLPs by `mlp_layer_types`; without it the first layers have no experts."""
    num_layers = fields.get(int, "num_hidden_layers")
    first = min(fields.get(int, "first_k_dense_replace"), num_layers)
    kinds = types_of_all(fields, "mlp_layer_types", ("dense", "sparse"))
    if kinds is None:
        kinds = ["dense" if layer < first else "sparse" for layer in range(num_layers)]
    return dense_and_shared(fields, [at for at, kind in enumerate(kinds) if kind == "dense"])


def _indexed(fields: ConfigReader) -> dict[str, Any]:
    """Latent attention of positions that an indexer chooses; MLPs as DeepSeek-V3."""
    indexer = Indexer(
        num_heads=fields.get(int, "index_n_heads"),
        head_dim=fields.get(int, "index_head_dim"),
        topk=fields.get(int, "index_topk"),
    )
    return {
        **latent_attention(fields),
        **mlp_types(fields),
        "indexer": indexer,
        "draft": (LayerKind(Mixing(choice="own"), "experts"),),
        "rope_interleave": interleaved(fields),
        "routing": sigmoid_routing(fields),
    }


_OF_PATTERN = {"F": "full", "S": "shared"}


def _glm_moe_dsa(fields: ConfigReader) -> dict[str, Any]:
    """DeepSeek-V3.2's layers, some of which take the choice of an earlier layer.

    A list names them, or else a pattern; without either, the first layers and then every
    `index_topk_freq`-th have their own indexer.
    """
    num_layers, kinds = fields.get(int, "num_hidden_layers"), tuple(_OF_PATTERN.values())
    types = layer_types(fields, "indexer_types", kinds)
    pattern = fields.raw("index_topk_pattern")
    if types is None and isinstance(pattern, str) and set(pattern) <= set(_OF_PATTERN):
        types = [_OF_PATTERN[each] for each in pattern]
    elif types is None:
        types = layer_types(fields, "index_topk_pattern", kinds)
    if types is None:
        freq = max(fields.get(int, "index_topk_freq", default=1), 1)
        begin = fields.get(int, "index_skip_topk_offset", default=2) - 1
        layers = range(num_layers)
        types = ["shared" if max(at - begin, 0) % freq else "full" for at in layers]
    if len(types) != num_layers:
        raise fields.error(
            f"indexer_types (or index_topk_pattern) has {len(types)} entries for {num_layers} "
            "layers"
        )
    shared = tuple(layer for layer, kind in enumerate(types) if kind == "shared")
    return {**_indexed(fields), "shared_choice_layers": shared}


def _kimi_linear(fields: ConfigReader) -> dict[str, Any]:
    listed = ("kda_layers", "full_attn_layers")  # numbers from 1
    sizes = ("num_heads", "head_dim", "short_conv_kernel_size")
    own = fields.inside("linear_attn_config", *listed, *sizes, "use_full_rank_gate")
    own.expect("use_full_rank_gate", False)
    num_layers = fields.get(int, "num_hidden_layers")
    has_state = [not layer or layer % 4 != 0 for layer in range(num_layers)]
    with_state, without = (own.integers(key) for key in listed)
    if with_state or without:
        if sorted(with_state + without) != [*range(1, num_layers + 1)]:
            raise own.error(
                f"{' and '.join(listed)} must name each layer once, from 1 to {num_layers}"
            )
        has_state = [layer + 1 in with_state for layer in range(num_layers)]
    heads, head_dim = (
        own.get(int, name, default=fields.get(int, f"linear_{name}"))
        for name in ("num_heads", "head_dim")
    )
    kernel = fields.get(int, "linear_conv_kernel_dim")
    state = StateMixer(
        "kimi_delta",
        num_heads=heads,
        num_key_heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        conv_kernel=own.get(int, "short_conv_kernel_size", default=kernel),
    )
    return {
        **latent_attention(fields),
        **mlp_types(fields),
        "unrotated_layers": tuple(range(num_layers)),
        **_with_state(state, _state_layers(fields, has_state)),
        "routing": sigmoid_routing(fields),
    }


def _granitemoehybrid(fields: ConfigReader) -> dict[str, Any]:
    num_layers, hidden = (fields.get(int, key) for key in ("num_hidden_layers", "hidden_size"))
    heads = fields.get(int, "mamba_n_heads")
    inner = fields.get(int, "mamba_expand") * hidden
    head_dim = fields.raw("mamba_d_head")
    if head_dim in ("auto", None):
        head_dim = inner // heads
    if fields.typed(int, "mamba_d_head", head_dim) * heads != inner:
        raise fields.error(
            f"mamba_d_head · mamba_n_heads is {head_dim} · {heads}; it must be mamba_expand · "
            f"hidden_size, {inner}"
        )
    state = StateMixer(
        "mamba2",
        num_heads=heads,
        num_key_heads=fields.get(int, "mamba_n_groups"),
        key_dim=fields.get(int, "mamba_d_state"),
        value_dim=head_dim,
        conv_kernel=fields.get(int, "mamba_d_conv"),
        conv_bias=fields.get(bool, "mamba_conv_bias"),
        proj_bias=fields.get(bool, "mamba_proj_bias"),
        chunk_size=fields.get(int, "mamba_chunk_size"),
    )
    multipliers = [f"{name}_multiplier" for name in ("attention", "embedding", "residual")]
    has_rope = fields.raw("position_embedding_type") == "rope"
    return {
        **biased_attention(fields),
        "unrotated_layers": () if has_rope else tuple(range(num_layers)),
        **_with_state(state, _state_layers(fields, [True] * num_layers)),
        "moe_intermediate_size": fields.get(int, "intermediate_size"),
        "shared_expert_intermediate_size": fields.get(int, "shared_intermediate_size"),
        **{name: fields.get(float, name) for name in (*multipliers, "logits_scaling")},
    }


_BLOCKS = {"M": _STATE, "*": _FULL, "E": "moe", "-": "mlp"}
_KINDS_OF_BLOCKS = {
    _STATE: LayerKind(Mixing("state"), "none"),
    _FULL: LayerKind(Mixing(), "none"),
    "moe": LayerKind(None, "experts"),
    "mlp": LayerKind(None, "dense"),
}


def _blocks(fields: ConfigReader, types: str, pattern: str) -> list[str] | None:
    """Types of layers: from a list, or from a pattern of one sign a layer; None without either."""
    blocks, signs = layer_types(fields, types, tuple(_BLOCKS.values())), fields.raw(pattern)
    if blocks is None and signs is not None:
        if not isinstance(signs, str) or not signs or not set(signs) <= set(_BLOCKS):
            valid = " ".join(_BLOCKS)
            raise fields.error(f"{pattern} is {shown(signs)}; it must be a string of {valid}")
        blocks = [_BLOCKS[each] for each in signs]
    return blocks


def _nemotron_h(fields: ConfigReader) -> dict[str, Any]:
    """Layers of a mixer or an MLP alone."""
    blocks = _blocks(fields, "layers_block_type", "hybrid_override_pattern")
    if not blocks:
        raise fields.error("layers_block_type or hybrid_override_pattern must name every layer")
    of = {kind: tuple(at for at, each in enumerate(blocks) if each == kind) for kind in set(blocks)}
    if not (kernel := fields.get(int, "conv_kernel")):
        raise fields.unsupported("conv_kernel")
    state = StateMixer(
        "mamba2",
        num_heads=fields.get(int, "mamba_num_heads"),
        num_key_heads=fields.get(int, "n_groups"),
        key_dim=fields.get(int, "ssm_state_size"),
        value_dim=fields.get(int, "mamba_head_dim"),
        conv_kernel=kernel,
        conv_bias=fields.get(bool, "use_conv_bias"),
        chunk_size=fields.get(int, "chunk_size"),
    )
    heads, dense = fields.get(int, "num_attention_heads"), of.get("mlp", ())
    drafts: list[str] = []
    if fields.get(int, "num_nextn_predict_layers"):
        found = _blocks(fields, "mtp_layers_block_type", "mtp_hybrid_override_pattern")
        drafts = [_FULL, "moe"] if found is None else found
    has_dense = bool(dense) or "mlp" in drafts
    return {
        "num_hidden_layers": len(blocks),
        "head_dim": fields.get(int, "head_dim"),
        "num_key_value_heads": fields.get(int, "num_key_value_heads", default=heads),
        "unrotated_layers": tuple(range(len(blocks))),
        **_with_state(state, of.get(_STATE, ())),
        "mixer_only_layers": tuple(sorted(of.get(_STATE, ()) + of.get(_FULL, ()))),
        "mlp_only_layers": tuple(sorted(of.get("moe", ()) + dense)),
        "dense_layers": dense,
        "draft": tuple(_KINDS_OF_BLOCKS[each] for each in drafts),
        "intermediate_size": fields.get(int, "intermediate_size") if has_dense else 0,
        "moe_intermediate_size": fields.get(int, "moe_intermediate_size"),
        "moe_latent_size": fields.optional(int, "moe_latent_size"),
        "shared_expert_intermediate_size": fields.get(int, "moe_shared_expert_intermediate_size"),
        "routing": sigmoid_routing(fields),
    }


def _jamba(fields: ConfigReader) -> dict[str, Any]:
    """Attention without positions in one layer of a period, Mamba-1 in the others; experts too."""
    num_layers, hidden = (fields.get(int, key) for key in ("num_hidden_layers", "hidden_size"))
    chosen = {}
    for what in ("attn", "expert"):
        period, offset = (fields.get(int, f"{what}_layer_{key}") for key in ("period", "offset"))
        if offset >= period:
            raise fields.error(
                f"{what}_layer_offset is {offset}; it must be under {what}_layer_period, {period}"
            )
        chosen[what] = {layer for layer in range(num_layers) if layer % period == offset}
    inner = fields.get(int, "intermediate_size")
    rank = fields.raw("mamba_dt_rank")
    state = StateMixer(
        "mamba1",
        num_heads=fields.get(int, "mamba_expand") * hidden,
        num_key_heads=1,
        key_dim=fields.get(int, "mamba_d_state"),
        value_dim=1,
        conv_kernel=fields.get(int, "mamba_d_conv"),
        conv_bias=fields.get(bool, "mamba_conv_bias"),
        proj_bias=fields.get(bool, "mamba_proj_bias"),
        step_rank=-(-hidden // 16) if rank == "auto" else fields.get(int, "mamba_dt_rank"),
    )
    heads = fields.get(int, "num_attention_heads")
    dense = tuple(layer for layer in range(num_layers) if layer not in chosen["expert"])
    return {
        "head_dim": fields.get(int, "head_dim", default=hidden // heads),
        "num_key_value_heads": fields.get(int, "num_key_value_heads", default=heads),
        "unrotated_layers": tuple(range(num_layers)),
        **_with_state(state, tuple(at for at in range(num_layers) if at not in chosen["attn"])),
        "moe_intermediate_size": inner,
        "intermediate_size": inner if dense else 0,
        "dense_layers": dense,
        "routing": Routing(norm_topk_prob=False),
    }


def _bailing_rest(fields: ConfigReader, group: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Fields common to Ling and Ring hybrids: MLPs, routing, and which layers have a state.

    The last layer of each group has attention.
    """
    expert, num_layers = (
        fields.get(int, key) for key in ("moe_intermediate_size", "num_hidden_layers")
    )
    shared = fields.get(int, "moe_shared_expert_intermediate_size", default=expert)
    if num_layers % group:
        raise fields.error(
            f"num_hidden_layers is {num_layers}; layers after the last whole group of {group} "
            "(layer_group_size) are not supported"
        )
    rest = {
        **mlp_types(fields),
        "draft": _FULL_WITH_EXPERTS,
        "shared_expert_intermediate_size": fields.get(int, "n_shared_experts") * shared,
        "routing": sigmoid_routing(fields),
    }
    return rest, tuple(layer for layer in range(num_layers) if (layer + 1) % group)


def _lightning(fields: ConfigReader) -> StateMixer:
    """Lightning Attention as in Ling 2.5 and Ring-linear: queries and keys of every head."""
    heads = fields.get(int, "num_attention_heads")
    own = fields.get(int, "hidden_size") // heads
    head_dim = fields.get(int, "head_dim", default=own)
    if head_dim != own:
        raise fields.unsupported("head_dim")
    return StateMixer(
        "lightning",
        num_heads=heads,
        num_key_heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        conv_kernel=0,
        chunk_size=256,  # of the published kernels
        qk_norm=fields.get(bool, "use_qk_norm", default=False),
        norm_groups=fields.get(int, "group_norm_size", default=1),
    )


def _bailing_moe_linear(fields: ConfigReader) -> dict[str, Any]:
    """Ring-linear 2.0: Lightning Attention, and grouped queries in the last layer of a group."""
    rest, layers = _bailing_rest(fields, fields.get(int, "layer_group_size"))
    has_norm = fields.get(bool, "use_qk_norm", default=False)
    return {
        **attention(fields, share=1.0),
        "qk_norm": "head" if has_norm else None,
        **_with_state(_lightning(fields), layers),
        **rest,
    }


def _bailing_moe_v2_5(fields: ConfigReader) -> dict[str, Any]:
    """Ling and Ring 2.5 and 2.6: as Ring-linear, with latent attention."""
    rest, layers = _bailing_rest(fields, fields.get(int, "layer_group_size"))
    return {
        **latent_attention(fields),
        "rope_interleave": True,
        **_with_state(_lightning(fields), layers),
        **rest,
    }


def _bailing_hybrid(fields: ConfigReader) -> dict[str, Any]:
    """Ling 3: Kimi Delta Attention of full rank, and latent attention with a gate of each head."""
    rest, layers = _bailing_rest(fields, fields.get(int, "layer_group_size"))
    types = layer_types(fields, "layer_types", (_STATE, _FULL))
    if types is not None:
        layers = _state_layers(fields, [])
    heads, head_dim = fields.get(int, "num_attention_heads"), fields.get(int, "head_dim")
    state = StateMixer(
        "kimi_delta",
        num_heads=heads,
        num_key_heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        conv_kernel=fields.get(int, "short_conv_kernel_size"),
        full_rank=True,
    )
    return {
        **latent_attention(fields),
        "attention_gate": "head",
        "rope_interleave": True,
        **_with_state(state, layers),
        **rest,
    }


def _llama4(fields: ConfigReader) -> dict[str, Any]:
    """Chunks of positions in rotated layers, all positions without rotation in the others.

    A chunk is counted as a window of its size: at most twice what a token sees in it.
    """
    num_layers = fields.get(int, "num_hidden_layers")
    layers = range(num_layers)
    step, every = (
        fields.get(int, key) for key in ("interleave_moe_layer_step", "no_rope_layer_interval")
    )
    sparse = fields.integers("moe_layers") or layers[step - 1 :: step]
    rotates = fields.integers("no_rope_layers") or [int((at + 1) % every != 0) for at in layers]
    if len(rotates) != num_layers:
        raise fields.error(f"no_rope_layers has {len(rotates)} entries for {num_layers} layers")
    chunk = fields.optional(int, "attention_chunk_size")
    types = layer_types(fields, "layer_types", ("chunked_attention", _FULL))
    types = ["chunked_attention" if each else _FULL for each in rotates] if types is None else types
    inner = fields.get(int, "intermediate_size")
    dense = tuple(layer for layer in layers if layer not in sparse)
    rotary = biased_attention(fields)
    scaling = rotary.get("rope_scaling")
    if scaling is not None and scaling.low_freq_factor == scaling.high_freq_factor:
        rotary["rope_scaling"] = None  # published so; no blend is defined, and none costs anything
    return {
        **rotary,
        "unrotated_layers": tuple(at for at, each in enumerate(rotates) if not each),
        "sliding_window": tuple(chunk if each == "chunked_attention" else None for each in types),
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner,
        "dense_layers": dense,
        "intermediate_size": fields.get(int, "intermediate_size_mlp") if dense else 0,
        "routing": Routing(scoring_func="sigmoid", norm_topk_prob=False),
    }


MIXER_READERS: dict[str, Reader] = {
    "qwen3_next": _qwen3_next,
    "qwen3_5_moe": _qwen3_5_moe,
    "deepseek_v32": _indexed,
    "glm_moe_dsa": _glm_moe_dsa,
    "kimi_linear": _kimi_linear,
    "granitemoehybrid": _granitemoehybrid,
    "nemotron_h": _nemotron_h,
    "jamba": _jamba,
    "bailing_hybrid": _bailing_hybrid,
    "bailing_moe_v2_5": _bailing_moe_v2_5,
    "bailing_moe_linear": _bailing_moe_linear,
    "llama4": _llama4,
}
