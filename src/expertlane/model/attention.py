"""Causal attention over a key/value cache, for the heads one rank holds.

`Attention` is multi-head or grouped-query; `LatentAttention` attends in the latent (DeepSeek-AI
2024): queries are taken into the latent's space, so one common key and value serve all heads.
Both give a partial sum over the tensor-parallel group.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.comm.interleave import Steps
from expertlane.comm.mesh import ParallelMesh
from expertlane.comm.recorder import Recorder
from expertlane.model.attention_group import AttentionGroup
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.kv_cache import KVCache
from expertlane.model.norm import rms_norm, rms_norm_heads_
from expertlane.model.rotary import RotaryEmbedding
from expertlane.model.weights import WeightSource
from expertlane.ops.linear import Linear
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.tensors import layer_name


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention of new tokens over the positions of their sequences.

    Args:
        query: [num_seqs, num_heads, num_scheduled, key_dim].
        keys, values: [num_seqs, num_kv_heads, num_positions, …].
        mask: [num_seqs or 1, 1, num_scheduled, num_positions]; addends to the logits.
        is_causal: query i sees positions 0 to i; without a mask.
        sinks: [num_heads] float32; logits that take part in the softmax's sum alone.

    Returns:
        [num_seqs, num_heads, num_scheduled, value_dim].
    """
    if sinks is None:
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    logits = (query @ keys.transpose(-1, -2)).float() * scale
    if is_causal:
        mask = logits.new_full(logits.shape[-2:], -torch.inf).triu(1)
    if mask is not None:
        logits = logits + mask
    sink = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(values.dtype) @ values


class PagedHeads:
    """What both kinds share: groups of a batch, and the counters."""

    def __init__(
        self, model: ModelConfig, layer: int, rotary: RotaryEmbedding, recorder: Recorder
    ) -> None:
        self._scale = model.softmax_scale
        self._window = model.window_of_layer(layer)
        self._rotary = rotary
        self._recorder = recorder

    def attend_paged(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[num_tokens, num_heads, value_dim] of queries, keys and values [num_tokens, heads, …]."""
        cache.write(batch, key, value)
        if cache.kernels is not None:
            return cache.kernels.attention(
                query,
                cache.keys,
                cache.values if cache.values.numel() else None,
                batch.paged_sequences,
                value_dim=self.value_dim,
                scale=self._scale,
                window=self._window,
                sinks=sinks,
            )
        groups = batch.attention_groups
        if len(groups) == 1:  # all tokens, in their order
            return self._attend_group(groups[0], cache, query, key, value, sinks=sinks)
        out = query.new_empty((*query.shape[:2], self.value_dim))
        for group in groups:
            of_group = [x.index_select(0, group.tokens) for x in (query, key, value)]
            out[group.tokens] = self._attend_group(group, cache, *of_group, sinks=sinks)
        return out

    def _attend_group(
        self,
        group: AttentionGroup,
        cache: KVCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sinks: Tensor | None,
    ) -> Tensor:
        def by_head(x: Tensor) -> Tensor:
            return x.view(group.num_seqs, group.num_scheduled, *x.shape[1:]).transpose(1, 2)

        if group.is_fresh:
            keys, values = by_head(key), by_head(value)
        else:
            keys, values = cache.read(group.block_tables, group.num_positions)
        if values.shape[-1] == 0:  # the latent is both
            values = keys[..., : self.value_dim]
        is_causal = group.is_causal(self._window)
        out = attend(
            by_head(query),
            keys,
            values,
            mask=None if is_causal else group.mask(self._window, query.dtype),
            is_causal=is_causal,
            scale=self._scale,
            sinks=sinks,
        )
        return out.transpose(1, 2).flatten(0, 1)

    value_dim: int

    def _count(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        linears: Sequence[Linear],
        num_heads: int,
        num_other_weights: int = 0,
    ) -> None:
        """Linears as 2·m·n·k; attention as 2 × pairs × heads × (key_dim + value_dim)."""
        num_tokens = batch.batch.num_tokens
        pairs = batch.num_query_key_pairs(self._window)
        widths = cache.keys.shape[-1] + self.value_dim
        num_weights = sum(linear.num_weights for linear in linears) + num_other_weights
        self._recorder.count_compute(
            flops=2 * num_tokens * num_weights + 2 * pairs * num_heads * widths,
            weight_bytes=num_weights * linears[0].itemsize if num_tokens else 0,
            kv_bytes=cache.position_bytes * batch.num_positions_read(self._window),
        )


class Attention(PagedHeads):
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
        super().__init__(model, layer, rotary, recorder)
        tp, tp_rank, dim = mesh.layout.tp, mesh.at.tp_rank, model.head_dim
        self._mesh = mesh
        self.value_dim = self._head_dim = dim
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
        self._query_key_value = Linear(weight, bias)
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
        self._sinks = None
        if model.attention_sinks:
            self._sinks = source.take(layer_name(layer, "sinks"), own_heads, torch.float32)
        # A bias is added once, not by every rank of the group whose partial sums are added up.
        output_bias = take("output_bias") if model.output_bias and tp_rank == 0 else None
        self._output = Linear(take("output", heads), output_bias)

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
            query_key = rms_norm_heads_(query_key, self._head_norms, self._eps)
        query_key = self._rotary.rotate_(query_key, batch.rotation(self._rotary))
        query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        attended = self.attend_paged(batch, cache, query, key, value, self._sinks)
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


class LatentAttention(PagedHeads):
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
        super().__init__(model, layer, rotary, recorder)
        latent = model.latent
        assert latent is not None, "the model has latent attention"
        self._latent = latent
        self.value_dim = latent.kv_lora_rank
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
            self._query = Linear(take("query", rows(model.head_dim)))
        else:
            self._query_a = Linear(take("query_a")), take_norm("query_a_norm")
            self._query = Linear(take("query_b", rows(model.head_dim)))
        self._kv_a, self._kv_a_norm = Linear(take("kv_a")), take_norm("kv_a_norm")
        width = latent.qk_nope_head_dim + latent.v_head_dim
        kv_b = take("kv_b", rows(width)).view(self.num_heads, width, latent.kv_lora_rank)
        self._key_b = kv_b[:, : latent.qk_nope_head_dim]  # [heads, nope, rank]
        self._value_b = kv_b[:, latent.qk_nope_head_dim :]  # [heads, v_head_dim, rank]
        output_bias = take("output_bias") if model.output_bias and mesh.at.tp_rank == 0 else None
        self._output = Linear(take("output", rows(latent.v_head_dim)), output_bias)

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
            hidden = rms_norm(self._query_a[0](x), self._query_a[1], eps)
            linears.append(self._query_a[0])
        rotation = batch.rotation(self._rotary)
        query = self._query(hidden).view(len(x), self.num_heads, self._head_dim)
        query = self._rotary.rotate_(query, rotation)
        compressed, rotated = torch.split(
            self._kv_a(x), [latent.kv_lora_rank, latent.qk_rope_head_dim], dim=1
        )
        compressed = rms_norm(compressed, self._kv_a_norm, eps)
        rotated = self._rotary.rotate_(rotated[:, None], rotation)
        key = torch.cat([compressed[:, None], rotated], dim=-1)  # [num_tokens, 1, rank + rope]
        nope, rope = torch.split(query, [latent.qk_nope_head_dim, latent.qk_rope_head_dim], dim=-1)
        in_latent = torch.einsum("thn,hnr->thr", nope, self._key_b)
        query = torch.cat([in_latent, rope], dim=-1)
        attended = self.attend_paged(batch, cache, query, key, key[..., :0])
        out = torch.einsum("thr,hvr->thv", attended, self._value_b)
        num_weights = self._key_b.numel() + self._value_b.numel()
        self._count(batch, cache, linears, self.num_heads, num_weights)
        return self._output(out.flatten(1))
        yield  # a generator like Attention's, though it never waits
