"""A decoder layer as generators that yield where they wait for communication."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.attention import Attention, RotaryEmbedding
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.latent_attention import LatentAttention
from expertlane.engine.model.mlp import DenseBlock
from expertlane.engine.model.moe_block import MoEBlock, Routed
from expertlane.engine.model.weights import WeightSource, taker_of
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.ops.layers import LayerParts
from expertlane.engine.ops.step import AttentionPart
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import CheckPoint, Stage


class DecoderLayer:
    """Pre-norm attention, and an MoE or dense block; tokens stay with their owners in between."""

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
        self._eps = model.hidden_norm_eps
        # float32, as norms are computed in it
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
        x, added = yield from self._attended(x, batch, cache)
        x = yield from self.block.forward(x, batch, added)
        self._recorder.check_finite(x, CheckPoint.AFTER_MLP, self.index)
        return x

    def begin(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Routed | Tensor]:
        """Run the layer up to the dispatch of its MoE block, or to its end if it is dense.

        Args:
            x: [num_owned, hidden_size].

        Returns:
            The routed tokens; of a dense layer its output [num_owned, hidden_size].
        """
        x, added = yield from self._attended(x, batch, cache)
        if isinstance(self.block, MoEBlock):
            return self.block.routed(x, batch, added)
        return (yield from self.block.forward(x, batch, added))

    def _attended(
        self, x: Tensor, batch: ForwardBatch, cache: KVCache
    ) -> Steps[tuple[Tensor, Tensor | None]]:
        """x and attention's output, which the next norm adds; or their sum, and None.

        They are summed here where the backend gains nothing by adding in the norm.
        """
        x, added = yield from self._attend(x, batch, cache)
        if added is not None and (self._recorder.checks or not self._ops.adds_with_norm):
            x, added = x + added, None
        self._recorder.check_finite(x, CheckPoint.AFTER_ATTENTION, self.index)
        self._recorder.enter(Stage.ROUTER, self.index)
        return x, added

    @property
    def parts(self) -> LayerParts | None:
        """The C++ calls that compute the layer; None where they do not cover all of it."""
        block = self.block.parts
        if block is None or self._mesh.tp.size > 1 or not isinstance(self._part, AttentionPart):
            return None
        return LayerParts(self._part, *block)

    def held(self) -> Iterator[tuple[str, list[Tensor]]]:
        """All weights, by a name that is the same on every rank that holds the same ones."""
        name, tp_rank = f"layer {self.index}", self._mesh.at.tp_rank
        yield f"{name}, norm", [self._attention_norm]
        yield f"{name}, attention of tp rank {tp_rank}", self.attention.tensors()
        for part, tensors in self.block.held():
            yield f"{name}, {part}", tensors

    def _attend(
        self, x: Tensor, batch: ForwardBatch, cache: KVCache
    ) -> Steps[tuple[Tensor, Tensor | None]]:
        """x and attention's output, [num_owned, hidden_size] each; or their sum, and None."""
        enter, tp = self._recorder.enter, self._mesh.tp
        enter(Stage.ATTENTION, self.index)
        if self._part is not None and tp.size == 1 and self._part.takes(x):
            return self.attention.compute(self._part, x, batch, cache, adds_input=True), None
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
        return x, hidden
