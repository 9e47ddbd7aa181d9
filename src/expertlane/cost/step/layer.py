"""One layer's steps, and those before the first and after the last."""

import numpy as np

from expertlane.cost.number_types import PayloadBytes
from expertlane.cost.step.attention import attention_steps
from expertlane.cost.step.batch_sizes import TokenSizes
from expertlane.cost.step.counts import DispatchCounts
from expertlane.cost.step.dispatch import ExpertSteps
from expertlane.cost.step.mlp import mlp_steps, tp_shares
from expertlane.cost.step.step_list import StepWriter
from expertlane.spec.deployment import PayloadType
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

_ROUTER_TYPE = "float32"
_LOGIT_BYTES, _CANDIDATE_BYTES = 4, 16  # a float32; value and id of the likeliest token


def layer_steps(
    out: StepWriter,
    model: ModelConfig,
    layer: int,
    part: TokenSizes,
    counts: DispatchCounts | None,
    payload: PayloadType,
) -> None:
    """A decoder layer, from hidden states to hidden states of the tokens each rank has.

    Args:
        layer: its number says its window.
        counts: counts of its dispatch; None for a dense layer.
    """
    attention_steps(out, model, model.window_of_layer(layer), part)
    if counts is None:
        dense_steps(out, model, part)
        return
    router_steps(out, model, part)
    if out.keeps_all:  # one sum over ranks for both
        shared_expert_steps(out, model, part)
    expert_steps(out, model, part, counts, payload)
    if not out.keeps_all:
        shared_expert_steps(out, model, part)


def dense_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """Norm and MLP of a dense layer."""
    _norm_steps(out, model, part)
    mlp_steps(out, model, model.intermediate_size, part)


def shared_expert_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """The expert that all tokens take, if there is one; summed with the others' where it can be."""
    inner, is_scaled = model.shared_expert_intermediate_size, model.shared_expert_gate
    if inner:
        mlp_steps(out, model, inner, part, is_scaled=is_scaled, is_summed=not out.keeps_all)


def expert_steps(
    out: StepWriter,
    model: ModelConfig,
    part: TokenSizes,
    counts: DispatchCounts,
    payload: PayloadType,
) -> None:
    """Dispatch, experts and combine."""
    width = PayloadBytes.of(payload, out.types.activation_bytes, model.hidden_size)
    ExpertSteps(out, model, part, counts, width).put_down()


def _norm_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """The residual of attention, and the norm before an MLP or router."""
    hidden_bytes = model.hidden_size * out.types.activation_bytes
    residual = out.kernels.residual
    num_passes = 2 + 3 * (residual > 0)
    out.by_token(Stage.ROUTER, part, hidden_bytes, num_passes, residual + out.norm_kernels)


def router_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """Norm, router and top-k of an MoE layer."""
    _norm_steps(out, model, part)
    routing, routed = model.routing, out.held(part)
    widened = 1 if out.types.activations != _ROUTER_TYPE else 0
    out.gemm(
        Stage.ROUTER,
        routed,
        model.num_experts,
        model.hidden_size,
        dtype=_ROUTER_TYPE,
        num_kernels=1 + widened,
    )
    num_kernels, num_passes = out.kernels.route, 1
    if routing.scoring_func != "softmax" or not routing.norm_topk_prob or routing.correction_bias:
        num_kernels, num_passes = out.kernels.scored_route, 4
    if routing.n_group > 1:
        num_kernels, num_passes = out.kernels.grouped_route, 7
    num_bytes = routed * (num_passes * model.num_experts * _LOGIT_BYTES)
    out.memory(Stage.ROUTER, num_bytes, num_kernels)


def embedding_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """Embedding of each rank's tokens."""
    moved = 2 * out.held(part) * (model.hidden_size * out.types.activation_bytes)
    out.memory(Stage.EMBED, moved, out.kernels.embed)


def arrival_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """All-gather of received hidden states over tp, where every rank keeps all tokens."""
    if out.keeps_all:
        hidden_bytes = model.hidden_size * out.types.activation_bytes
        out.all_gather(Stage.COLLECTIVES, "tp", part.owned, hidden_bytes)


def head_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """Final norm, output head and choice of the next tokens."""
    types = out.types
    hidden_bytes = model.hidden_size * types.activation_bytes
    num_seqs = part.num_yielding
    kernels = out.norm_kernels + out.kernels.last
    normed = num_seqs if out.keeps_all else part.owned_yielding
    out.memory(Stage.HEAD, 4 * normed * hidden_bytes, kernels)
    out.gather_tokens(part.owned_yielding, hidden_bytes)
    vocab = tp_shares(model.vocab_size, out)
    out.gemm(
        Stage.HEAD,
        num_seqs,
        vocab,
        model.hidden_size,
        dtype=None if types.narrow_head else types.kept,
    )
    needs_logits = part.asks_logits
    logits_bytes = num_seqs * vocab * (_LOGIT_BYTES + types.activation_bytes)
    out.memory(Stage.HEAD, logits_bytes + num_seqs * vocab * _LOGIT_BYTES, out.kernels.argmax)
    # Of all logits the vocabulary is the rows; of candidates the sequences are.
    out.all_gather(
        Stage.COLLECTIVES,
        "tp",
        np.where(needs_logits, vocab, num_seqs),
        np.where(needs_logits, num_seqs * _LOGIT_BYTES, 0),
        np.where(needs_logits, 0, _CANDIDATE_BYTES),
    )
    if out.mesh.layout.tp > 1:
        gathered = np.where(needs_logits, model.vocab_size * _LOGIT_BYTES, _CANDIDATE_BYTES)
        out.memory(Stage.HEAD, num_seqs * gathered, out.kernels.best)
