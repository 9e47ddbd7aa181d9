"""The part of a transformer that one rank holds: a decoder layer, and a pipeline stage of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from expertlane.balance.holding import Placements
from expertlane.balance.placement import Placement
from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.counters import Meter
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.attention import Attention, LatentAttention, RotaryEmbedding
from expertlane.engine.model.blocks import DenseBlock, LocalRouterOutput, MoEBlock, RouterOutput
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.head import HeadResult, OutputHead, ScoredPrompts
from expertlane.engine.model.weights import HeldWeights, WeightSource, taker_of
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.ops.step import AttentionPart, LayerParts, LayersPart
from expertlane.spec.deployment import DispatchForm, KVCacheType, PayloadType
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import CheckPoint, Stage
from expertlane.spec.tensors import EMBEDDING

FirstHalf = RouterOutput | LocalRouterOutput | Tensor


class DecoderLayer:
    """Pre-norm attention, and an MoE or dense block; tokens stay with their owners in between.

    `begin` and `finish` compute it operation by operation, in any layout. `parts` are what one
    call, `LayersPart`, computes whole, where nothing travels.
    """

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

    def begin(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[FirstHalf]:
        """Run the layer up to the dispatch of its MoE block, or to its end if it is dense.

        Args:
            x: [num_owned, hidden_size]; the tokens that this rank owns.

        Returns:
            The routed tokens; of a dense layer its output [num_owned, hidden_size].
        """
        x, added = yield from self._attend(x, batch, cache)
        # The next norm adds them, except where the backend gains nothing by it.
        if added is not None and (self._recorder.checks or not self._ops.adds_with_norm):
            x, added = x + added, None
        self._recorder.check_finite(x, CheckPoint.AFTER_ATTENTION, self.index)
        self._recorder.enter(Stage.ROUTER, self.index)
        return (yield from self.block.begin(x, batch, added))

    def finish(self, begun: FirstHalf, batch: ForwardBatch) -> Steps[Tensor]:
        """Run the rest of the layer on what `begin` gave: [num_owned, hidden_size]."""
        if not isinstance(begun, Tensor):
            assert isinstance(self.block, MoEBlock), "only such a block has a router"
            begun = yield from self.block.finish(begun, batch)
        self._recorder.check_finite(begun, CheckPoint.AFTER_MLP, self.index)
        return begun

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


# Stages of a layer without communication, in order.
_LAYER_STAGES = (Stage.ATTENTION, Stage.ROUTER, Stage.DISPATCH, Stage.EXPERTS, Stage.COMBINE)


LayerStart = Callable[[DecoderLayer, KVCache, Tensor], FirstHalf]


class StageParts:
    """Makes the parts of a stage from the weights of a source.

    Attributes:
        layers: the stage's layers.
    """

    def __init__(
        self, model: ModelConfig, placements: Placements, source: WeightSource, mesh: ParallelMesh
    ) -> None:
        self._model, self._placements = model, placements
        self._source, self._mesh = source, mesh
        self._rotary = RotaryEmbedding(model, source.device)
        self.layers = mesh.layout.layers_of_stage(model.num_hidden_layers, mesh.at.pp_rank)

    def layer(self, layer: int) -> DecoderLayer:
        """Make one of `layers`."""
        placement = self._placements[layer]
        return DecoderLayer(self._model, layer, placement, self._source, self._mesh, self._rotary)

    def embedding(self) -> Tensor | None:
        """The embedding [vocab_size, hidden_size]; None except in the first stage."""
        if not self._mesh.is_first_stage:
            return None
        # Hidden states are kept divided by the residual multiplier; see `hidden_norm_eps`.
        factor = self._model.embedding_multiplier / self._model.residual_multiplier

        def embedding() -> Tensor:
            taken = self._source.take(EMBEDDING)
            return taken if factor == 1 else taken.mul_(factor)

        return self._source.once(None, EMBEDDING, embedding)

    def head(self) -> OutputHead | None:
        """The output head; None except in the last stage."""
        if not self._mesh.is_last_stage:
            return None
        return OutputHead(self._model, self._source, self._mesh)


class TransformerStage:
    """The layers of one pipeline stage on one rank, with the embedding or the head at the ends."""

    def __init__(
        self,
        model: ModelConfig,
        placements: Placements,
        source: WeightSource,
        mesh: ParallelMesh,
    ) -> None:
        self.model = model
        self.mesh = mesh
        self._dtype, self.device = source.dtype, source.device
        self._caches: list[KVCache] = []
        self._part: LayersPart | None = None
        self._meter: Meter | None = None  # that the part adds to
        parts = StageParts(model, placements, source, mesh)
        source.keep_layers(parts.layers)
        self._layers: list[DecoderLayer] = []
        for layer in parts.layers:
            self._layers.append(parts.layer(layer))
            source.drop(layer)  # frees what this stage does not use before more is read
        self._embedding, self._head = parts.embedding(), parts.head()
        self.weight_bytes, self.bytes_from = source.num_bytes, dict(source.bytes_from)
        self._held = source.held

    def held_weights(self) -> HeldWeights:
        """The weights that the next stage on this rank may use."""
        held = self._held.copy()
        for block in self.moe_blocks.values():
            block.put_experts(held)
        return held

    def leave_cache(self) -> list[KVCache]:
        """The layers' KV caches, for `take_cache` of a stage with the same layers and heads."""
        return self._caches

    def take_cache(self, caches: list[KVCache]) -> None:
        """Use the KV caches of another stage."""
        self._part, self._caches = None, caches

    def held(self) -> Iterator[tuple[str, list[Tensor]]]:
        """All weights, by a name that is the same on every rank that holds the same ones."""
        if self._embedding is not None:
            yield "embedding", [self._embedding]
        for layer in self._layers:
            yield from layer.held()
        if self._head is not None:
            yield f"head of tp rank {self.mesh.at.tp_rank}", self._head.tensors()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV caches."""
        return sum(cache.num_bytes for cache in self._caches)

    def set_forms(self, forms: Sequence[DispatchForm], payload: PayloadType) -> None:
        """Prepare for batches that use only these dispatch forms."""
        for block in self.moe_blocks.values():
            block.set_forms(forms, payload)

    @property
    def moe_blocks(self) -> dict[int, MoEBlock]:
        """The stage's MoE blocks by hidden layer."""
        return {
            layer.index: layer.block for layer in self._layers if isinstance(layer.block, MoEBlock)
        }

    def allocate_cache(
        self, num_blocks: int, block_size: int, kv_dtype: KVCacheType = "model"
    ) -> None:
        """Allocate empty caches of `num_blocks` blocks of `block_size` positions."""
        self._part, self._caches = None, []
        self._caches = [
            KVCache(
                *(num_blocks, block_size, *layer.attention.cache_dims, self._dtype, self.device),
                is_float8=kv_dtype == "float8",
            )
            for layer in self._layers
        ]

    def _layers_part(self) -> LayersPart | None:
        """All layers in one call; None with communication, a record, checks, or without the C++."""
        recorder = self.mesh.recorder
        if self.mesh.stage.size > 1 or recorder.is_by_stage or recorder.checks is not None:
            return None
        layers = [layer.parts for layer in self._layers]
        meter = self.mesh.recorder.meter
        if self._part is None or self._meter is not meter or not self._part.is_made_of(layers):
            parts = [each for each in layers if each is not None]
            if not parts or len(parts) < len(layers):
                return None
            first, progress = self._layers[0].index, self.mesh.recorder.progress.addresses()
            blocks, totals = self.moe_blocks, None
            if meter is not None:
                counts = [
                    blocks[layer.index].metered if layer.index in blocks else None
                    for layer in self._layers
                ]
                totals = meter.address, counts
            self._part = LayersPart(parts, self._caches, first, progress, _LAYER_STAGES, totals)
            self._meter = meter
        return self._part

    @property
    def layers(self) -> Iterable[tuple[DecoderLayer, KVCache]]:
        """The stage's layers, each with its KV cache."""
        return zip(self._layers, self._caches, strict=True)

    def with_all_logits(self, result: HeadResult) -> Steps[HeadResult]:
        """The head's result, with logits of the whole vocabulary in place of likeliest tokens."""
        assert self._head is not None, "it is the last stage"
        all_logits = yield from self._head.whole(result.logits)
        return result._replace(token_ids=None, all_logits=all_logits)

    def embed(self, batch: ForwardBatch) -> Tensor:
        """Embeddings of the owned tokens, [num_owned, hidden_size]; first stage only."""
        assert self._embedding is not None, "only the first stage holds the embedding"
        self.mesh.recorder.enter(Stage.EMBED)
        return self._embedding.index_select(0, batch.owned_token_ids)

    def empty_hidden(self, num_tokens: int) -> Tensor:
        """A buffer for hidden states from another stage, [num_tokens, hidden_size]."""
        shape = (num_tokens, self.model.hidden_size)
        return torch.empty(shape, dtype=self._dtype, device=self.device)

    def forward(
        self,
        x: Tensor,
        batch: ForwardBatch,
        needs_logits: bool,
        scored: ScoredPrompts | None = None,
        begin: LayerStart | None = None,
    ) -> Steps[Tensor | HeadResult]:
        """Run a batch through the stage's layers, and the head on the last stage.

        Args:
            x: [num_owned, hidden_size].
            needs_logits: give logits of the whole vocabulary, not the likeliest tokens.
            scored: prompt tokens whose log-probabilities are asked for.
            begin: does what `DecoderLayer.begin` would, by a graph.

        Returns:
            Hidden states [num_owned, hidden_size] for the next stage, or the head's result.
        """
        part = None if begin is not None else self._layers_part()
        if part is not None and part.takes(x):
            x = part(x, batch.pages)
            self.mesh.recorder.enter(Stage.COMBINE, self._layers[-1].index)
        else:
            for layer, cache in self.layers:
                if begin is None:
                    begun = yield from layer.begin(x, batch, cache)
                else:
                    begun = begin(layer, cache, x)
                x = yield from layer.finish(begun, batch)
        if self._head is None:
            return x
        result = yield from self._head.forward(x, batch, needs_logits)
        if scored is not None:
            found = yield from self._head.score(x, batch, scored)
            result = result._replace(prompt_logprobs=found)
        return result
