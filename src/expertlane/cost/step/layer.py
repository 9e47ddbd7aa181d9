"""One layer's steps, and those before the first and after the last.

`ExpertSteps` is the one description of dispatch, experts and combine in every form, over counts
that are real, sampled or expected.
"""

import math
from typing import assert_never

import numpy as np

from expertlane.cost.step.attention import (
    join_streams,
    mixer_steps,
    spread_over_streams,
)
from expertlane.cost.step.batch_sizes import TokenSizes
from expertlane.cost.step.counts import DispatchCounts
from expertlane.cost.step.operation import Amounts, Ints, OpKind, PayloadBytes, weight_bytes
from expertlane.cost.step.step_list import StepWriter
from expertlane.spec.deployment import PayloadType, form_on
from expertlane.spec.model import LayerKind, ModelConfig
from expertlane.spec.names import Stage


def mlp_steps(
    out: StepWriter,
    model: ModelConfig,
    inner: int,
    part: TokenSizes,
    *,
    is_scaled: bool = False,
    is_summed: bool = True,
) -> None:
    """An MLP cut over tp in its inner width: gather tokens, sum outputs, add to the residual.

    Args:
        inner: the whole inner width.
        is_scaled: the sum is multiplied by a gate of its own.
        is_summed: summed over ranks here; else by what comes after.
    """
    item, hidden = out.types.activation_bytes, model.hidden_size
    own = tp_shares(inner, out)
    out.gather_tokens(part.owned, hidden * item)
    num_inner = 2 if model.gated_mlp else 1
    num_products = 1 if out.kernels.merges_products else num_inner
    for _ in range(num_products):
        out.gemm(Stage.EXPERTS, part.tokens, own * (num_inner // num_products), hidden)
    moved = part.tokens * own * ((num_inner + 1) * item)
    out.memory(Stage.EXPERTS, moved, out.kernels.activation)
    out.gemm(Stage.EXPERTS, part.tokens, hidden, own)
    num_passes = 3 if is_scaled else 0
    num_kernels = out.kernels.gate if is_scaled else 0
    if is_summed:
        out.sum_tokens(Stage.COLLECTIVES, "tp", part.owned, hidden * item)
        num_passes, num_kernels = num_passes + 3, num_kernels + 1
    if num_passes:
        out.by_token(Stage.EXPERTS, part, hidden * item, num_passes, num_kernels)


def tp_shares(total: int, out: StepWriter) -> Ints:
    """[A]; each rank's part of what is cut near-equally over tp."""
    return shares(total, out.mesh.layout.tp, out.tp_rank)


def shares(total: int, num_parts: int, part: Ints) -> Ints:
    """[R]; the sizes of some parts of a near-equal cut."""
    size, num_longer = divmod(total, num_parts)
    sizes: Ints = size + (part < num_longer).astype(np.int64)
    return sizes


_ID_BYTES, _WEIGHT_BYTES, _COUNT_BYTES = 4, 4, 8
_BOOKKEEPING_BYTES = 40  # read and written for a token-expert pair to be put in its place
_SHARED_BYTES = 24  # a pair is counted, given a copy, and counted by peer


def num_terms(model: ModelConfig) -> int:
    """Rows that are summed up for a token: of each expert, and its own for those without work."""
    top_k = model.num_experts_per_tok
    if not model.num_zero_experts:
        return top_k
    return min(round(top_k * model.num_experts / model.num_routed_experts) + 1, top_k)


class ExpertSteps:
    """Writes dispatch, experts and combine of a layer; all arrays [A]."""

    def __init__(
        self,
        out: StepWriter,
        model: ModelConfig,
        part: TokenSizes,
        counts: DispatchCounts,
        payload: PayloadBytes,
    ) -> None:
        self._out = out
        self._kernels = out.kernels
        self._model = model
        self._top_k = model.num_experts_per_tok
        self._num_terms = num_terms(model)
        self._part = part
        self._owned = part.owned
        self._counts = counts
        self._layout = out.mesh.layout
        self._form = form_on(self._layout, out.form)
        self._payload = payload
        self._row_bytes = model.expert_hidden_size * out.types.activation_bytes

    def write(self) -> None:
        """Write all steps, the sum on the tokens' own rank last."""
        match self._form:
            case None:
                self._local()
            case "all_gather" if self._out.keeps_all:
                self._in_place()
            case "all_gather":
                self._all_gather()
            case "all_to_all":
                self._all_to_all()
            case "hierarchical":
                self._hierarchical()
            case "static":
                self._static()
            case _:
                assert_never(self._form)

    def experts(self) -> None:
        """The experts' products alone, without moving rows."""
        model, out, kernels, counts = self._model, self._out, self._kernels, self._counts
        matrices = 3 if model.gated_mlp else 2
        inner = shares(model.moe_intermediate_size, self._layout.etp, out.etp_rank)
        hidden = model.expert_hidden_size
        num_weights = inner * (hidden * matrices)
        if out.types.weights == "float8":
            num_inputs = counts.rows_computed * hidden + counts.pairs_computed * inner
            out.round_inputs(Stage.EXPERTS, num_inputs, 2)
        of_expert = kernels.expert + matrices * kernels.expert_product
        out.operation(
            OpKind.EXPERTS,
            Stage.EXPERTS,
            {
                "pairs": counts.pairs_computed,
                "active": counts.active_experts,
                "hidden": hidden,
                "inner": inner,
                "matrices": matrices,
            },
            weight_bytes=counts.active_experts * weight_bytes(num_weights, out.types.weights),
            num_kernels=kernels.experts_once + math.ceil(counts.active_experts.max()) * of_expert,
        )

    def _local(self) -> None:
        owned = self._owned
        self._bookkeeping(owned, self._kernels.by_expert)
        self.experts()
        self._sum(owned * self._num_terms, owned, self._num_terms, is_last=True)

    def _in_place(self) -> None:
        """Each rank has all tokens: its experts take theirs, and partial sums are added up."""
        self.experts()
        self._out.sum_tokens(Stage.COMBINE, "stage", self._owned, self._row_bytes)
        self._out.by_token(Stage.COMBINE, self._part, self._row_bytes, 3)

    def _all_gather(self) -> None:
        out, owned, everywhere = self._out, self._owned, self._counts.stage_tokens
        metadata = self._top_k * (_ID_BYTES + _WEIGHT_BYTES) + self._payload.scales
        self._bookkeeping(owned, self._kernels.choose)
        self._pack(owned, metadata)
        out.all_gather(Stage.DISPATCH, "stage", owned, self._payload.values, metadata)
        self._arrive(everywhere)
        self.experts()
        self._sum(self._counts.pairs_computed, everywhere, self._top_k, is_last=False)
        out.reduce_scatter(Stage.COMBINE, "stage", owned, self._row_bytes)
        out.memory(Stage.COMBINE, 3 * owned * self._row_bytes)

    def _all_to_all(self) -> None:
        out, counts, owned, kernels = self._out, self._counts, self._owned, self._kernels
        values = self._payload.values
        metadata = self._top_k * _ID_BYTES + self._payload.scales
        self._bookkeeping(owned, kernels.choose + kernels.by_peer + kernels.by_expert)
        if kernels.counts_first:
            self._exchange_counts(2 * self._layout.ep)
        self._pack(counts.rows_sent, metadata)
        out.all_to_all(Stage.DISPATCH, "ep", counts.rows, values, metadata)
        out.all_gather(Stage.DISPATCH, "etp", counts.rows_arriving, values, metadata)
        self._arrive(counts.rows_computed)
        self.experts()
        out.reduce_scatter(Stage.COMBINE, "etp", counts.pairs_arriving, self._row_bytes)
        out.all_to_all(Stage.COMBINE, "ep", counts.pairs.T, self._row_bytes)
        self._sum(owned * self._num_terms, owned, self._num_terms, is_last=True)

    def _hierarchical(self) -> None:
        out, counts, owned, kernels = self._out, self._counts, self._owned, self._kernels
        of_nodes, size, num_nodes = counts.by_node, out.mesh.ep_per_node, out.mesh.num_ep_nodes
        assert of_nodes is not None, "counted for this form"
        values = self._payload.values
        metadata = self._top_k * (_ID_BYTES + _WEIGHT_BYTES) + self._payload.scales
        self._bookkeeping(owned, kernels.choose + 2 * kernels.by_peer)
        if kernels.counts_first:
            self._exchange_counts(self._layout.ep + num_nodes)
        self._pack(of_nodes.rows_sent, metadata)
        # Kernels that forward have buffers of the right size.
        tells = not kernels.counts_first
        out.all_to_all(
            Stage.DISPATCH, "ep_inter", of_nodes.rows, values, metadata, tells_counts=tells
        )
        if size > 1:
            self._bookkeeping(of_nodes.rows_arriving, kernels.by_peer)
            moved = 2 * of_nodes.rows_forwarded * (values + metadata)
            self._move(moved, kernels.pack)
            out.all_to_all(Stage.DISPATCH, "ep_intra", of_nodes.forwarded, values, metadata)
        out.all_gather(Stage.DISPATCH, "etp", counts.rows_arriving, values, metadata)
        self._arrive(counts.rows_computed)
        self.experts()
        self._sum(counts.pairs_computed, counts.rows_computed, self._top_k, is_last=False)
        out.reduce_scatter(Stage.COMBINE, "etp", counts.rows_arriving, self._row_bytes)
        if size > 1:
            out.all_to_all(Stage.COMBINE, "ep_intra", of_nodes.forwarded.T, self._row_bytes)
            self._sum(of_nodes.rows_forwarded, of_nodes.rows_arriving, size, is_last=False)
        out.all_to_all(Stage.COMBINE, "ep_inter", of_nodes.rows.T, self._row_bytes)
        self._sum(of_nodes.rows_sent, owned, num_nodes, is_last=True)

    def _static(self) -> None:
        out, counts, owned, kernels = self._out, self._counts, self._owned, self._kernels
        ep, values = self._layout.ep, self._payload.values
        metadata = self._top_k * (_ID_BYTES + _WEIGHT_BYTES) + self._payload.scales
        to_each, arriving = out.to_all("ep", owned), counts.capacity_arriving
        self._bookkeeping(owned, kernels.choose + kernels.by_peer)
        self._pack(owned * ep, metadata)
        out.all_to_all(Stage.DISPATCH, "ep", counts.rows, values, metadata, capacity=to_each)
        out.all_gather(
            Stage.DISPATCH, "etp", counts.rows_arriving, values, metadata, capacity=arriving
        )
        self._arrive(counts.stage_tokens)
        self.experts()
        self._sum(counts.pairs_computed, counts.stage_tokens, self._top_k, is_last=False)
        out.reduce_scatter(
            Stage.COMBINE, "etp", counts.rows_arriving, self._row_bytes, capacity=arriving
        )
        out.all_to_all(Stage.COMBINE, "ep", counts.rows.T, self._row_bytes, capacity=to_each.T)
        self._sum(counts.rows_sent, owned, ep, is_last=True)

    def _exchange_counts(self, num: int) -> None:
        """Write an all-gather of `num` counts a rank, with the packing that follows beside it."""
        ones = np.ones_like(self._owned)
        self._out.all_gather(
            Stage.DISPATCH, "stage", ones, 0, num * _COUNT_BYTES, num_steps_before_wait=1
        )

    def _bookkeeping(self, tokens: Amounts, num_kernels: int) -> None:
        """Write bookkeeping of tokens' pairs: choice of copies, sorting."""
        self._move(tokens * (self._top_k * _BOOKKEEPING_BYTES), num_kernels)

    def _pack(self, rows: Amounts, metadata: int) -> None:
        """Write the packing of rows to send; narrowed ones are encoded first."""
        payload, num_kernels = self._payload, self._kernels.pack
        num_bytes = 2 * rows * (payload.values + metadata)
        if payload.is_narrowed:
            encoded = self._row_bytes + payload.values + payload.scales
            num_bytes = num_bytes + self._owned * encoded
            num_kernels += self._kernels.narrow
        self._move(num_bytes, num_kernels)

    def _arrive(self, rows: Amounts) -> None:
        """Write the sorting of received rows by expert, and the decoding of narrowed ones."""
        num_bytes, num_kernels = rows * (self._top_k * _BOOKKEEPING_BYTES), self._kernels.by_expert
        if self._payload.is_narrowed:
            num_bytes = num_bytes + rows * (self._payload.values + self._row_bytes)
            num_kernels += self._kernels.widen
        self._move(num_bytes, num_kernels)

    def _move(self, num_bytes: Amounts, num_kernels: int) -> None:
        """Write moving rows, unless the library's own kernels do it as they send."""
        if not self._kernels.kernels_move:
            self._out.memory(Stage.DISPATCH, num_bytes, num_kernels)

    def _sum(self, terms: Amounts, sums: Amounts, most: int, *, is_last: bool) -> None:
        """Write the sums of rows; with the residual where it is the last of the block.

        Args:
            most: largest number of terms of a sum.
        """
        kernels = self._kernels
        if kernels.kernels_move:
            if is_last:
                self._out.memory(Stage.COMBINE, 3 * sums * self._row_bytes)
            return
        num_rows, num_kernels = terms + sums, kernels.sum_term * most + kernels.sum_once
        if is_last:
            num_rows, num_kernels = num_rows + 3 * sums, num_kernels + 1
        self._out.memory(Stage.COMBINE, num_rows * self._row_bytes, num_kernels)


_ROUTER_TYPE = "float32"
_LOGIT_BYTES, _CANDIDATE_BYTES = 4, 16  # a float32; value and id of the likeliest token


def layer_steps(
    out: StepWriter,
    model: ModelConfig,
    kind: LayerKind,
    part: TokenSizes,
    counts: DispatchCounts | None,
    payload: PayloadType,
) -> None:
    """A decoder layer, from hidden states to hidden states of the tokens each rank has.

    Args:
        counts: counts of its dispatch; None for a layer without experts.
    """
    mixing, mlp = kind.mixing, kind.mlp
    if mixing is not None:
        mixer_steps(out, model, mixing, part)
    if mlp == "none":
        residual_steps(out, model, part)
        return
    if counts is None:
        dense_steps(out, model, part)
        return
    router_steps(out, model, part)
    if out.keeps_all:  # one sum over ranks for both
        shared_expert_steps(out, model, part)
    expert_steps(out, model, part, counts, payload)
    if not out.keeps_all:
        shared_expert_steps(out, model, part)
    spread_over_streams(out, model, Stage.EXPERTS, part)


def residual_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """The mixer's output added to its input, where no MLP follows."""
    spread_over_streams(out, model, Stage.ATTENTION, part)
    hidden_bytes = model.hidden_size * out.types.activation_bytes
    out.by_token(Stage.ATTENTION, part, hidden_bytes, 3, out.kernels.residual)


def dense_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """Norm and MLP of a dense layer."""
    _norm_steps(out, model, part)
    mlp_steps(out, model, model.intermediate_size, part)
    spread_over_streams(out, model, Stage.EXPERTS, part)


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
    latent, tokens = model.moe_latent_size, out.held(part)
    if latent is not None:
        out.gemm(Stage.EXPERTS, tokens, latent, model.hidden_size)
    width = PayloadBytes.of(payload, out.types.activation_bytes, model.expert_hidden_size)
    ExpertSteps(out, model, part, counts, width).write()
    if latent is not None:
        out.gemm(Stage.EXPERTS, tokens, model.hidden_size, latent)


def _norm_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """The residual of attention, and the norm before an MLP or router."""
    if model.num_streams > 1:
        spread_over_streams(out, model, Stage.ROUTER, part)
        join_streams(out, model, Stage.ROUTER, "moe", out.held(part))
        return
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
        model.num_routed_experts,
        model.hidden_size,
        dtype=_ROUTER_TYPE,
        num_kernels=1 + widened,
    )
    num_kernels, num_passes = out.kernels.route, 1
    if routing.scoring_func != "softmax" or not routing.norm_topk_prob or routing.correction_bias:
        num_kernels, num_passes = out.kernels.scored_route, 4
    if routing.n_group > 1:
        num_kernels, num_passes = out.kernels.grouped_route, 7
    num_bytes = routed * (num_passes * model.num_routed_experts * _LOGIT_BYTES)
    out.memory(Stage.ROUTER, num_bytes, num_kernels)


def embedding_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """Embedding of each rank's tokens, once in each residual stream."""
    num_passes = 1 + model.num_streams
    moved = num_passes * out.held(part) * (model.hidden_size * out.types.activation_bytes)
    out.memory(Stage.EMBED, moved, out.kernels.embed)


def projection_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """Before a layer that drafts: norms of hidden states and embeddings, and what joins both."""
    moved = 6 * out.held(part) * (model.hidden_size * out.types.activation_bytes)
    out.memory(Stage.EMBED, moved, out.kernels.embed + 2 * out.norm_kernels)
    out.gemm(Stage.EMBED, out.held(part), model.hidden_size, 2 * model.hidden_size)


def arrival_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """All-gather of received hidden states over tp, where every rank keeps all tokens."""
    if out.keeps_all:
        carried_bytes = model.carried_size * out.types.activation_bytes
        out.all_gather(Stage.COLLECTIVES, "tp", part.owned, carried_bytes)


def head_steps(out: StepWriter, model: ModelConfig, part: TokenSizes) -> None:
    """Final norm, output head and choice of the next tokens."""
    types = out.types
    hidden_bytes = model.hidden_size * types.activation_bytes
    num_seqs = part.num_yielding
    kernels = out.norm_kernels + out.kernels.last
    normed = num_seqs if out.keeps_all else part.owned_yielding
    join_streams(out, model, Stage.HEAD, "head", normed)
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
    logits_bytes = num_seqs * vocab * (_LOGIT_BYTES + types.activation_bytes)
    out.memory(Stage.HEAD, logits_bytes + num_seqs * vocab * _LOGIT_BYTES, out.kernels.argmax)
    out.all_gather(Stage.COLLECTIVES, "tp", num_seqs, 0, _CANDIDATE_BYTES)
    if out.mesh.layout.tp > 1:
        out.memory(Stage.HEAD, num_seqs * _CANDIDATE_BYTES, out.kernels.best)
