"""Causal attention over a key/value cache, for the heads one rank holds.

`Attention` is multi-head or grouped-query; `LatentAttention` attends in the latent (DeepSeek-AI
2024): queries are taken into the latent's space, so one common key and value serve all heads.
Both give a partial sum over the tensor-parallel group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertlane.comm.interleave import Steps
from expertlane.comm.mesh import ParallelMesh
from expertlane.comm.recorder import Recorder
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.rotary import RotaryEmbedding
from expertlane.model.weights import WeightSource
from expertlane.ops.backend import backend_for
from expertlane.ops.kv_cache import AttentionParams, KVCache
from expertlane.ops.linear import Linear
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.tensors import layer_name


class _PagedHeads:
    """What both kinds share: what computes, and the counters."""

    _params: AttentionParams

    def __init__(self, source: WeightSource, rotary: RotaryEmbedding, recorder: Recorder) -> None:
        self._rotary = rotary
        self._recorder = recorder
        self._ops = backend_for(source.device)

    def _count(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        linears: Sequence[Linear],
        num_heads: int,
        num_other_weights: int = 0,
    ) -> None:
        """Linears as 2·m·n·k; attention as 2 × pairs × heads × (key_dim + value_dim)."""
        if not self._recorder.is_recording:
            return
        num_tokens, window = batch.batch.num_tokens, self._params.window
        pairs = batch.num_query_key_pairs(window)
        widths = cache.keys.shape[-1] + self._params.value_dim
        num_weights = sum(linear.num_weights for linear in linears) + num_other_weights
        self._recorder.count_compute(
            flops=2 * num_tokens * num_weights + 2 * pairs * num_heads * widths,
            weight_bytes=num_weights * linears[0].itemsize if num_tokens else 0,
            kv_bytes=cache.position_bytes * batch.num_positions_read(window),
        )


class Attention(_PagedHeads):
    """Multi-head or grouped-query attention; key/value heads fewer than `tp` are replicated."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        source: WeightSource,
        mesh: ParallelMesh,
        rotary: RotaryEmbedding,
        recorder: Recorder,
    ) -> None:
        super().__init__(source, rotary, recorder)
        ops = self._ops
        tp, tp_rank, dim = mesh.layout.tp, mesh.at.tp_rank, model.head_dim
        self._mesh = mesh
        self._head_dim = dim
        self.num_heads = model.num_attention_heads // tp
        self.num_kv_heads = max(1, model.num_kv_heads // tp)
        self._kv_copies = max(1, tp // model.num_kv_heads)  # ranks that hold the same kv head
        first_kv = tp_rank // self._kv_copies * self.num_kv_heads
        heads = range(tp_rank * self.num_heads * dim, (tp_rank + 1) * self.num_heads * dim)
        kv_heads = range(first_kv * dim, (first_kv + self.num_kv_heads) * dim)
        self._eps = model.rms_norm_eps
        self._attention_size, self._kv_size = model.attention_size, model.kv_size

        def take(part: str, rows: range | None = None) -> Tensor:
            return source.take(layer_name(layer, part), rows)

        parts = {"query": heads, "key": kv_heads, "value": kv_heads}
        bias = None
        if model.qkv_bias:
            bias = torch.cat([take(f"{part}_bias", rows) for part, rows in parts.items()])
        weight = torch.cat([take(part, rows) for part, rows in parts.items()])
        self._query_key_value = ops.linear(weight, bias)
        self._norms: tuple[Tensor, Tensor] | None = None
        self._head_norms: Tensor | None = None  # of query and key heads, [heads, head_dim]
        if model.qk_norm == "full":
            self._norms = take("query_norm", heads), take("key_norm", kv_heads)
        elif model.qk_norm == "head":
            norms = take("query_norm").float(), take("key_norm").float()
            counts = self.num_heads, self.num_kv_heads
            self._head_norms = torch.cat(
                [norm.expand(count, dim) for norm, count in zip(norms, counts, strict=True)]
            )
        own_heads = range(tp_rank * self.num_heads, (tp_rank + 1) * self.num_heads)
        sinks = None
        if model.attention_sinks:
            sinks = source.take(layer_name(layer, "sinks"), own_heads, torch.float32)
        window = model.window_of_layer(layer)
        self._params = AttentionParams(dim, model.softmax_scale, window, sinks)
        # A bias is added once, not by every rank of the group whose partial sums are added up.
        output_bias = take("output_bias") if model.output_bias and tp_rank == 0 else None
        self._output = ops.linear(take("output", heads), output_bias)

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """Heads, key_dim and value_dim of the cache."""
        return self.num_kv_heads, self._head_dim, self._head_dim

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Tensor]:
        """Attend from the batch's new tokens to all positions up to each.

        Args:
            x: [num_tokens, hidden_size]; all tokens of the data-parallel rank's part.

        Returns:
            [num_tokens, hidden_size].
        """
        num_turned = self.num_heads + self.num_kv_heads
        projected = self._query_key_value(x)
        heads = projected.view(len(x), num_turned + self.num_kv_heads, self._head_dim)
        query_key, value = heads[:, :num_turned], heads[:, num_turned:]
        if self._norms is not None:
            query_key = yield from self._norm_all_heads(query_key, self._norms)
        elif self._head_norms is not None:
            query_key = self._ops.rms_norm_heads_(query_key, self._head_norms, self._eps)
        query_key = self._rotary.rotate_(query_key, batch.rotation(self._rotary))
        query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        attended = self._ops.paged_attention(query, key, value, cache, batch.pages, self._params)
        self._count(batch, cache, (self._query_key_value, self._output), self.num_heads)
        return self._output(attended.flatten(1))

    def _norm_all_heads(self, query_key: Tensor, norms: tuple[Tensor, Tensor]) -> Steps[Tensor]:
        """RMS norms of queries and of keys, over the heads of all ranks together."""
        heads = [self.num_heads, self.num_kv_heads]
        query, key = (part.flatten(1).float() for part in torch.split(query_key, heads, dim=1))
        squares = torch.stack(
            [query.square().sum(dim=1), key.square().sum(dim=1) / self._kv_copies], dim=1
        )
        tp = self._mesh.tp
        if tp.size > 1:
            recorder, layer = self._recorder, self._recorder.layer
            recorder.enter(Stage.COLLECTIVES, layer)
            width = squares.shape[1] * squares.itemsize
            gathered = yield tp.all_gather(squares, [len(squares)] * tp.size, metadata_bytes=width)
            squares = gathered.view(tp.size, -1, 2).sum(dim=0) if len(squares) else squares
            recorder.enter(Stage.ATTENTION, layer)
        sizes = torch.tensor([self._attention_size, self._kv_size], device=squares.device)
        factors = torch.rsqrt(squares / sizes + self._eps)
        query = query * factors[:, :1] * norms[0].float()
        key = key * factors[:, 1:] * norms[1].float()
        return torch.cat([query, key], dim=1).to(query_key.dtype).view(query_key.shape)


class LatentAttention(_PagedHeads):
    """Latent attention; the latent, which all heads share, is replicated over `tp`."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        source: WeightSource,
        mesh: ParallelMesh,
        rotary: RotaryEmbedding,
        recorder: Recorder,
    ) -> None:
        super().__init__(source, rotary, recorder)
        ops = self._ops
        latent = model.latent
        assert latent is not None, "the model has latent attention"
        self._latent = latent
        window = model.window_of_layer(layer)
        self._params = AttentionParams(latent.kv_lora_rank, model.softmax_scale, window)
        self._head_dim = model.head_dim
        self.num_heads = model.num_attention_heads // mesh.layout.tp
        own = range(mesh.at.tp_rank * self.num_heads, (mesh.at.tp_rank + 1) * self.num_heads)

        def rows(width: int) -> range:
            return range(own.start * width, own.stop * width)

        def take(part: str, part_range: range | None = None) -> Tensor:
            return source.take(layer_name(layer, part), part_range)

        def take_norm(part: str) -> Tensor:
            return source.take(layer_name(layer, part), dtype=torch.float32)

        self._query_a: tuple[Linear, Tensor] | None = None
        if latent.q_lora_rank is None:
            self._query = ops.linear(take("query", rows(model.head_dim)))
        else:
            self._query_a = ops.linear(take("query_a")), take_norm("query_a_norm")
            self._query = ops.linear(take("query_b", rows(model.head_dim)))
        self._kv_a, self._kv_a_norm = ops.linear(take("kv_a")), take_norm("kv_a_norm")
        width = latent.qk_nope_head_dim + latent.v_head_dim
        kv_b = take("kv_b", rows(width)).view(self.num_heads, width, latent.kv_lora_rank)
        self._key_b = kv_b[:, : latent.qk_nope_head_dim]  # [heads, nope, rank]
        self._value_b = kv_b[:, latent.qk_nope_head_dim :]  # [heads, v_head_dim, rank]
        output_bias = take("output_bias") if model.output_bias and mesh.at.tp_rank == 0 else None
        self._output = ops.linear(take("output", rows(latent.v_head_dim)), output_bias)

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """Heads, key_dim and value_dim of the cache."""
        return 1, self._latent.kv_lora_rank + self._latent.qk_rope_head_dim, 0

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Tensor]:
        """As `Attention.forward`."""
        latent, eps = self._latent, self._latent.norm_eps
        hidden = x
        linears = [self._query, self._kv_a, self._output]
        if self._query_a is not None:
            hidden = self._ops.rms_norm(self._query_a[0](x), self._query_a[1], eps)
            linears.append(self._query_a[0])
        rotation = batch.rotation(self._rotary)
        query = self._query(hidden).view(len(x), self.num_heads, self._head_dim)
        query = self._rotary.rotate_(query, rotation)
        compressed, rotated = torch.split(
            self._kv_a(x), [latent.kv_lora_rank, latent.qk_rope_head_dim], dim=1
        )
        compressed = self._ops.rms_norm(compressed, self._kv_a_norm, eps)
        rotated = self._rotary.rotate_(rotated[:, None], rotation)
        key = torch.cat([compressed[:, None], rotated], dim=-1)  # [num_tokens, 1, rank + rope]
        nope, rope = torch.split(query, [latent.qk_nope_head_dim, latent.qk_rope_head_dim], dim=-1)
        in_latent = torch.einsum("thn,hnr->thr", nope, self._key_b)
        query = torch.cat([in_latent, rope], dim=-1)
        attended = self._ops.paged_attention(
            query, key, key[..., :0], cache, batch.pages, self._params
        )
        out = torch.einsum("thr,hvr->thv", attended, self._value_b)
        num_weights = self._key_b.numel() + self._value_b.numel()
        self._count(batch, cache, linears, self.num_heads, num_weights)
        return self._output(out.flatten(1))
        yield  # a generator like Attention's, though it never waits
