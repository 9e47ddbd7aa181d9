"""One model of each kind, small enough for Triton's interpreter; and who chooses a backend."""

from expertlane.engine.comm import collectives
from expertlane.engine.model import (
    attention,
    blocks,
    decode_graphs,
    head,
    sampler,
    transformer,
    weights,
)
from expertlane.engine.moe import dispatch
from expertlane.spec.mixers import LatentAttention
from expertlane.spec.model import PRESETS

TINY = PRESETS["paper-tiny"].with_overrides(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    gated_mlp=True,
    hidden_act="silu",
    vocab_size=64,
    max_position_embeddings=64,
)
MODELS = {
    "paper": PRESETS["paper-tiny"].with_overrides(num_hidden_layers=1, vocab_size=64),
    "normed heads, shared expert": TINY.with_overrides(
        qk_norm="head", shared_expert_intermediate_size=24, shared_expert_gate=True
    ),
    "norm of all heads": TINY.with_overrides(qk_norm="full"),
    "sinks, window, biases": TINY.with_overrides(
        attention_sinks=True,
        sliding_window=(6, None),
        qkv_bias=True,
        output_bias=True,
        expert_bias=True,
        swiglu_limit=1.0,
    ),
    "latent, dense layer": TINY.with_overrides(
        num_key_value_heads=None,
        latent=LatentAttention(
            kv_lora_rank=32, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=16
        ),
        rope_interleave=True,
        dense_layers=(0,),
        intermediate_size=48,
    ),
}
# Where a backend is chosen.
USERS = (
    attention,
    blocks,
    collectives,
    decode_graphs,
    dispatch,
    head,
    sampler,
    transformer,
    weights,
)
