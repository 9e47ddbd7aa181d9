"""The blocks after attention, as generators that yield where they wait for communication.

An MLP that every token takes (a dense layer's, or the shared expert), the dense block, and the MoE
block.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.weights import EXPERT, HeldWeights, WeightSource, taker_of
from expertlane.engine.moe.dispatch import CopyChooser, Payload, RoutedTokens
from expertlane.engine.moe.forms import make_dispatcher
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.narrow import Weight
from expertlane.engine.ops.products import Activation, Expert, Linear
from expertlane.engine.ops.router import RouterParams
from expertlane.engine.ops.step import LocalExperts, MlpPart, MlpWeights
from expertlane.spec.deployment import DispatchForm, PayloadType
from expertlane.spec.layout import partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import CheckPoint, Stage
from expertlane.spec.tensors import expert_name, layer_name


def activation_of(model: ModelConfig) -> Activation:
    """The activation of all the model's MLPs."""
    assert model.hidden_act != "relu2", "planned alone"
    return Activation(model.hidden_act, model.swiglu_limit, model.swiglu_alpha)


class MLP:
    """An MLP that every token takes: a dense layer's, or an MoE layer's shared expert.

    It is divided over the tensor-parallel group: tokens are gathered, and partial sums are
    reduce-scattered. Its projections are named `layers.N.PREFIX.…`.

    Attributes:
        tp_rank: the rank whose slice it is.

    Args:
        inner: its inner width, over all ranks.
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
            return source.linear(layer, layer_name(layer, f"{prefix}.{matrix}"), part)

        self._gate = linear("gate") if model.gated_mlp else None
        self._up, self._down = linear("up"), linear("down")
        self._scale = taker_of(source, layer)("shared_gate") if is_scaled else None
        self._activation = activation_of(model)
        self._tp, self._recorder, self.tp_rank = mesh.tp, mesh.recorder, mesh.at.tp_rank
        self._layer, self._norm, self._eps = layer, norm, model.hidden_norm_eps
        around = (norm, self._eps, self._scale) if mesh.tp.size == 1 else (None, self._eps, None)
        linears = Expert(gate=self._gate, up=self._up, down=self._down)
        self.part = ops.mlp_part(MlpWeights(linears, self._activation, *around), source.dtype)

    def tensors(self) -> list[Tensor]:
        """All weights, for checksums."""
        linears = Expert(gate=self._gate, up=self._up, down=self._down)
        return [*linears.tensors(), *(t for t in (self._scale, self._norm) if t is not None)]

    def forward(self, x: Tensor, batch: ForwardBatch) -> Steps[Tensor]:
        """Apply the MLP to the tokens that this rank owns, [num_owned, hidden_size]."""
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
        if not self._recorder.is_recording:
            return
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
        """The C++ call that computes the block; None without one."""
        return (None, self.mlp.part) if isinstance(self.mlp.part, MlpPart) else None

    def held(self) -> Iterator[tuple[str, list[Tensor]]]:
        """The block's weights, by names within the layer."""
        yield f"MLP of tp rank {self.mlp.tp_rank}", self.mlp.tensors()

    def begin(self, x: Tensor, batch: ForwardBatch, added: Tensor | None) -> Steps[Tensor]:
        """Apply the block to the tokens that this rank owns: to its end, as it dispatches nothing.

        Args:
            x: [num_owned, hidden_size].
            added: attention's output, still to be added to x; None if it is.

        Returns:
            [num_owned, hidden_size].
        """
        x = x if added is None else x + added
        return x + (yield from self.mlp.forward(x, batch))


class RouterOutput(NamedTuple):
    """Tokens that have passed the router.

    Attributes:
        x: [T, hidden_size]; the block's input, attention's output included.
        hidden: [T, hidden_size]; the normed input.
        topk_ids, topk_weights: [T, top_k].
    """

    x: Tensor
    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


class LocalRouterOutput(NamedTuple):
    """Tokens that `LocalExperts.route` has routed.

    Attributes:
        x: [T, hidden_size]; the block's input.
        work: the buffer that the other calls of `LocalExperts` take.
    """

    x: Tensor
    work: Tensor


class MoEBlock:
    """Norm, router, dispatch, experts, combine, the shared expert if any; added to the input.

    Attributes:
        placement: the experts that each rank holds now.
        experts: this rank's experts.
        here: the block without the shared expert in few calls; None unless all is on this rank.
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
                    eps=model.hidden_norm_eps,
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
        """The C++ calls that compute the block; None if they do not cover all of it."""
        shared = None if self.shared is None else self.shared.part
        if self.here is None or not (shared is None or isinstance(shared, MlpPart)):
            return None
        return None if self.shared is not None and shared is None else (self.here, shared)

    def held(self) -> Iterator[tuple[str, list[Tensor]]]:
        """The block's weights, by names within the layer."""
        params = self._router.params
        own = (params.norm, params.weight, params.bias, params.correction_bias)
        yield "router", [tensor for tensor in own if tensor is not None]
        of_etp = f", part {self._mesh.at.etp_rank}" if self._mesh.layout.etp > 1 else ""
        for expert, held in zip(self._local, self.experts.held, strict=True):
            yield f"expert {expert}{of_etp}", held.tensors()
        if self.shared is not None:
            yield f"shared expert of tp rank {self.shared.tp_rank}", self.shared.tensors()

    def set_forms(self, forms: Sequence[DispatchForm], payload: PayloadType) -> None:
        """Prepare for batches that use only these dispatch forms."""
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
        """Switch to another placement.

        Args:
            arrived: experts that this rank did not hold so far, by logical id.
        """
        own = {**arrived, **dict(zip(self._local, self.experts.held, strict=True))}
        held = [own[expert] for expert in placement.experts_of_rank[self._mesh.at.ep_rank]]
        self._place(placement)
        self._hold(held, self.experts.activation)

    def _hold(self, held: Sequence[Expert], activation: Activation) -> None:
        self.experts = self._ops.experts(held, activation)
        self.here: LocalExperts | None = None
        checks = self._recorder.checks
        in_order = [*self._local] == [*range(len(self._local))]
        if self._mesh.stage.size == 1 and in_order and not (checks and checks.is_full):
            self.here = self._ops.local_experts(self._router, self.experts, self._dtype)

    def _key_of(self, expert: int) -> Hashable:
        """The key of this rank's slice of an expert, for `WeightSource.once`."""
        return EXPERT, expert, self._mesh.layout.etp, self._mesh.at.etp_rank

    def put_experts(self, held: HeldWeights) -> None:
        """Put this rank's experts into `held`, for the next stage."""
        for expert, made in zip(self._local, self.experts.held, strict=True):
            held.put(self._layer, self._key_of(expert), made, self._expert_bytes)

    def _build_expert(self, model: ModelConfig, source: WeightSource, expert: int) -> Expert:
        at, ops = self._mesh.at, self._ops
        inner = partition(model.moe_intermediate_size, self._mesh.layout.etp)[at.etp_rank]

        def take(part: str, rows: range = inner) -> Tensor:
            return source.take(expert_name(self._layer, expert, part), rows)

        def matrix(part: str) -> Weight:
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

    def begin(
        self, x: Tensor, batch: ForwardBatch, added: Tensor | None
    ) -> Steps[RouterOutput | LocalRouterOutput]:
        """Norm the tokens that this rank owns, and choose their experts.

        Args:
            x: [num_owned, hidden_size].
            added: attention's output, still to be added to x; None if it is.
        """
        if self.here is not None and self.here.takes(x) and added is None:
            return LocalRouterOutput(x, self.here.route(x))
        if added is None:
            hidden, topk_ids, topk_weights = self._router(x)
        else:
            norm = self._router.params.norm, self._router.params.eps
            x, hidden = self._ops.add_rms_norm(x, added, *norm)
            topk_ids, topk_weights = self._router.choose(hidden)
        if batch.crowds:
            topk_ids = self._crowded(topk_ids)
        if batch.is_real is not None:
            topk_ids = topk_ids.where(batch.is_real[:, None], -1)
        return RouterOutput(x, hidden, topk_ids, topk_weights)
        yield  # a generator like the dense block's, though it never waits

    def finish(
        self, routed: RouterOutput | LocalRouterOutput, batch: ForwardBatch
    ) -> Steps[Tensor]:
        """Dispatch, experts, combine and the shared expert: [num_owned, hidden_size]."""
        if isinstance(routed, LocalRouterOutput):
            return (yield from self._finish_here(*routed, batch))
        recorder, layer = self._recorder, self._layer
        x, hidden, topk_ids, topk_weights = routed
        if recorder.is_recording:
            recorder.record_topk_ids(topk_ids)
            self._count_router(x.shape[0])
        recorder.check_finite(topk_weights, CheckPoint.ROUTER, layer)
        recorder.enter(Stage.DISPATCH, layer)
        dispatcher = self._dispatchers[batch.dispatch_form]
        tokens = RoutedTokens(hidden, topk_ids, topk_weights, batch.tokens_of_stage_rank)
        rows, pairs, sent = yield from dispatcher.dispatch(tokens)
        recorder.enter(Stage.EXPERTS, layer)
        results = self.experts(rows, pairs, dispatcher.result_buffer(pairs.rows.shape[0], rows))
        self._count_pairs(lambda: pairs.counts)
        if recorder.checks is not None:
            recorder.check_finite(pairs.given(results), CheckPoint.EXPERTS, layer)
        recorder.enter(Stage.COMBINE, layer)
        combined = yield from dispatcher.combine(sent, results)
        recorder.check_finite(combined, CheckPoint.COMBINE, layer)
        if self.shared is not None:
            combined = combined + (yield from self.shared.forward(hidden, batch))
        return x + combined

    def _crowded(self, topk_ids: Tensor) -> Tensor:
        """The same top-k ids for every token: experts of the first rank before others."""
        held = dict.fromkeys(chain.from_iterable(self.placement.experts_of_rank))
        first = topk_ids.new_tensor(list(held)[: topk_ids.shape[1]])
        return first.repeat(len(topk_ids), 1)

    def _finish_here(self, x: Tensor, work: Tensor, batch: ForwardBatch) -> Steps[Tensor]:
        """`finish` without communication, in one call per stage."""
        recorder, layer, num_tokens, here = self._recorder, self._layer, x.shape[0], self.here
        assert here is not None, "it has routed the tokens"
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
        """The meter's counts [num_held] int64 of pairs of each expert, to be added to; or None."""
        if self._recorder.meter is None or self._mesh.at.etp_rank > 0:
            return None
        return self._recorder.meter.counts(self._layer, self._local, self._device)

    def _count_pairs(self, counts: Callable[[], Tensor]) -> None:
        """Add pairs of each expert to the meter and to the step's record, where there are any.

        Args:
            counts: gives the pairs of each expert, [num_held].
        """
        if (metered := self.metered) is not None:
            metered.add_(counts())
        if not self._recorder.is_recording:
            return
        with self._recorder.uncounted():
            num_tokens = counts().tolist()
            self._recorder.count_compute(*self.experts.compute_cost(num_tokens))
            if self._mesh.at.etp_rank == 0:
                self._recorder.count_expert_tokens(self._local, num_tokens)
