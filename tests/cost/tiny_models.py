"""Tiny models that together have every feature of the engine that is counted."""

from expertlane.spec.mixers import LatentAttention
from expertlane.spec.model import PRESETS, ModelConfig, Routing

_PLAIN = PRESETS["paper-tiny"].with_overrides(
    name="plain",
    num_hidden_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=18,
    vocab_size=31,
)

MODELS: dict[str, ModelConfig] = {
    "plain": _PLAIN,
    # More tensor-parallel ranks than key/value heads, windows, sinks, biases everywhere.
    "windows": _PLAIN.with_overrides(
        name="windows",
        num_key_value_heads=2,
        sliding_window=(4, None, 9),
        attention_sinks=True,
        qkv_bias=True,
        output_bias=True,
        expert_bias=True,
        gated_mlp=True,
        swiglu_limit=1.5,
        routing=Routing(router_bias=True, router_skew=1.0),
    ),
    "head_norm": _PLAIN.with_overrides(
        name="head_norm",
        num_key_value_heads=1,
        qk_norm="head",
        gated_mlp=True,
        hidden_act="silu",
        dense_layers=(1,),
        intermediate_size=26,
    ),
    "full_norm": _PLAIN.with_overrides(
        name="full_norm",
        num_key_value_heads=2,
        qk_norm="full",
        shared_expert_intermediate_size=22,
        shared_expert_gate=True,
        gated_mlp=True,
        num_experts_per_tok=1,
    ),
    "latent": _PLAIN.with_overrides(
        name="latent",
        latent=LatentAttention(
            kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, q_lora_rank=10
        ),
        head_dim=10,
        gated_mlp=True,
        dense_layers=(0,),
        intermediate_size=26,
        shared_expert_intermediate_size=18,
        routing=Routing(scoring_func="sigmoid", correction_bias=True, n_group=4, topk_group=2),
    ),
    "latent_lite": _PLAIN.with_overrides(
        name="latent_lite",
        latent=LatentAttention(
            kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7
        ),
        head_dim=10,
    ),
}
