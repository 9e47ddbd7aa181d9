"""The part of a transformer that one rank holds: its stage's layers, heads and experts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from expertlane.balance.placement_file import Placements
from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.meter import Meter
from expertlane.engine.model.attention import RotaryEmbedding
from expertlane.engine.model.draw import NO_TOKEN, likeliest
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.layers import DecoderLayer
from expertlane.engine.model.moe_block import MoEBlock
from expertlane.engine.model.scored_prompts import ScoredPrompts
from expertlane.engine.model.weights import HeldWeights, WeightSource
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.ops.layers import LayersPart
from expertlane.engine.ops.transfer import to_device
from expertlane.spec.deployment import KVCacheType, PayloadType
from expertlane.spec.dispatch import DispatchForm
from expertlane.spec.layout import partition
from expertlane.spec.model import EMBEDDING, FINAL_NORM, HEAD, ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.sampling import PromptPart

# Stages of a layer without communication, in order.
_LAYER_STAGES = (Stage.ATTENTION, Stage.ROUTER, Stage.DISPATCH, Stage.EXPERTS, Stage.COMBINE)


class HeadResult(NamedTuple):
    """The output head's result for a batch.

    Attributes:
        token_ids: [num_seqs]; the likeliest tokens, the same on all tensor-parallel ranks, or
            `NO_TOKEN` where the greatest logit is not finite; None where `all_logits` is given.
        logits: [num_seqs, num_local_vocab] float32; this rank's part of the vocabulary.
        all_logits: [num_seqs, vocab_size] float32; None unless needed.
        prompt_logprobs: by sequence id, where asked for.
    """

    token_ids: Tensor | None
    logits: Tensor
    all_logits: Tensor | None
    prompt_logprobs: Mapping[int, PromptPart] = MappingProxyType({})


class OutputHead:
    """Final norm, a rank's rows of the output head, and the choice of the likeliest token."""

    def __init__(self, model: ModelConfig, source: WeightSource, mesh: ParallelMesh) -> None:
        parts = partition(model.vocab_size, mesh.layout.tp)
        own = parts[mesh.at.tp_rank]
        self._vocab_of_tp_rank = [len(part) for part in parts]
        self._first_token_id = own.start
        self._mesh, self._recorder = mesh, mesh.recorder
        self._ops = backend_for(source.device)
        self._eps = model.hidden_norm_eps
        self._norm = source.once(
            None,
            FINAL_NORM,
            lambda: source.take(FINAL_NORM, dtype=torch.float32) / model.logits_scaling,
        )
        self._head = source.once(
            None, (HEAD, own), lambda: self._ops.linear(source.matrix(HEAD, own))
        )
        in_part = self._norm if mesh.tp.size == 1 else None
        self._part = self._ops.head_part(self._head, in_part, self._eps, source.dtype)

    def tensors(self) -> list[Tensor]:
        """All weights, for checksums."""
        return [self._norm, *self._head.tensors()]

    def forward(self, x: Tensor, batch: ForwardBatch, needs_logits: bool) -> Steps[HeadResult]:
        """The next token of every sequence of the batch that yields one.

        Args:
            x: [num_owned, hidden_size].
            needs_logits: give logits of the whole vocabulary, not the likeliest tokens.
        """
        enter, tp = self._recorder.enter, self._mesh.tp
        enter(Stage.HEAD)
        last = batch.last_tokens
        if tp.size == 1 and self._part is not None and self._part.takes(x):
            token_ids = None if needs_logits else last.new_empty(len(last))
            logits = self._part(x, last, token_ids)
            self._count(len(last))
            return HeadResult(token_ids, logits, logits if needs_logits else None)
        hidden = yield from self._normed(x, last, batch.last_tokens_of_tp_rank)
        best: Tensor | None = None
        if tp.size > 1 and self._part is not None and self._part.takes(hidden):
            best = torch.empty(len(hidden), 2, dtype=torch.float64)
            logits = self._part(hidden, None, None, best)
        else:
            logits = self._head(hidden).float()
        self._count(len(hidden))
        if needs_logits:
            return HeadResult(None, logits, (yield from self.whole(logits)))
        if tp.size == 1:
            return HeadResult(likeliest(logits), logits, None)
        best = self._best(logits) if best is None else best
        token_ids = yield from self._likeliest(best)
        return HeadResult(token_ids, logits, None)

    def score(
        self, x: Tensor, batch: ForwardBatch, scored: ScoredPrompts
    ) -> Steps[dict[int, PromptPart]]:
        """Log-probabilities of prompt tokens by sequence id, alike on all tensor-parallel ranks.

        Args:
            x: [num_owned, hidden_size].
        """
        found = []
        self._recorder.enter(Stage.HEAD)
        for chunk in scored.chunks(sum(self._vocab_of_tp_rank)):
            of_tp_rank = batch.owned(scored.rows[chunk])
            (own,) = to_device([of_tp_rank[self._mesh.at.tp_rank]], x.device)
            hidden = yield from self._normed(x, own, list(map(len, of_tp_rank)))
            logits = self._head(hidden).float()
            self._count(len(hidden))
            found.append(scored.score((yield from self.whole(logits)), chunk))
        return scored.parts(found)

    def _normed(self, x: Tensor, own: Tensor, num_of_tp_rank: list[int]) -> Steps[Tensor]:
        """Normed rows [num_rows, hidden_size] of all tensor-parallel ranks; `own` are this rank's.

        Args:
            own: indices of this rank's rows in x.
            num_of_tp_rank: [tp]; rows of each rank.
        """
        recorder, tp = self._recorder, self._mesh.tp
        hidden = self._ops.rms_norm(x[own], self._norm, self._eps)
        if tp.size > 1:
            recorder.enter(Stage.COLLECTIVES)
            hidden = yield from tp.gathered(hidden, num_of_tp_rank)
            recorder.enter(Stage.HEAD)
        return hidden

    def _count(self, num_seqs: int) -> None:
        self._recorder.count_compute(
            2 * num_seqs * self._head.num_weights, self._head.num_bytes if num_seqs else 0
        )

    def whole(self, logits: Tensor) -> Steps[Tensor]:
        """Logits [num_seqs, vocab_size], gathered from every rank's part of the vocabulary."""
        recorder, tp = self._recorder, self._mesh.tp
        if tp.size == 1:
            return logits
        recorder.enter(Stage.COLLECTIVES)
        # Ranks hold parts of the vocabulary, so it must be the rows of the gather.
        gathered = yield from tp.gathered(logits.t().contiguous(), self._vocab_of_tp_rank)
        recorder.enter(Stage.HEAD)
        return gathered.t()

    @staticmethod
    def _best(logits: Tensor) -> Tensor:
        """[num_seqs, 2] float64; this rank's greatest logit, and its index."""
        if logits.shape[1]:
            value, place = logits.max(dim=-1)
        else:  # more ranks than vocabulary
            value, place = (
                logits.new_full((len(logits),), -torch.inf),
                logits.new_zeros(len(logits)),
            )
        return torch.stack([value.double(), place.double()], 1)

    def _likeliest(self, candidates: Tensor) -> Steps[Tensor]:
        """The likeliest tokens over all ranks' parts of the vocabulary.

        Args:
            candidates: [num_seqs, 2] float64; of `_best`.
        """
        recorder, tp, num_seqs = self._recorder, self._mesh.tp, len(candidates)
        candidates[:, 1] += self._first_token_id
        recorder.enter(Stage.COLLECTIVES)
        width = candidates.shape[1] * candidates.itemsize
        gathered = yield from tp.gathered(candidates, [num_seqs] * tp.size, metadata_bytes=width)
        recorder.enter(Stage.HEAD)
        by_rank = gathered.view(tp.size, num_seqs, 2)
        best = by_rank[:, :, 0].argmax(dim=0)  # the first of equals: the lowest token id
        value, token_id = by_rank[best, torch.arange(num_seqs, device=best.device)].unbind(1)
        return token_id.where(value.isfinite(), NO_TOKEN).long()


RunsLayers = Callable[[Tensor, ForwardBatch], Steps[Tensor]]


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
        if self.mesh.stage.size > 1 or recorder.is_recording or recorder.checks is not None:
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
        layers: RunsLayers | None = None,
    ) -> Steps[Tensor | HeadResult]:
        """Run a batch through the stage's layers, and the head on the last stage.

        Args:
            x: [num_owned, hidden_size].
            needs_logits: give logits of the whole vocabulary, not the likeliest tokens.
            scored: prompt tokens whose log-probabilities are asked for.
            layers: a function that runs the layers in another way.

        Returns:
            Hidden states [num_owned, hidden_size] for the next stage, or the head's result.
        """
        if layers is not None:
            x = yield from layers(x, batch)
        elif (part := self._layers_part()) is not None and part.takes(x):
            x = part(x, batch.pages)
            self.mesh.recorder.enter(Stage.COMBINE, self._layers[-1].index)
        else:
            for layer, cache in self.layers:
                x = yield from layer.forward(x, batch, cache)
        if self._head is None:
            return x
        result = yield from self._head.forward(x, batch, needs_logits)
        if scored is not None:
            found = yield from self._head.score(x, batch, scored)
            result = result._replace(prompt_logprobs=found)
        return result
