"""A decoder layer and its blocks as generators that yield where they wait for communication."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.comm.collectives import Steps
from expertlane.comm.mesh import ParallelMesh
from expertlane.model.attention import Attention, RotaryEmbedding
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.latent_attention import LatentAttention
from expertlane.model.weights import EXPERT, HeldWeights, WeightSource, taker_of
from expertlane.moe.dispatch import CopyChooser, RoutedTokens
from expertlane.moe.forms import make_dispatcher
from expertlane.moe.payload import Payload
from expertlane.ops.backend import backend_for
from expertlane.ops.kv_cache import KVCache
from expertlane.ops.layers import LayerParts
from expertlane.ops.mlp import MlpPart
from expertlane.ops.moe_step import LocalExperts
from expertlane.ops.narrow import NarrowWeight
from expertlane.ops.products import Activation, Expert, Linear
from expertlane.ops.router import RouterParams
from expertlane.spec.deployment import DispatchForm, PayloadType
from expertlane.spec.layout import partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import CheckPoint, Stage
from expertlane.spec.tensors import expert_name, layer_name


class DecoderLayer:
    """Pre-norm attention and MoE or dense block; tokens stay with their owners between layers."""

    def __init__(
        self,
        model: ModelConfig,
        index: int,
        placement: Placement | None,
        source: WeightSource,
        mesh: ParallelMesh,
        rotary: RotaryEmbedding,
    ) -> None:
        self.index = index
        self._mesh, self._recorder = mesh, mesh.recorder
        self._ops = backend_for(source.device)
        self._eps = model.rms_norm_eps
        # float32, as they are computed in
        take = taker_of(source, index)
        self._attention_norm, mlp_norm = (
            source.once(index, name, partial(take, name, dtype=torch.float32))
            for name in ("attention_norm", "moe_norm")
        )
        heads = Attention if model.latent is None else LatentAttention
        self.attention = heads(model, index, source, mesh, rotary)
        self._part = self.attention.part(None if mesh.tp.size > 1 else self._attention_norm)
        self.block: MoEBlock | DenseBlock
        if placement is None:
            self.block = DenseBlock(model, index, source, mesh, mlp_norm)
        else:
            self.block = MoEBlock(model, index, placement, source, mesh, mlp_norm)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Tensor]:
        """Run the layer on the tokens this rank owns.

        Args:
            x: [num_owned, hidden_size].

        Returns:
            [num_owned, hidden_size].
        """
        x = yield from self._attend(x, batch, cache)
        self._recorder.check_finite(x, CheckPoint.AFTER_ATTENTION, self.index)
        self._recorder.enter(Stage.ROUTER, self.index)
        x = yield from self.block.forward(x, batch)
        self._recorder.check_finite(x, CheckPoint.AFTER_MLP, self.index)
        return x

    @property
    def parts(self) -> LayerParts | None:
        """What it is computed in on this rank; None where not all of it is."""
        block = self.block.parts
        if self._part is None or block is None or self._mesh.tp.size > 1:
            return None
        return LayerParts(self._part, *block)

    def held(self) -> Iterator[tuple[str, list[Tensor]]]:
        """As `TransformerStage.held`."""
        name, tp_rank = f"layer {self.index}", self._mesh.at.tp_rank
        yield f"{name}, norm", [self._attention_norm]
        yield f"{name}, attention of tp rank {tp_rank}", self.attention.tensors()
        for part, tensors in self.block.held():
            yield f"{name}, {part}", tensors

    def _attend(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Tensor]:
        enter, tp = self._recorder.enter, self._mesh.tp
        enter(Stage.ATTENTION, self.index)
        if self._part is not None and tp.size == 1 and self._part.takes(x):
            return self.attention.compute(self._part, x, batch, cache, adds_input=True)
        hidden = self._ops.rms_norm(x, self._attention_norm, self._eps)
        if tp.size > 1:
            enter(Stage.COLLECTIVES, self.index)
            hidden = yield from tp.gathered(hidden, batch.tokens_of_tp_rank)
            enter(Stage.ATTENTION, self.index)
        if self._part is not None and tp.size > 1 and self._part.takes(hidden):
            hidden = self.attention.compute(self._part, hidden, batch, cache, adds_input=False)
        else:
            hidden = yield from self.attention.forward(hidden, batch, cache)
        if tp.size > 1:
            self._recorder.check_finite(hidden, CheckPoint.ATTENTION, self.index)
            enter(Stage.COLLECTIVES, self.index)
            hidden = yield from tp.reduced(hidden, batch.tokens_of_tp_rank)
        return x + hidden


def activation_of(model: ModelConfig) -> Activation:
    """The inner function of all the model's MLPs."""
    return Activation(model.hidden_act, model.swiglu_limit, model.swiglu_alpha)


class MLP:
    """An MLP that every token takes: a dense layer's, or an MoE layer's shared expert.

    It is cut over the tensor-parallel group, so its tokens are gathered and its partial sums
    scattered. Its projections are named `layers.N.PREFIX.…`.

    Attributes:
        tp_rank: whose part it is.

    Args:
        inner: its whole inner width.
        norm: [hidden_size] float32; None where tokens come normed.
        is_scaled: its output is multiplied by the sigmoid of a projection, `shared_gate`.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        source: WeightSource,
        mesh: ParallelMesh,
        prefix: str,
        inner: int,
        *,
        norm: Tensor | None = None,
        is_scaled: bool = False,
    ) -> None:
        ops = self._ops = backend_for(source.device)
        part = partition(inner, mesh.layout.tp)[mesh.at.tp_rank]

        def linear(matrix: str) -> Linear:
            name = layer_name(layer, f"{prefix}.{matrix}")
            return source.once(layer, (name, part), lambda: ops.linear(source.matrix(name, part)))

        self._gate = linear("gate") if model.gated_mlp else None
        self._up, self._down = linear("up"), linear("down")
        self._scale = taker_of(source, layer)("shared_gate") if is_scaled else None
        self._activation = activation_of(model)
        self._tp, self._recorder, self.tp_rank = mesh.tp, mesh.recorder, mesh.at.tp_rank
        self._layer, self._norm, self._eps = layer, norm, model.rms_norm_eps
        around = (norm, self._eps, self._scale) if mesh.tp.size == 1 else (None, self._eps, None)
        linears = Expert(gate=self._gate, up=self._up, down=self._down)
        self.part = ops.mlp_part(linears, self._activation, source.dtype, *around)

    def tensors(self) -> list[Tensor]:
        """All weights, for checksums."""
        linears = Expert(gate=self._gate, up=self._up, down=self._down)
        return [*linears.tensors(), *(t for t in (self._scale, self._norm) if t is not None)]

    def forward(self, x: Tensor, batch: ForwardBatch) -> Steps[Tensor]:
        """Apply to the tokens this rank owns, [num_owned, hidden_size]."""
        enter, layer, part = self._recorder.enter, self._layer, self.part
        if self._tp.size == 1 and part is not None and part.takes(x):
            enter(Stage.EXPERTS, layer)
            self._count(x)
            return part(x)
        if self._norm is not None:
            x = self._ops.rms_norm(x, self._norm, self._eps)
        rows = x
        if self._tp.size > 1:
            enter(Stage.COLLECTIVES, layer)
            rows = yield from self._tp.gathered(x, batch.tokens_of_tp_rank)
        enter(Stage.EXPERTS, layer)
        if self._tp.size > 1 and part is not None and part.takes(rows):
            out = part(rows)
        else:
            gate = None if self._gate is None else self._gate(rows)
            out = self._down(self._activation(gate, self._up(rows)))
        self._count(rows)
        if self._tp.size > 1:
            self._recorder.check_finite(out, CheckPoint.MLP, layer)
            enter(Stage.COLLECTIVES, layer)
            out = yield from self._tp.reduced(out, batch.tokens_of_tp_rank)
        if self._scale is not None:
            out = out * torch.sigmoid(F.linear(x, self._scale))
        return out

    def _count(self, rows: Tensor) -> None:
        num_weights = (2 if self._gate is None else 3) * self._up.num_weights
        num_bytes = (1 if self._gate is None else 2) * self._up.num_bytes + self._down.num_bytes
        self._recorder.count_compute(2 * len(rows) * num_weights, num_bytes if len(rows) else 0)


class DenseBlock:
    """A norm and an MLP, whose output is added to its input."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        source: WeightSource,
        mesh: ParallelMesh,
        norm: Tensor,
    ) -> None:
        self.mlp = MLP(model, layer, source, mesh, "dense", model.intermediate_size, norm=norm)

    @property
    def parts(self) -> tuple[None, MlpPart] | None:
        """What it is computed in; None where that is not all in few calls."""
        return None if self.mlp.part is None else (None, self.mlp.part)

    def held(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Its weights by their name in the layer."""
        yield f"MLP of tp rank {self.mlp.tp_rank}", self.mlp.tensors()

    def forward(self, x: Tensor, batch: ForwardBatch) -> Steps[Tensor]:
        """Apply to the tokens this rank owns, [num_owned, hidden_size]."""
        return x + (yield from self.mlp.forward(x, batch))


class MoEBlock:
    """Norm, router, dispatch, experts, combine, the shared expert if any; added to the input.

    Attributes:
        placement: which experts each rank holds now.
        experts: those of this rank.
        here: all of the block but the shared expert in few calls, if that is all on this rank.
        shared: the shared expert, if there is one.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        placement: Placement,
        source: WeightSource,
        mesh: ParallelMesh,
        norm: Tensor,
    ) -> None:
        self._layer = layer
        self._mesh, self._recorder = mesh, mesh.recorder
        routing = model.routing
        self._dtype, self._device = source.dtype, source.device
        self._ops = backend_for(source.device)
        self._forms: Sequence[DispatchForm] = ("all_to_all",)
        self._payload = Payload("model", self._recorder)
        self._place(placement)

        take = partial(taker_of(source, layer), dtype=torch.float32)
        self._router = source.once(
            layer,
            "router",
            lambda: self._ops.router(
                RouterParams(
                    norm=norm,
                    eps=model.rms_norm_eps,
                    weight=take("router"),
                    bias=take("router_bias") if routing.router_bias else None,
                    correction_bias=take("correction_bias") if routing.correction_bias else None,
                    top_k=model.num_experts_per_tok,
                    routing=routing,
                )
            ),
        )
        self.shared: MLP | None = None
        if inner := model.shared_expert_intermediate_size:
            scaled = model.shared_expert_gate
            self.shared = MLP(model, layer, source, mesh, "shared", inner, is_scaled=scaled)
        num_before = source.num_bytes
        held = [
            source.once(  # not held: it may move to another rank
                layer,
                self._key_of(expert),
                partial(self._build_expert, model, source, expert),
                holds=False,
            )
            for expert in self._local
        ]
        self._expert_bytes = (source.num_bytes - num_before) // max(1, len(held))
        if not source.is_ahead:  # it copies them side by side
            self._hold(held, activation_of(model))

    @property
    def parts(self) -> tuple[LocalExperts, MlpPart | None] | None:
        """What it is computed in; None where that is not all in few calls."""
        shared = None if self.shared is None else self.shared.part
        if self.here is None or (self.shared is not None and shared is None):
            return None
        return self.here, shared

    def held(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Its weights by their name in the layer."""
        params = self._router.params
        own = (params.norm, params.weight, params.bias, params.correction_bias)
        yield "router", [tensor for tensor in own if tensor is not None]
        of_etp = f", part {self._mesh.at.etp_rank}" if self._mesh.layout.etp > 1 else ""
        for expert, held in zip(self._local, self.experts.held, strict=True):
            yield f"expert {expert}{of_etp}", held.tensors()
        if self.shared is not None:
            yield f"shared expert of tp rank {self.shared.tp_rank}", self.shared.tensors()

    def set_forms(self, forms: Sequence[DispatchForm], payload: PayloadType) -> None:
        """Make ready for batches that use these dispatch forms, and no others."""
        self._forms, self._payload = forms, Payload(payload, self._recorder)
        self._place(self.placement)

    def _place(self, placement: Placement) -> None:
        self.placement = placement
        self._local = placement.experts_of_rank[self._mesh.at.ep_rank]
        choice = CopyChooser(self._mesh, placement, self._device)
        self._dispatchers = {
            form: make_dispatcher(form, self._mesh, placement, choice, self._payload)
            for form in self._forms
        }

    def apply_placement(self, placement: Placement, arrived: Mapping[int, Expert]) -> None:
        """Take another placement into use.

        Args:
            arrived: by logical expert, those that this rank did not hold so far.
        """
        own = {**arrived, **dict(zip(self._local, self.experts.held, strict=True))}
        held = [own[expert] for expert in placement.experts_of_rank[self._mesh.at.ep_rank]]
        self._place(placement)
        self._hold(held, self.experts.activation)

    def _hold(self, held: Sequence[Expert], activation: Activation) -> None:
        self.experts = self._ops.experts(held, activation)
        self.here: LocalExperts | None = None
        checks = self._recorder.checks
        if self._mesh.stage.size == 1 and not (checks and checks.is_full):
            self.here = self._ops.local_experts(self._router, self.experts, self._dtype)

    def _key_of(self, expert: int) -> Hashable:
        """Which part of which expert this rank would hold."""
        return EXPERT, expert, self._mesh.layout.etp, self._mesh.at.etp_rank

    def put_experts(self, held: HeldWeights) -> None:
        """Hold this rank's experts, for a stage that follows."""
        for expert, made in zip(self._local, self.experts.held, strict=True):
            held.put(self._layer, self._key_of(expert), made, self._expert_bytes)

    def _build_expert(self, model: ModelConfig, source: WeightSource, expert: int) -> Expert:
        at, ops = self._mesh.at, self._ops
        inner = partition(model.moe_intermediate_size, self._mesh.layout.etp)[at.etp_rank]

        def take(part: str, rows: range = inner) -> Tensor:
            return source.take(expert_name(self._layer, expert, part), rows)

        def matrix(part: str) -> Tensor | NarrowWeight:
            return source.matrix(expert_name(self._layer, expert, part), inner)

        def linear(part: str) -> Linear:
            return ops.linear(matrix(part), take(f"{part}_bias") if model.expert_bias else None)

        down_bias = None
        if model.expert_bias and at.etp_rank == 0:
            down_bias = take("down_bias", range(model.hidden_size))
        return Expert(
            gate=linear("gate") if model.gated_mlp else None,
            up=linear("up"),
            down=ops.linear(matrix("down"), down_bias),
        )

    def forward(self, x: Tensor, batch: ForwardBatch) -> Steps[Tensor]:
        """Apply to the tokens this rank owns, [num_owned, hidden_size]."""
        if self.here is not None and self.here.takes(x):
            return (yield from self._compute_here(self.here, x, batch))
        recorder, layer = self._recorder, self._layer
        hidden, topk_ids, topk_weights = self._router(x)
        recorder.record_topk_ids(topk_ids)
        self._count_router(x.shape[0])
        recorder.check_finite(topk_weights, CheckPoint.ROUTER, layer)
        recorder.enter(Stage.DISPATCH, layer)
        dispatcher = self._dispatchers[batch.dispatch_form]
        num_of_stage_rank, balances = batch.tokens_of_stage_rank, batch.balances_copies
        tokens = RoutedTokens(hidden, topk_ids, topk_weights, num_of_stage_rank, balances)
        rows, pairs, sent = yield from dispatcher.dispatch(tokens)
        recorder.enter(Stage.EXPERTS, layer)
        results = self.experts(rows, pairs, dispatcher.room(pairs.rows.shape[0], rows))
        self._count_pairs(lambda: pairs.counts)
        recorder.check_finite(results, CheckPoint.EXPERTS, layer)
        recorder.enter(Stage.COMBINE, layer)
        combined = yield from dispatcher.combine(sent, results)
        recorder.check_finite(combined, CheckPoint.COMBINE, layer)
        if self.shared is not None:
            combined = combined + (yield from self.shared.forward(hidden, batch))
        return x + combined

    def _compute_here(self, here: LocalExperts, x: Tensor, batch: ForwardBatch) -> Steps[Tensor]:
        """The same where nothing travels, in a call a stage."""
        recorder, layer, num_tokens = self._recorder, self._layer, x.shape[0]
        work = here.route(x)
        if recorder.is_recording:
            recorder.record_topk_ids(here.topk_ids(work, num_tokens))
            self._count_router(num_tokens)
        recorder.enter(Stage.DISPATCH, layer)
        here.group(work, num_tokens)
        recorder.enter(Stage.EXPERTS, layer)
        here.compute(work, num_tokens)
        self._count_pairs(lambda: here.num_tokens_per_expert(work, num_tokens))
        recorder.enter(Stage.COMBINE, layer)
        combined = here.combine(work, x, adds_input=self.shared is None)
        recorder.check_finite(combined, CheckPoint.EXPERTS, layer)
        if self.shared is None:
            return combined
        normed = here.normed(work, x)
        return x + (combined + (yield from self.shared.forward(normed, batch)))

    def _count_router(self, num_tokens: int) -> None:
        weight = self._router.params.weight
        self._recorder.count_compute(
            2 * num_tokens * weight.numel(), weight.nbytes if num_tokens else 0
        )

    @property
    def metered(self) -> Tensor | None:
        """[num_held] int64, to be added to: pairs of each expert; None where nobody counts them."""
        if self._recorder.meter is None or self._mesh.at.etp_rank > 0:
            return None
        return self._recorder.meter.counts(self._layer, self._local, self._device)

    def _count_pairs(self, counts: Callable[[], Tensor]) -> None:
        """Take note of the pairs of each expert, [num_held], if anybody wants to know."""
        if (metered := self.metered) is not None:
            metered.add_(counts())
        if not self._recorder.is_recording:
            return
        with self._recorder.uncounted():
            num_tokens = counts().tolist()
            self._recorder.count_compute(*self.experts.compute_cost(num_tokens))
            if self._mesh.at.etp_rank == 0:
                self._recorder.count_expert_tokens(self._local, num_tokens)
