"""Names and layouts of logical tensors in the checkpoints of each family."""

import re
from collections.abc import Iterable
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
# The name that a family publishes, then the one that transformers 5 writes by default.
_OWN_IN_LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": {"router": ("block_sparse_moe.gate.weight", "mlp.gate.weight")},
    "qwen2_moe": {
        "shared_gate": ("mlp.shared_expert_gate.weight",),
        "shared.gate": ("mlp.shared_expert.gate_proj.weight",),
        "shared.up": ("mlp.shared_expert.up_proj.weight",),
        "shared.down": ("mlp.shared_expert.down_proj.weight",),
    },
    "gpt_oss": {"router": ("mlp.router.weight",), "router_bias": ("mlp.router.bias",)},
    "minimax_m2": {
        "router": ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        "correction_bias": (
            "block_sparse_moe.e_score_correction_bias",
            "mlp.e_score_correction_bias",
        ),
    },
    "ernie4_5_moe": {
        "correction_bias": (
            "mlp.moe_statics.e_score_correction_bias",
            "mlp.gate.moe_statics.e_score_correction_bias",
        )
    },
    "granitemoe": {
        "router": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight")
    },
}
_IN_ROW = {("ernie4_5_moe", "correction_bias")}
_IN_ANY_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.(\d{1,9})\.")
_OLD_BUFFER = "rotary_emb.inv_freq"
# Scales of one-byte caches, one for a tensor; ours has one for each key and value of a head.
_CACHE_SCALE = re.compile(r"\.self_attn\.(?:\w+\.)?[kv]_scale$")
_OF_EXPERT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_OF_MIXTRAL_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class TensorLocation:
    """The stored tensor that holds a logical tensor, and the part of it.

    Attributes:
        name: name of the stored tensor.
        expert: index in its first dimension, where it holds all experts; else None.
        half: gate (0) or up (1), where it holds both; else None.
        interleaved: the halves' rows alternate; else one follows the other.
        transposed: matrices are [in_features, out_features], unless they are quantised.
        in_row: the logical tensor, a vector, is the only row of a matrix.
    """

    name: str
    expert: int | None = None
    half: int | None = None
    interleaved: bool = False
    transposed: bool = False
    in_row: bool = False


def tensor_locations(family: str, name: str) -> tuple[TensorLocation, ...]:
    """Locations where the logical tensor `name` may be stored, the usual one first.

    Besides the layout that a family publishes, a checkpoint may have all experts of a layer in one
    tensor, as transformers 5 holds them.
    """
    model = "model.language_model" if family == "qwen3_vl_moe" else "model"
    if name in _OUTSIDE:
        return (TensorLocation(_OUTSIDE[name].replace("model", model, 1)),)
    _, layer, part = name.split(".", 2)
    prefix = f"{model}.layers.{layer}"
    if part.startswith("experts."):
        _, expert, matrix = part.split(".")
        return _expert_locations(family, prefix, int(expert), matrix)
    own = _OWN_IN_LAYER.get(family, {}).get(part) or (_IN_LAYER[part],)
    in_row = (family, part) in _IN_ROW
    return tuple(TensorLocation(f"{prefix}.{each}", in_row=in_row) for each in own)


def is_left_unread(stored_name: str, extra_layers: range, unread: Iterable[str] = ()) -> bool:
    """Whether a stored tensor is ignored without a warning.

    Transformers ignores it too, or it is the scale of a one-byte cache.

    Args:
        extra_layers: layers for multi-token prediction, after the last one.
        unread: prefixes of names that are no part of the language model.
    """
    if stored_name.startswith(tuple(unread)):
        return True
    layer = _IN_ANY_LAYER.match(stored_name)
    if _OLD_BUFFER in stored_name or _CACHE_SCALE.search(stored_name):
        return True
    return layer is not None and int(layer[1]) in extra_layers


def _expert_locations(
    family: str, prefix: str, expert: int, matrix: str
) -> tuple[TensorLocation, ...]:
    matrix, _, bias = matrix.partition("_")
    is_down, bias = matrix == "down", bias and f"_{bias}"
    block = "block_sparse_moe" if family == "granitemoe" else "mlp"
    half = {"gate": 0, "up": 1, "down": None}[matrix]

    def together(name: str) -> TensorLocation:
        return TensorLocation(f"{prefix}.{name}", expert, half)

    fused = together(f"{block}.experts.{'down_proj' if is_down else 'gate_up_proj'}{bias}")
    match family:
        case "gpt_oss":
            return (replace(fused, interleaved=half is not None, transposed=not bias),)
        case "granitemoe":
            return together(f"{block}.{'output' if is_down else 'input'}_linear.weight"), fused
        case "mixtral" | "minimax_m2":
            alone = f"block_sparse_moe.experts.{expert}.{_OF_MIXTRAL_EXPERT[matrix]}"
        case _:
            alone = f"mlp.experts.{expert}.{_OF_EXPERT[matrix]}"
    by_itself = TensorLocation(f"{prefix}.{alone}.weight")
    if family == "qwen3_vl_moe":
        return fused, replace(fused, transposed=True), by_itself  # published transposed
    return by_itself, fused
