"""transformers' classes of published configurations on the meta device, in our names."""

import copy
import re
from math import prod
from typing import Any

import torch
import transformers

from expertlane.spec.hf_config import FAMILIES, family_of, language_model_of
from expertlane.spec.mixers import Shape
from expertlane.spec.model import ModelConfig
from expertlane.spec.tensors import expert_shapes, layer_shapes, outside_shapes

_IN_LAYER = re.compile(r"(?:model\.|backbone\.)(?:language_model\.)?layers\.(\d+)\.(.*)")
_OUTSIDE = {
    "embed_tokens.weight": "embedding",
    "embeddings.weight": "embedding",
    "norm.weight": "final_norm",
    "norm_f.weight": "final_norm",
    "final_layernorm.weight": "final_norm",
    "lm_head.weight": "head",
    "norm.bias": "final_norm_bias",
    "lm_head.bias": "head_bias",
    "hc_head.hc_fn": "head_streams",
    "hc_head.hc_base": "head_streams_bias",
    "hc_head.hc_scale": "head_streams_scale",
}
_MLP = {
    "gate.weight": "router",
    "gate.e_score_correction_bias": "correction_bias",
    "gate.tid2eid": "experts_of_token",
    "shared_experts.gate_proj.weight": "shared.gate",
    "shared_experts.up_proj.weight": "shared.up",
    "shared_experts.down_proj.weight": "shared.down",
    "shared_expert.gate_proj.weight": "shared.gate",
    "shared_expert.up_proj.weight": "shared.up",
    "shared_expert.down_proj.weight": "shared.down",
    "shared_expert_gate.weight": "shared_gate",
    "gate_proj.weight": "dense.gate",
    "up_proj.weight": "dense.up",
    "down_proj.weight": "dense.down",
    "experts.gate_up_proj": "experts.gate experts.up",
    "experts.up_proj": "experts.up",
    "experts.down_proj": "experts.down",
    "experts.gate_up_proj_bias": "experts.gate_bias experts.up_bias",
    "experts.down_proj_bias": "experts.down_bias",
    "fc1_latent_proj.weight": "latent_in",
    "fc2_latent_proj.weight": "latent_out",
    # of other families
    "router.weight": "router",
    "router.bias": "router_bias",
    "e_score_correction_bias": "correction_bias",
    "gate.moe_statics.e_score_correction_bias": "correction_bias",
    "gate.wg.weight": "router",
    "shared_mlp.gate_proj.weight": "shared.gate",
    "shared_mlp.up_proj.weight": "shared.up",
    "shared_mlp.down_proj.weight": "shared.down",
    "gate_up_proj.weight": "dense.gate dense.up",
    "shared_experts.gate_up_proj.weight": "shared.gate shared.up",
}
_SHARED_MLP = {
    "input_linear.weight": "shared.gate shared.up",
    "output_linear.weight": "shared.down",
}
_ATTENTION = {
    f"{theirs}_proj.{kind}": ours + ("" if kind == "weight" else "_bias")
    for theirs, ours in {"q": "query", "k": "key", "v": "value", "o": "output"}.items()
    for kind in ("weight", "bias")
} | {
    "q_norm.weight": "query_norm",
    "k_norm.weight": "key_norm",
    "query_layernorm.weight": "query_norm",
    "key_layernorm.weight": "key_norm",
    "g_proj.weight": "head_gate",
    "sinks": "sinks",
    "q_a_proj.weight": "query_a",
    "q_a_layernorm.weight": "query_a_norm",
    "q_b_proj.weight": "query_b",
    "kv_a_proj_with_mqa.weight": "kv_a",
    "kv_a_layernorm.weight": "kv_a_norm",
    "kv_b_proj.weight": "kv_b",
    "indexer.wq_b.weight": "index_query",
    "indexer.wk.weight": "index_key",
    "indexer.k_norm.weight": "index_norm",
    "indexer.k_norm.bias": "index_norm_bias",
    "indexer.weights_proj.weight": "index_weights",
    "indexer.q_proj.weight": "index_query",
    "indexer.k_proj.weight": "index_key",
    "indexer.q_norm.weight": "index_query_norm",
}
_COMPRESSED = {
    "q_a_norm.weight": "query_a_norm",
    "kv_proj.weight": "latent",
    "kv_norm.weight": "latent_norm",
    "o_a_proj.weight": "output_a",
    "o_b_proj.weight": "output_b",
    "compressor.indexer.q_b_proj.weight": "index_query",
    "compressor.indexer.scorer.weights_proj.weight": "index_weights",
} | {
    f"compressor.{where}{theirs}": f"{prefix}{ours}"
    for where, prefix in {"": "", "indexer.": "index_"}.items()
    for theirs, ours in {
        "kv_proj.weight": "entry",
        "gate_proj.weight": "entry_gate",
        "position_bias": "entry_bias",
        "kv_norm.weight": "entry_norm",
    }.items()
}
_STREAMS = {"fn": "", "base": "_bias", "scale": "_scale"}
_STATE = {  # Gated DeltaNet, Kimi Delta Attention
    "in_proj_qkvz.weight": "query key value gate",
    "in_proj_ba.weight": "beta decay",
    "in_proj_qkv.weight": "query key value",
    "in_proj_z.weight": "gate",
    "in_proj_b.weight": "beta",
    "in_proj_a.weight": "decay",
    "b_proj.weight": "beta",
    "g_a_proj.weight": "gate_a",
    "g_b_proj.weight": "gate_b",
    "g_proj.weight": "gate",
    "forget_gate.f_proj.weight": "decay",
    "forget_gate.f_a_proj.weight": "decay_a",
    "forget_gate.f_b_proj.weight": "decay_b",
    "forget_gate.dt_bias": "step_bias",
    "forget_gate.A_log": "decay_log",
    "conv1d.weight": "query_conv key_conv value_conv",
    "conv1d.bias": "query_conv_bias key_conv_bias value_conv_bias",
    "dt_bias": "step_bias",
    "A_log": "decay_log",
    "D": "skip",
    "norm.weight": "state_norm",
    "o_norm.weight": "state_norm",
    "out_proj.weight": "output",
    "q_proj.weight": "query",
    "k_proj.weight": "key",
    "v_proj.weight": "value",
    "o_proj.weight": "output",
    "in_proj.weight": "gate value key query decay",  # Mamba-2: z, x, B, C, dt
}


_MAMBA_1 = {
    "in_proj.weight": "value gate",
    "x_proj.weight": "select",
    "dt_proj.weight": "decay_b",
    "dt_proj.bias": "step_bias",
    "dt_layernorm.weight": "step_norm",
    "b_layernorm.weight": "key_norm",
    "c_layernorm.weight": "query_norm",
    "conv1d.weight": "value_conv",
    "conv1d.bias": "value_conv_bias",
}


def their_config(config: dict[str, Any]) -> transformers.PretrainedConfig:
    """The configuration of the language model's class of transformers."""
    family = family_of(config)
    text = copy.deepcopy(language_model_of(config))
    for key in ("model_type", "architectures", "auto_map", "quantization_config"):
        text.pop(key, None)
    if text.get("rope_scaling") is None:
        text.pop("rope_scaling", None)
    of_text = {"qwen3_5_moe", "qwen3_vl_moe", "llama4", "minimax_m3_vl"}
    name = f"{family}_text" if family in of_text else FAMILIES[family].like or family
    return transformers.AutoConfig.for_model(name, **text)


def reference(config: dict[str, Any]) -> torch.nn.Module:
    """The language model's class of transformers, on the meta device."""
    family, made = family_of(config), their_config(config)
    if family == "step3p5":  # likewise
        vision = {"width": 16, "layers": 1, "heads": 1}
        whole = transformers.Step3p7Config(text_config=copy.deepcopy(config), vision_config=vision)
        with torch.device("meta"):
            model = transformers.Step3p7ForConditionalGeneration(whole)
        del model.model.vision_model, model.model.multi_modal_projector
        return model
    if family == "qwen3_vl_moe":  # has no class of its own for the language model with its head
        whole = transformers.Qwen3VLMoeConfig(text_config=made.to_dict())
        with torch.device("meta"):
            model = transformers.Qwen3VLMoeForConditionalGeneration(whole)
        del model.model.visual
        return model
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(made)


def their_shapes(model: torch.nn.Module, *, is_tied: bool) -> dict[str, Shape]:
    """Shapes of all stored tensors; a tied head is none."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (is_tied and name == "lm_head.weight")
    }
    for name, shape in shapes.items():
        is_llama4 = model.config.model_type == "llama4_text"
        if model.config.model_type == "longcat_flash" and name.endswith("experts.gate_up_proj"):
            # Rows of experts that compute nothing, which no checkpoint has.
            shapes[name] = (model.config.n_routed_experts, *shape[1:])
        if is_llama4 and "feed_forward.experts." in name:  # [experts, inputs, outputs]
            shapes[name] = (shape[0], shape[2], shape[1])
    return shapes


_LONGCAT = re.compile(r"model\.layers\.(\d+)\.([a-z_]+)\.(?:(\d)\.)?(.*)")
_LONGCAT_MLP = {
    "router.classifier.weight": "router",
    "router.e_score_correction_bias": "correction_bias",
}


def _of_longcat(name: str) -> tuple[int, list[str]] | None:
    """A tensor of a LongCat-Flash layer, which is two of ours; None outside layers."""
    found = _LONGCAT.fullmatch(name)
    if found is None:
        return None
    block, rest = found[2], found[4]
    layer = 2 * int(found[1]) + int(found[3] or 0)
    if block == "mlps":  # beside experts in the first of both
        own = _MLP[rest].removeprefix("dense.")
        return layer, [f"dense.{own}" if layer % 2 else f"shared.{own}"]
    if block == "mlp":
        return layer, (_MLP | _LONGCAT_MLP)[rest].split()
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "moe_norm"}
    return layer, [norms[block]] if block in norms else [_ATTENTION[rest]]


def ours_of(name: str, model: ModelConfig) -> tuple[int | None, list[str]]:
    """The layer of one of their tensors, None outside layers, and our tensors that it joins."""
    if model.shortcut_experts and (of_longcat := _of_longcat(name)) is not None:
        return of_longcat
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        end = next(end for end in _OUTSIDE if name.endswith(end))
        return None, [_OUTSIDE[end]]
    layer, part = int(found[1]), found[2]
    mixing = model.mixing_of_layer(layer)
    block, _, rest = part.partition(".")
    if block == "norm":  # of a layer of a mixer or an MLP alone
        return layer, ["moe_norm" if mixing is None else "attention_norm"]
    end = "_bias" if rest == "bias" else ""
    if block == "input_layernorm":
        return layer, [f"attention_norm{end}"]
    if block in ("post_attention_layernorm", "pre_ff_layernorm"):
        return layer, [f"moe_norm{end}"]
    if block == "shared_mlp":
        joined = {
            "input_linear.weight": "shared.gate shared.up",
            "output_linear.weight": "shared.down",
        }
        return layer, joined[rest].split()
    if block in ("mlp", "block_sparse_moe", "feed_forward") or (
        block == "mixer" and mixing is None
    ):
        return layer, _MLP[rest].split()
    assert mixing is not None, name
    if block in ("attn_hc", "ffn_hc"):
        return layer, [f"{'attention' if block == 'attn_hc' else 'moe'}_streams{_STREAMS[rest]}"]
    assert block in ("self_attn", "linear_attn", "mamba", "mixer"), name
    if mixing.kind == "attention":
        is_own = model.window_heads is not None and mixing.window is not None
        names = _ATTENTION | (_COMPRESSED if model.compressed is not None else {})
        return layer, [f"{'window.' if is_own else ''}{names[rest]}"]
    assert model.state is not None, name
    names = _STATE | _MAMBA_1 if model.state.kind == "mamba1" else _STATE
    return layer, [f"state.{each}" for each in names[rest].split()]


def joined_shape(model: ModelConfig, layer: int | None, parts: list[str]) -> Shape:
    """The shape of our tensors put together in the first dimension, experts in one before it."""
    if layer is None:
        (part,) = parts
        return outside_shapes(model)[part]
    of_layer = layer_shapes(model, model.kind_of_layer(layer))
    of_layer |= {f"experts.{part}": shape for part, shape in expert_shapes(model).items()}
    shapes = [of_layer[part] for part in parts]
    assert len({shape[1:] for shape in shapes}) == 1, parts
    rows = sum(shape[0] for shape in shapes)
    experts = (model.num_experts,) if parts[0].startswith("experts.") else ()
    return (*experts, rows, *shapes[0][1:])


def without_ones(shape: Shape) -> Shape:
    """A shape without dimensions of 1, which convolutions and vectors have more or fewer of."""
    return tuple(size for size in shape if size != 1)


def num_values(shapes: dict[str, Shape]) -> int:
    """Values of all tensors."""
    return sum(map(prod, shapes.values()))
