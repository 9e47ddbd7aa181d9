"""The parameters that one rank holds: in which type, and how they are cut.

The same as what the engine's ranks take from a checkpoint (`model.weight_source`), counted without
it. What is cut over `tp`, or over `etp` for experts, is named below; all else is on every rank.
"""

from dataclasses import dataclass

from expertlane.cost.number_types import ITEM_BYTES, NumberTypes
from expertlane.spec.layout import Coordinates, Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.model_parts import LatentAttention
from expertlane.spec.partition import partition


@dataclass(frozen=True)
class Params:
    """Numbers of parameters, by the type they are held in.

    Attributes:
        matrices: in the type of weights; those that float8 checkpoints quantise.
        kept: in `NumberTypes.kept`: embedding, head, biases, and what latent attention absorbs.
        wide: in float32: norms and routers.
    """

    matrices: int = 0
    kept: int = 0
    wide: int = 0

    def __add__(self, other: "Params") -> "Params":
        return Params(
            self.matrices + other.matrices, self.kept + other.kept, self.wide + other.wide
        )

    def __mul__(self, times: int) -> "Params":
        return Params(times * self.matrices, times * self.kept, times * self.wide)

    def num_bytes(self, types: NumberTypes) -> int:
        """Scales of float8 are not counted."""
        return (
            self.matrices * types.weight_bytes
            + self.kept * ITEM_BYTES[types.kept]
            + self.wide * ITEM_BYTES["float32"]
        )


def embedding_params(model: ModelConfig) -> Params:
    """Of a rank of the first stage; it is not cut."""
    return Params(kept=model.vocab_size * model.hidden_size)


def head_params(model: ModelConfig, layout: Layout, at: Coordinates) -> Params:
    """Of a rank of the last stage: its rows, also where the head is the embedding; final norm."""
    rows = len(partition(model.vocab_size, layout.tp)[at.tp_rank])
    return Params(kept=rows * model.hidden_size, wide=model.hidden_size)


def layer_params(
    model: ModelConfig, layout: Layout, at: Coordinates, *, is_dense: bool, num_experts: int
) -> Params:
    """Of a layer.

    Args:
        num_experts: that the rank holds, or holds a slice of.
    """
    params = Params(wide=2 * model.hidden_size) + _attention(model, layout.tp, at.tp_rank)
    if is_dense:
        return params + _mlp(model, model.intermediate_size, layout, at)
    routing, hidden = model.routing, model.hidden_size
    num_biases = int(routing.router_bias) + int(routing.correction_bias)
    router = Params(wide=model.num_experts * (hidden + num_biases))
    shared = _mlp(model, model.shared_expert_intermediate_size, layout, at)
    gate = Params(kept=hidden if model.shared_expert_gate else 0)
    return params + router + shared + gate + _expert(model, layout, at) * num_experts


def _attention(model: ModelConfig, tp: int, tp_rank: int) -> Params:
    heads = model.num_attention_heads // tp
    if model.latent is None:
        params = _grouped_query(model, heads, max(1, model.num_kv_heads // tp))
    else:
        params = _latent(model, model.latent, heads)
    has_bias = model.output_bias and tp_rank == 0  # partial sums are added up
    return params + Params(kept=model.hidden_size if has_bias else 0)


def _grouped_query(model: ModelConfig, heads: int, kv_heads: int) -> Params:
    """Key/value heads fewer than `tp` are held by several ranks each."""
    hidden, dim = model.hidden_size, model.head_dim
    width = (heads + 2 * kv_heads) * dim
    kept = width if model.qkv_bias else 0
    if model.qk_norm == "head":
        kept += 2 * dim
    elif model.qk_norm == "full":
        kept += (heads + kv_heads) * dim
    matrices = hidden * width + hidden * heads * dim
    return Params(matrices, kept, wide=heads if model.attention_sinks else 0)


def _latent(model: ModelConfig, latent: LatentAttention, heads: int) -> Params:
    """Both projections down are whole on every rank."""
    hidden, rank = model.hidden_size, latent.kv_lora_rank
    matrices = hidden * (rank + latent.qk_rope_head_dim) + hidden * heads * latent.v_head_dim
    wide, query_in = rank, hidden
    if latent.q_lora_rank is not None:
        matrices += hidden * latent.q_lora_rank
        wide, query_in = wide + latent.q_lora_rank, latent.q_lora_rank
    matrices += query_in * heads * model.head_dim
    absorbed = rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    return Params(matrices, absorbed, wide)


def _mlp(model: ModelConfig, inner: int, layout: Layout, at: Coordinates) -> Params:
    """A dense MLP or the shared expert."""
    return Params(model.num_mlp_params(len(partition(inner, layout.tp)[at.tp_rank])))


def _expert(model: ModelConfig, layout: Layout, at: Coordinates) -> Params:
    inner = len(partition(model.moe_intermediate_size, layout.etp)[at.etp_rank])
    kept = 0
    if model.expert_bias:
        kept = (2 if model.gated_mlp else 1) * inner
        kept += model.hidden_size if at.etp_rank == 0 else 0  # partial sums are added up
    return Params(model.num_mlp_params(inner), kept)
