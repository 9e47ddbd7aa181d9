"""The part of a transformer that one rank holds: its stage's layers, heads and experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertlane.balance.placement_file import Placements
from expertlane.comm.interleave import Steps
from expertlane.comm.mesh import ParallelMesh
from expertlane.comm.recorder import Recorder
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.head import HeadResult, OutputHead
from expertlane.model.kv_cache import KVCache
from expertlane.model.layers import DecoderLayer, MoEBlock
from expertlane.model.rotary import RotaryEmbedding
from expertlane.model.weights import WeightSource
from expertlane.spec.deployment import DispatchForm, PayloadType
from expertlane.spec.layout import partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.tensors import EMBEDDING, FINAL_NORM, HEAD


class TransformerStage:
    """The layers of one pipeline stage on one rank, with embedding or head at the ends."""

    def __init__(
        self,
        model: ModelConfig,
        placements: Placements,
        source: WeightSource,
        mesh: ParallelMesh,
        recorder: Recorder,
    ) -> None:
        self.model = model
        self.mesh = mesh
        self._recorder = recorder
        self._dtype, self._device = source.dtype, source.device
        self._caches: list[KVCache] = []
        layout, at = mesh.layout, mesh.at
        rotary = RotaryEmbedding(model, source.device)
        self._layers = [
            DecoderLayer(model, layer, placements[layer], source, mesh, rotary, recorder)
            for layer in layout.layers_of_stage(model.num_hidden_layers, at.pp_rank)
        ]
        self._embedding = source.take(EMBEDDING) if mesh.is_first_stage else None
        self._head: OutputHead | None = None
        if mesh.is_last_stage:
            vocab = partition(model.vocab_size, layout.tp)[at.tp_rank]
            self._head = OutputHead(
                source.take(FINAL_NORM, dtype=torch.float32),
                source.take(HEAD, vocab),
                model.vocab_size,
                mesh,
                recorder,
                model.rms_norm_eps,
            )
        self.weight_bytes = source.num_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key/value cache."""
        return sum(cache.num_bytes for cache in self._caches)

    def set_forms(self, forms: Sequence[DispatchForm], payload: PayloadType) -> None:
        """Make ready for batches that use these dispatch forms, and no others."""
        for block in self.moe_blocks.values():
            block.set_forms(forms, payload)

    @property
    def moe_blocks(self) -> dict[int, MoEBlock]:
        """The stage's MoE blocks by hidden layer."""
        blocks = [layer.block for layer in self._layers]
        first = self.mesh.layout.layers_of_stage(
            self.model.num_hidden_layers, self.mesh.at.pp_rank
        ).start
        return {
            first + index: block
            for index, block in enumerate(blocks)
            if isinstance(block, MoEBlock)
        }

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Make room for `num_blocks` blocks of `block_size` positions; forget what was there."""
        self._caches = []
        self._caches = [
            KVCache(num_blocks, block_size, *layer.attention.cache_dims, self._dtype, self._device)
            for layer in self._layers
        ]

    def embed(self, batch: ForwardBatch) -> Tensor:
        """First stage only: the hidden states of the owned tokens, [num_owned, hidden_size]."""
        assert self._embedding is not None, "only the first stage holds the embedding"
        self._recorder.enter(Stage.EMBED)
        return self._embedding[batch.owned_token_ids]

    def empty_hidden(self, num_tokens: int) -> Tensor:
        """Room for hidden states from another stage, [num_tokens, hidden_size]."""
        shape = (num_tokens, self.model.hidden_size)
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def forward(
        self, x: Tensor, batch: ForwardBatch, needs_logits: bool
    ) -> Steps[Tensor | HeadResult]:
        """Run a batch through the stage's layers, and the head on the last stage.

        Args:
            x: [num_owned, hidden_size].
            needs_logits: all logits are wanted, not only the likeliest token.

        Returns:
            Hidden states [num_owned, hidden_size] for the next stage, or the head's result.
        """
        for layer, cache in zip(self._layers, self._caches, strict=True):
            x = yield from layer.forward(x, batch, cache)
        if self._head is None:
            return x
        return (yield from self._head.forward(x, batch, needs_logits))
