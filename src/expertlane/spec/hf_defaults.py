"""The families of models, and their defaults: those of transformers 5's config classes.

transformers 4.57 differs in two: DeepSeek-V2's vocab_size was 32000, and a null rope_scaling of
GPT-OSS meant plain rotary positions. The newer version is what users compare with.
"""

from dataclasses import dataclass
from typing import Any

_GPT_OSS_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_COMMON: dict[str, Any] = {
    "eos_token_id": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_DEEPSEEK: dict[str, Any] = _COMMON | {
    "attention_bias": False,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@dataclass(frozen=True)
class Family:
    """What a `config.json` says of a family, and what it means where it leaves fields out.

    Attributes:
        num_experts: names of the field for the number of experts; where a config has several, the
            first counts.
        defaults: of all fields that are read.
    """

    architecture: str
    num_experts: tuple[str, ...]
    defaults: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM",
        ("num_experts", "num_local_experts"),
        _COMMON
        | {
            "eos_token_id": 2,
            "head_dim": None,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131_072,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "vocab_size": 32_000,
        },
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        ("num_experts",),
        _COMMON
        | {
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "layer_types": None,
            "max_position_embeddings": 32_768,
            "max_window_layers": 28,
            "mlp_only_layers": None,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "vocab_size": 151_936,
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        ("num_local_experts", "num_experts"),
        _COMMON
        | {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 32_768,
            "mlp_only_layers": None,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "vocab_size": 151_936,
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        ("num_local_experts", "num_experts"),
        _COMMON
        | {
            "attention_bias": False,
            "clip_qkv": None,
            "eos_token_id": 50_279,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": None,
            "rms_norm_eps": 1e-5,
            "vocab_size": 50_304,
        },
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        ("num_experts", "n_routed_experts"),
        _DEEPSEEK
        | {
            "eos_token_id": 2,
            "first_k_dense_replace": 0,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "moe_intermediate_size": 1407,
            "n_group": None,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 32,
            "num_experts_per_tok": None,
            "num_hidden_layers": 32,
            "routed_scaling_factor": 1.0,
            "topk_group": None,
            "topk_method": "greedy",
            "vocab_size": 102_400,
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        ("num_local_experts", "n_routed_experts"),
        _DEEPSEEK
        | {
            "eos_token_id": 1,
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18_432,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_mtp_layers": 1,
            "rope_interleave": True,
            "routed_scaling_factor": 2.5,
            "topk_group": 4,
            "vocab_size": 129_280,
        },
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        ("num_experts", "num_local_experts"),
        _COMMON
        | {
            "attention_bias": True,
            "head_dim": 64,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "layer_types": None,
            "max_position_embeddings": 131_072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _GPT_OSS_ROPE,
            "rope_theta": 150_000.0,
            "sliding_window": 128,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "vocab_size": 201_088,
        },
    ),
}
