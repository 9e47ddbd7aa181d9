"""Parts of a model that have sizes of their own: rotary scaling, latent attention, routing."""

from dataclasses import dataclass
from typing import Literal

from expertlane.spec.ranges import Strict


@dataclass(frozen=True)
class RopeScaling(Strict):
    """How rotary frequencies are stretched beyond the length a model was trained at.

    `linear` divides all frequencies by `factor`. `llama3` (Llama 3.1) divides those whose
    wavelength exceeds original_max_position_embeddings / low_freq_factor, keeps those under
    original_max_position_embeddings / high_freq_factor, and blends between. `yarn` (Peng et al.
    2023) blends between the dimensions that turn `beta_fast` and `beta_slow` times over the
    original length.

    Attributes:
        truncate: yarn; whether the blend begins and ends at whole dimensions.
        attention_factor: yarn; cosines and sines are multiplied by it.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class LatentAttention(Strict):
    """Multi-head latent attention (DeepSeek-AI 2024): keys and values come from a short latent.

    A head's query and key are `qk_nope_head_dim` values without positions, then
    `qk_rope_head_dim` rotated ones; the rotated part of the key is common to all heads.

    Attributes:
        q_lora_rank: width of the queries' latent; None where queries have none.
        mscale: the softmax scale is head_dim^-0.5 · mscale².
        norm_eps: of the norms of the latents; they do not take the model's rms_norm_eps.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    mscale: float = 1.0
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Routing(Strict):
    """How a router's logits become choices and weights.

    Scores are `scoring_func` of the logits over all experts. The choice is the
    `num_experts_per_tok` largest of scores + correction bias, within the best `topk_group` of
    `n_group` equal groups of consecutive experts. Weights are the chosen experts' scores without
    the correction bias, divided by their sum if `norm_topk_prob`, times `routed_scaling_factor`.
    So softmax with `norm_topk_prob` is the same function as a softmax over the chosen logits.

    Attributes:
        router_bias: the logits have a bias.
        router_skew: how uneven seeded weights make the experts' popularity: their router's bias is
            -router_skew · ln(1 + place) by the experts' places in an order drawn for each layer, so
            that the load falls about as a power law. Checkpoints have biases of their own.
        correction_bias: a bias for the choice alone exists.
        group_score: what groups are compared by: their largest, or the sum of their two largest
            scores + correction bias.
    """

    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    router_skew: float = 0.0
    correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
