"""The part of a transformer that one rank holds: its stage's layers, heads and experts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertlane.balance.placement import Placement
from expertlane.model.attention import Attention, KVCache, RotaryEmbedding
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.layers import DecoderLayer, LayerWeights, OutputHead
from expertlane.model.weights import EMBEDDING, FINAL_NORM, HEAD, draw, expert_name, layer_name
from expertlane.moe.dispatch import AllToAllDispatcher
from expertlane.moe.experts import Experts
from expertlane.parallel.interleave import Steps
from expertlane.parallel.mesh import ParallelMesh
from expertlane.parallel.recorder import Recorder
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.partition import partition


class HeadResult(NamedTuple):
    """What the last stage gives for a batch.

    Attributes:
        token_ids: [num_seqs].
        logits: [num_seqs, num_local_vocab] float32.
    """

    token_ids: Tensor
    logits: Tensor


class WeightSource:
    """Cuts a rank's slices out of the seeded logical tensors.

    Args:
        touch: called after every tensor, to say that work goes on.

    Attributes:
        num_bytes: taken so far.
    """

    def __init__(
        self,
        model: ModelConfig,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        touch: Callable[[], None],
    ) -> None:
        self._model = model
        self._seed = seed
        self.dtype = dtype
        self.device = device
        self._touch = touch
        self.num_bytes = 0

    def take(
        self, name: str, part: range | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Tensor `name`, or a part of it along the dimension that layouts cut."""
        drawn = draw(self._model, self._seed, name, part)
        tensor = torch.from_numpy(drawn).to(self.device, dtype or self.dtype).contiguous()
        self.num_bytes += tensor.nbytes
        self._touch()
        return tensor

    def take_all(self, names: Sequence[str], part: range) -> Tensor:
        """The same part of tensors of one shape, stacked: [len(names), ...]; one copy at a time."""
        stacked: Tensor | None = None
        for index, name in enumerate(names):
            tensor = self.take(name, part)
            if stacked is None:
                stacked = tensor.new_empty((len(names), *tensor.shape))
            stacked[index] = tensor
        assert stacked is not None, "a rank holds at least one expert"
        return stacked


class TransformerStage:
    """The layers of one pipeline stage on one rank, with embedding or head at the ends."""

    def __init__(
        self,
        model: ModelConfig,
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
        self._num_local_heads = model.num_attention_heads // layout.tp
        placement = Placement.linear(model.num_experts, layout.ep)
        dispatcher = AllToAllDispatcher(mesh, placement, source.device)
        rotary = RotaryEmbedding(model, source.device)
        self._layers = [
            self._build_layer(layer, source, placement, dispatcher, rotary)
            for layer in layout.layers_of_stage(model.num_hidden_layers, at.pp_rank)
        ]
        self._embedding = source.take(EMBEDDING) if mesh.is_first_stage else None
        self._head: OutputHead | None = None
        if mesh.is_last_stage:
            vocab = partition(model.vocab_size, layout.tp)[at.tp_rank]
            self._head = OutputHead(
                source.take(FINAL_NORM),
                source.take(HEAD, vocab),
                vocab.start,
                mesh,
                recorder,
                model.rms_norm_eps,
            )
        self.weight_bytes = source.num_bytes

    def _build_layer(
        self,
        layer: int,
        source: WeightSource,
        placement: Placement,
        dispatcher: AllToAllDispatcher,
        rotary: RotaryEmbedding,
    ) -> DecoderLayer:
        model, mesh = self.model, self.mesh
        at = mesh.at
        width = self._num_local_heads * model.head_dim
        heads = range(at.tp_rank * width, (at.tp_rank + 1) * width)
        inner = partition(model.moe_intermediate_size, mesh.layout.etp)[at.etp_rank]
        experts = placement.experts_of_rank[at.ep_rank]

        query_key_value = torch.cat(
            [source.take(layer_name(layer, part), heads) for part in ("query", "key", "value")]
        )
        output = source.take(layer_name(layer, "output"), heads)
        return DecoderLayer(
            layer,
            LayerWeights(
                source.take(layer_name(layer, "attention_norm")),
                source.take(layer_name(layer, "moe_norm")),
                source.take(layer_name(layer, "router"), dtype=torch.float32),
            ),
            Attention(query_key_value, output, model.head_dim, rotary, self._recorder),
            Experts(
                source.take_all([expert_name(layer, e, "up") for e in experts], inner),
                source.take_all([expert_name(layer, e, "down") for e in experts], inner),
            ),
            dispatcher,
            mesh,
            self._recorder,
            top_k=model.num_experts_per_tok,
            eps=model.rms_norm_eps,
            first_expert=experts.start,
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key/value cache."""
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self._caches)

    def allocate_cache(self, num_slots: int, max_len: int) -> None:
        """Make room for `num_slots` sequences of up to `max_len` positions; forget all others."""
        self._caches = []
        self._caches = [
            KVCache(
                num_slots,
                self._num_local_heads,
                max_len,
                self.model.head_dim,
                self._dtype,
                self._device,
            )
            for _ in self._layers
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

    def forward(self, x: Tensor, batch: ForwardBatch) -> Steps[Tensor | HeadResult]:
        """Run a batch through the stage's layers, and the head on the last stage.

        Args:
            x: [num_owned, hidden_size].

        Returns:
            Hidden states [num_owned, hidden_size] for the next stage, or the head's result.
        """
        for layer, cache in zip(self._layers, self._caches, strict=True):
            x = yield from layer.forward(x, batch, cache)
        if self._head is None:
            return x
        return HeadResult(*(yield from self._head.forward(x, batch)))
