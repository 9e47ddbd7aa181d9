"""Where a family's checkpoints keep each logical tensor."""

import re
from dataclasses import dataclass, replace

_OUTSIDE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "query_a": "self_attn.q_a_proj.weight",
    "query_a_norm": "self_attn.q_a_layernorm.weight",
    "query_b": "self_attn.q_b_proj.weight",
    "key": "self_attn.k_proj.weight",
    "key_bias": "self_attn.k_proj.bias",
    "key_norm": "self_attn.k_norm.weight",
    "value": "self_attn.v_proj.weight",
    "value_bias": "self_attn.v_proj.bias",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "sinks": "self_attn.sinks",
    "output": "self_attn.o_proj.weight",
    "output_bias": "self_attn.o_proj.bias",
    "moe_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "correction_bias": "mlp.gate.e_score_correction_bias",
    "shared.gate": "mlp.shared_experts.gate_proj.weight",
    "shared.up": "mlp.shared_experts.up_proj.weight",
    "shared.down": "mlp.shared_experts.down_proj.weight",
    "dense.gate": "mlp.gate_proj.weight",
    "dense.up": "mlp.up_proj.weight",
    "dense.down": "mlp.down_proj.weight",
}
_OWN_IN_LAYER: dict[str, dict[str, str]] = {
    "mixtral": {"router": "block_sparse_moe.gate.weight"},
    "qwen2_moe": {
        "shared_gate": "mlp.shared_expert_gate.weight",
        "shared.gate": "mlp.shared_expert.gate_proj.weight",
        "shared.up": "mlp.shared_expert.up_proj.weight",
        "shared.down": "mlp.shared_expert.down_proj.weight",
    },
    "gpt_oss": {"router": "mlp.router.weight", "router_bias": "mlp.router.bias"},
}
_IN_ANY_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_OLD_BUFFER = "rotary_emb.inv_freq"
# Of one-byte caches with a scale for a tensor; ours has one for each key and value of a head.
_CACHE_SCALE = re.compile(r"\.self_attn\.(?:\w+\.)?[kv]_scale$")
_OF_EXPERT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_OF_MIXTRAL_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class TensorLocation:
    """A logical tensor's place in a checkpoint.

    Attributes:
        name: of the tensor in the file.
        expert: its index in the first dimension, where all experts are one tensor.
        half: gate (0) or up (1), where both are one tensor.
        interleaved: the halves' rows alternate; else one follows the other.
        transposed: matrices are [in_features, out_features], if they are not quantised.
    """

    name: str
    expert: int | None = None
    half: int | None = None
    interleaved: bool = False
    transposed: bool = False


def tensor_locations(family: str, name: str) -> tuple[TensorLocation, ...]:
    """Where the logical tensor `name` may be, the usual one first.

    Besides what a family publishes, Mixtral-like ones may have been saved with all experts of a
    layer in one tensor, as transformers 5 holds them.
    """
    if name in _OUTSIDE:
        return (TensorLocation(_OUTSIDE[name]),)
    _, layer, part = name.split(".", 2)
    prefix = f"model.layers.{layer}"
    if part.startswith("experts."):
        _, expert, matrix = part.split(".")
        return _expert_locations(family, prefix, int(expert), matrix)
    own = _OWN_IN_LAYER.get(family, {})
    locations = [TensorLocation(f"{prefix}.{own.get(part) or _IN_LAYER[part]}")]
    if part in own and part in _IN_LAYER:
        locations.append(TensorLocation(f"{prefix}.{_IN_LAYER[part]}"))
    return tuple(locations)


def is_left_unread(stored_name: str, extra_layers: range) -> bool:
    """Whether a tensor is ignored without a warning: by transformers too, or a scale of a cache.

    Args:
        extra_layers: layers for multi-token prediction, after the last one.
    """
    layer = _IN_ANY_LAYER.match(stored_name)
    if _OLD_BUFFER in stored_name or _CACHE_SCALE.search(stored_name):
        return True
    return layer is not None and int(layer[1]) in extra_layers


def _expert_locations(
    family: str, prefix: str, expert: int, matrix: str
) -> tuple[TensorLocation, ...]:
    matrix, _, bias = matrix.partition("_")
    fused = "down_proj" if matrix == "down" else "gate_up_proj"
    fused = f"{prefix}.mlp.experts.{fused}{f'_{bias}' if bias else ''}"
    half = {"gate": 0, "up": 1, "down": None}[matrix]
    together = TensorLocation(fused, expert, half)
    if family == "gpt_oss":
        return (replace(together, interleaved=half is not None, transposed=not bias),)
    if family == "mixtral":
        alone = f"block_sparse_moe.experts.{expert}.{_OF_MIXTRAL_EXPERT[matrix]}"
    else:
        alone = f"mlp.experts.{expert}.{_OF_EXPERT[matrix]}"
    return TensorLocation(f"{prefix}.{alone}.weight"), together
