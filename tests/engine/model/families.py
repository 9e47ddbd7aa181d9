"""Tiny checkpoints of every family, made and run by the family's own transformers class.

Every parameter is drawn at random, so that nothing that a model leaves out goes unnoticed: norm
weights are 1 + 0.1·N, biases and sinks are no zeros, and logits have a std near 1.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

transformers.utils.logging.disable_progress_bar()

VOCAB_SIZE = 97
# The layers' part in the hidden states, which the embedding would else outweigh.
_OUTPUT_GAIN = 3.0
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
}
# Name: (class, what its configuration says besides _COMMON). Together they have every feature.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "sliding_window": 12,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 3,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {**_YARN, "rope_theta": 1e6},
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_experts": 8,
            "norm_topk_prob": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {
            **_LATENT,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "rope_parameters": {**_YARN, "rope_theta": 1e4, "mscale": 0.707, "mscale_all_dim": 0.9},
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **_LATENT,
            "q_lora_rank": 20,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 2.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_LATENT,
            "q_lora_rank": 20,
            "first_k_dense_replace": 2,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**_YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "sliding_window": 8,
            "swiglu_limit": 1.5,
            "rope_parameters": {**_YARN, "rope_theta": 150_000.0, "truncate": False},
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "attention_bias": True,
            "use_qk_norm": True,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            **_LATENT,
            "q_lora_rank": 20,
            "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "dots1": (
        "Dots1",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "sliding_window": 10,
            "max_window_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 24,  # square matrices would not tell how they are stored
            "num_experts": 8,
            "mlp_only_layers": [1],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "attention_bias": True,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}
FAMILIES = tuple(_CONFIGS)
_CONDITIONAL = ("Qwen3VLMoe",)  # the language model beside an encoder of images
_TINY_EYES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


@dataclass(frozen=True, eq=False)
class Greedy:
    """What transformers gives for one prompt.

    Attributes:
        token_ids: [num_steps]; the likeliest token of each step, end-of-sequence or not.
        logits: [num_steps, vocab_size] float32.
    """

    token_ids: list[int]
    logits: Tensor


def make_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A transformers model in float32 with random parameters.

    Args:
        overrides: replace fields of the family's configuration.
    """
    kind, fields = _CONFIGS[family]
    fields = _COMMON | fields | overrides
    if kind in _CONDITIONAL:
        tied = fields.pop("tie_word_embeddings")
        fields = {"text_config": fields, "vision_config": _TINY_EYES, "tie_word_embeddings": tied}
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    kind += "ForConditionalGeneration" if kind in _CONDITIONAL else "ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    randomise(model, seed)
    return model


def randomise(model: Any, seed: int) -> None:
    """Draw all parameters, and the buffers that are saved, anew."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True)  # a tied head is the embedding's tensor again
    tied = model.config.tie_word_embeddings
    for name, tensor in saved.items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            drawn = 1 + 0.1 * drawn
        elif name.endswith("e_score_correction_bias"):
            drawn *= 0.2
        elif name.endswith("bias"):  # [num_experts, out] too
            drawn *= 0.3
        elif tensor.dim() > 1 and (tied or "embed_tokens" not in name):
            # GPT-OSS alone keeps experts as [num_experts, in, out].
            transposed = tensor.dim() == 3 and model.config.model_type == "gpt_oss"
            drawn /= math.sqrt(tensor.shape[-2 if transposed else -1])
            if name == "lm_head.weight":
                drawn *= getattr(model.config, "logits_scaling", 1.0)
            if "o_proj" in name or "down_proj" in name:
                drawn *= _OUTPUT_GAIN
        tensor.data.copy_(drawn)


def save_checkpoint(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a random checkpoint as transformers does; gives the folder."""
    make_model(family, seed, **overrides).save_pretrained(folder)
    return folder


@cache
def load_model(folder: Path) -> Any:
    """transformers' own reading of a checkpoint, in float32."""
    kind = transformers.AutoModelForCausalLM
    if "text_config" in json.loads((folder / "config.json").read_text()):
        kind = transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def run_greedy(folder: Path, prompt_token_ids: list[int], num_steps: int) -> Greedy:
    """What transformers generates for one prompt; every step runs on the whole sequence."""
    model, token_ids, logits = load_model(folder), list(prompt_token_ids), []
    with torch.no_grad():
        for _ in range(num_steps):
            last = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
            logits.append(last)
            token_ids.append(int(last.argmax()))
    return Greedy(token_ids[len(prompt_token_ids) :], torch.stack(logits))


class Checkpoints:
    """Checkpoints of all families under one folder, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, family: str) -> Path:
        """A family's checkpoint, as transformers writes it."""
        folder = self._root / family
        if not folder.exists():
            save_checkpoint(family, folder)
        return folder
