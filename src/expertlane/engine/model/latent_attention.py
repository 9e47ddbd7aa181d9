"""Multi-head latent attention (MLA): keys and values come from a short latent, which is cached.

Queries are projected into the latent's space, so that one common key and value serve all heads
(DeepSeek-AI 2024); or, for prompts where that takes fewer FLOPs, the latents of all positions are
expanded to keys and values of each head.
"""

import torch
from torch import Tensor

from expertlane.cost.step.batch_sizes import pairs_and_positions
from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.attention import PagedHeads, RotaryEmbedding
from expertlane.engine.model.forward_batch import ExpandedSequences, ForwardBatch
from expertlane.engine.model.weights import WeightSource, taker_of
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.products import HeadsLinear, Linear
from expertlane.spec.model import ModelConfig
from expertlane.spec.tensors import layer_name


class LatentAttention(PagedHeads):
    """Latent attention; the latent, which all heads share, is replicated over `tp`."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        source: WeightSource,
        mesh: ParallelMesh,
        rotary: RotaryEmbedding,
    ) -> None:
        latent = model.latent
        assert latent is not None, "the model has latent attention"
        super().__init__(model, layer, source, mesh, rotary, latent.kv_lora_rank)
        take, ops, num_heads = taker_of(source, layer), self._ops, self._num_heads

        def linear(part: str, rows: range | None = None) -> Linear:
            return source.linear(layer, layer_name(layer, part), rows)

        self._latent = latent
        self._query_a: tuple[Linear, Tensor] | None = None
        query = "query"
        if latent.q_lora_rank is not None:
            query = "query_b"
            norm = take("query_a_norm", dtype=torch.float32)
            self._query_a = linear("query_a"), norm
            self._linears.append(self._query_a[0])
        self._query = linear(query, self._of_heads(model.head_dim))
        self._kv_a = linear("kv_a")
        self._kv_a_norm = take("kv_a_norm", dtype=torch.float32)
        width = latent.qk_nope_head_dim + latent.v_head_dim
        own = self._of_heads(width)

        def of_heads() -> tuple[HeadsLinear, HeadsLinear, HeadsLinear]:
            kv_b = take("kv_b", own).view(num_heads, width, latent.kv_lora_rank)
            parts = [latent.qk_nope_head_dim, latent.v_head_dim]
            key_b, value_b = torch.split(kv_b, parts, dim=1)
            to_keys = ops.heads_linear(key_b)  # where products are packed, held twice
            return ops.heads_linear(key_b.transpose(1, 2)), ops.heads_linear(value_b), to_keys

        made = source.once(layer, ("kv_b", own), of_heads)
        self._to_latent, self._from_latent, self._to_keys = made
        self._linears += [self._query, self._kv_a]
        self._of_heads_params = AttentionParams(latent.v_head_dim, self._params.scale)

    def tensors(self) -> list[Tensor]:
        """All weights, for checksums."""
        heads = (self._to_latent, self._from_latent, self._to_keys)
        norms = [self._kv_a_norm, *([] if self._query_a is None else [self._query_a[1]])]
        return [*super().tensors(), *norms, *(each.weight for each in heads)]

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """Heads, key_dim and value_dim of the cache."""
        return 1, self._latent.kv_lora_rank + self._latent.qk_rope_head_dim, 0

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Tensor]:
        """Attend from the batch's new tokens to all positions up to each.

        Args:
            x: [num_tokens, hidden_size]; all tokens of the data-parallel rank's part.

        Returns:
            [num_tokens, hidden_size]; a partial sum over the tensor-parallel group.
        """
        latent, eps = self._latent, self._latent.norm_eps
        hidden = x
        if self._query_a is not None:
            hidden = self._ops.rms_norm(self._query_a[0](x), self._query_a[1], eps)
        query = self._query(hidden).view(len(x), self._num_heads, self._head_dim)
        query = self._rotary.rotate_(query, batch)
        compressed, rotated = torch.split(
            self._kv_a(x), [latent.kv_lora_rank, latent.qk_rope_head_dim], dim=1
        )
        compressed = self._ops.rms_norm(compressed, self._kv_a_norm, eps)
        rotated = self._rotary.rotate_(rotated[:, None], batch)
        key = torch.cat([compressed[:, None], rotated], dim=-1)  # [num_tokens, 1, rank + rope]
        parts = batch.latent_parts(latent)
        if not parts.expanded:
            out = self._attend_in_latent(query, key, cache, parts.in_latent)
        else:
            out = query.new_empty(*query.shape[:2], latent.v_head_dim)
            for part in parts.expanded:
                of_part = query[part.tokens], key[part.tokens]
                out[part.tokens] = self._attend_expanded(*of_part, cache, part)
            if parts.in_latent.batch.num_seqs:
                rest = parts.rest
                attended = self._attend_in_latent(query[rest], key[rest], cache, parts.in_latent)
                out[rest] = attended
        self._count(batch, cache)
        return self._output(out.flatten(1))
        yield  # a generator like Attention's, though it never waits

    def _attend_in_latent(
        self, query: Tensor, key: Tensor, cache: KVCache, pages: PagedBatch
    ) -> Tensor:
        """Attend in the latent's space: [num_tokens, num_heads, v_head_dim].

        Args:
            query: [num_tokens, num_heads, head_dim].
            key: [num_tokens, 1, rank + rope]; the new tokens' latents.
        """
        latent = self._latent
        nope, rope = torch.split(query, [latent.qk_nope_head_dim, latent.qk_rope_head_dim], dim=-1)
        query = query.new_empty(*query.shape[:2], key.shape[2])
        self._to_latent(nope, out=query[..., : latent.kv_lora_rank])
        query[..., latent.kv_lora_rank :] = rope
        attended = self._ops.paged_attention(query, key, key[..., :0], cache, pages, self._params)
        out = query.new_empty(*query.shape[:2], latent.v_head_dim)
        return self._from_latent(attended, out=out)

    def _attend_expanded(
        self, query: Tensor, key: Tensor, cache: KVCache, part: ExpandedSequences
    ) -> Tensor:
        """Attend with keys and values of each head: [num_tokens, num_heads, v_head_dim].

        Args:
            query: [num_tokens, num_heads, head_dim].
            key: [num_tokens, 1, rank + rope]; the new tokens' latents.
        """
        cache.clear(part.in_cache.begun_blocks)
        key, _ = cache.write(part.in_cache.slots, key, key[..., :0])
        room = KVCache.of(*self._room_for(part.num_positions, query))
        cached = part.in_cache.cached_slots
        if len(cached):
            of_cached = (x[: len(cached), :, 0] for x in (room.keys, room.values))
            self._expand(cache.keys_at(cached), *of_cached)
        keys, values = (x[:, :, 0] for x in self._room_for(len(query), query))
        self._expand(key, keys, values)
        return self._ops.paged_attention(
            query, keys, values, room, part.in_room, self._of_heads_params
        )

    def _room_for(self, num_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers of keys and values [num_positions, num_heads, 1, dim]: blocks of one position."""
        keys, values = (
            like.new_empty(num_positions, self._num_heads, 1, dim)
            for dim in (self._head_dim, self._latent.v_head_dim)
        )
        return keys, values

    def _expand(self, latents: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill keys and values [n, num_heads, dim] from latents [n, 1, rank + rope]."""
        rank, nope = self._latent.kv_lora_rank, self._latent.qk_nope_head_dim
        for_heads = latents[..., :rank].expand(-1, self._num_heads, -1)
        self._to_keys(for_heads, out=keys[..., :nope])
        keys[..., nope:] = latents[..., rank:]
        self._from_latent(for_heads, out=values)

    def _count(self, batch: ForwardBatch, cache: KVCache) -> None:
        """Count FLOPs and bytes; latents are expanded for every position, not only new tokens."""
        recorder = self._mesh.recorder
        if not recorder.is_recording:
            return
        new, cached = batch.batch.num_scheduled_tokens, batch.batch.num_computed_tokens
        pairs, positions = pairs_and_positions(new, cached, None)
        expanded = batch.latent_parts(self._latent).is_expanded
        num_tokens, num_absorbed, num_made, pairs_in_latent, pairs_of_heads = (
            int(each.sum())
            for each in (
                new,
                new[~expanded],
                positions[expanded],
                pairs[~expanded],
                pairs[expanded],
            )
        )
        plain, of_latent = self._linears, (self._to_latent, self._from_latent)
        products = num_tokens * sum(each.num_weights for each in plain)
        products += (num_absorbed + num_made) * sum(each.num_weights for each in of_latent)
        products += self._num_heads * (
            pairs_in_latent * (cache.keys.shape[-1] + self._params.value_dim)
            + pairs_of_heads * (self._head_dim + self._latent.v_head_dim)
        )
        num_reads = (num_absorbed > 0) + (num_made > 0)
        num_bytes = (num_tokens > 0) * sum(each.num_bytes for each in plain)
        num_bytes += num_reads * sum(each.num_bytes for each in of_latent)
        recorder.count_compute(
            flops=2 * products,
            weight_bytes=num_bytes,
            kv_bytes=cache.position_bytes * int(positions.sum()),
        )
