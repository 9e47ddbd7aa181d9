"""Causal attention over a key/value cache, for the heads one rank holds.

`Attention` is multi-head or grouped-query. `LatentAttention` (DeepSeek-AI 2024) caches a short
latent, from which keys and values come: queries are projected into its space, so that one common
key and value serve all heads; or, for prompts where that takes fewer FLOPs, the latents of all
positions are expanded to keys and values of each head. Both give a partial sum over the
tensor-parallel group.
"""

import math

import torch
from torch import Tensor

from expertlane.cost.step.batch_sizes import pairs_and_positions
from expertlane.engine.comm.collectives import Steps
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.forward_batch import ExpandedSequences, ForwardBatch
from expertlane.engine.model.weights import WeightSource, taker_of
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.kv_cache import AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.narrow import reordered, side_by_side
from expertlane.engine.ops.products import HeadsLinear, Linear
from expertlane.engine.ops.step import AttentionCall, AttentionWeights
from expertlane.spec.mixers import RopeScaling
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage
from expertlane.spec.tensors import layer_name


class RotaryEmbedding:
    """Rotary position embedding (Su et al. 2021), with the RoPE scaling that checkpoints name.

    The last `rotary_dim` values of queries and keys are rotated by their positions. The pairs are
    (i, i + rotary_dim / 2), or (2i, 2i + 1) where the model interleaves them. Angles are rounded
    to float32 as transformers does: the error of another rounding grows with the position.
    """

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        positions = torch.arange(model.max_position_embeddings, dtype=torch.float32)
        angles = positions[:, None] * rotary_frequencies(model)
        scaling = model.rope_scaling
        factor = scaling.attention_factor if scaling is not None else 1.0
        cos, sin = angles.cos() * factor, angles.sin() * factor
        # Both halves of a pair side by side: [positions, 1, rotary_dim].
        self.cos = torch.cat([cos, cos], dim=1).to(device)[:, None]
        self.sin = torch.cat([-sin, sin], dim=1).to(device)[:, None]
        self.interleave = model.rope_interleave
        self._ops = backend_for(device)

    def rotate_(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Rotate a batch's queries or keys, maybe in place.

        Args:
            x: [num_tokens, num_heads, head_dim]; not to be used afterwards.
        """
        if batch.rotation is None:  # the same in all layers
            positions = batch.pages.positions
            batch.rotation = (
                self.cos.index_select(0, positions),
                self.sin.index_select(0, positions),
            )
        return self._ops.rotate_(x, *batch.rotation, interleave=self.interleave)


def rotary_frequencies(model: ModelConfig) -> Tensor:
    """Rotary frequencies [rotary_dim / 2] float32, in radians a position."""
    dims = torch.arange(0, model.rotary_dim, 2, dtype=torch.float32) / model.rotary_dim
    periods: Tensor = model.rope_theta**dims  # positions a radian
    frequencies = 1.0 / periods
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(periods, scaling, model.rotary_dim, model.rope_theta)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided, 1: left as it is
    return (1 - kept) * (frequencies / scaling.factor) + kept * frequencies


def _yarn(periods: Tensor, scaling: RopeScaling, rotary_dim: int, theta: float) -> Tensor:
    def dim_of(num_turns: float) -> float:
        length = scaling.original_max_position_embeddings
        turns = math.log(length / (num_turns * 2 * math.pi))
        return rotary_dim * turns / (2 * math.log(theta))

    first, last = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    ramp = torch.arange(len(periods), dtype=torch.float32) - first
    divided = (ramp / max(last - first, 1e-3)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * divided + 1.0 / periods * (1 - divided)


def _rotated_last(rows: Tensor, head_dim: int, rotary_dim: int) -> Tensor:
    """Rows [num_heads · head_dim, …] with each head's first `rotary_dim` rows moved to its end.

    Backends rotate the last values of a head; dot products do not depend on their order.
    """
    if rotary_dim == head_dim:
        return rows
    by_head = rows.view(-1, head_dim, *rows.shape[1:])
    return by_head.roll(-rotary_dim, dims=1).view(rows.shape)


class PagedHeads:
    """Base of both kinds of attention: the rank's heads, output projection, and counters.

    Args:
        value_dim: width of a head's value in the cache.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        source: WeightSource,
        mesh: ParallelMesh,
        rotary: RotaryEmbedding,
        value_dim: int,
    ) -> None:
        take = taker_of(source, layer)
        self._mesh, self._rotary, self._dtype = mesh, rotary, source.dtype
        self._ops = backend_for(source.device)
        self._head_dim = model.head_dim
        self._num_heads = model.num_attention_heads // mesh.layout.tp
        sinks = take("sinks", self._of_heads(1), torch.float32) if model.attention_sinks else None
        window = model.window_of_layer(layer)
        self._params = AttentionParams(value_dim, model.softmax_scale, window, sinks)
        # The output's bias is added by the first rank of the tensor-parallel group alone.
        has_bias = model.output_bias and mesh.at.tp_rank == 0
        inputs = self._of_heads(model.attention_output_size // model.num_attention_heads)
        self._output = source.linear(
            *(layer, layer_name(layer, "output"), inputs),
            lambda: take("output_bias") if has_bias else None,
        )
        self._linears: list[Linear | HeadsLinear] = [self._output]  # to be counted

    def _of_heads(self, width: int) -> range:
        """The rows or columns of this rank's heads, `width` for each head."""
        first = self._mesh.at.tp_rank * self._num_heads
        return range(first * width, (first + self._num_heads) * width)

    def tensors(self) -> list[Tensor]:
        """All weights, for checksums."""
        sinks = self._params.sinks
        own = [tensor for linear in self._linears for tensor in linear.tensors()]
        return own if sinks is None else [*own, sinks]

    def part(self, norm: Tensor | None) -> AttentionCall | None:
        """The whole attention in one call; None without such a call.

        Args:
            norm: weight of the norm before it, made a part of the call, if given.
        """
        return None

    def compute(
        self,
        part: AttentionCall,
        x: Tensor,
        batch: ForwardBatch,
        cache: KVCache,
        *,
        adds_input: bool,
    ) -> Tensor:
        """Attend by the call `part`, and count it; x is added to the result or not."""
        out = part(x, cache, batch.pages, adds_input=adds_input)
        self._count(batch, cache)
        return out

    def _count(self, batch: ForwardBatch, cache: KVCache) -> None:
        """Count FLOPs and bytes.

        Linears have 2·m·n·k FLOPs, attention 2 × pairs × heads × (key_dim + value_dim).
        """
        recorder = self._mesh.recorder
        if not recorder.is_recording:
            return
        num_tokens, window = batch.batch.num_tokens, self._params.window
        pairs, positions = batch.pairs_and_positions(window)
        widths = cache.keys.shape[-1] + self._params.value_dim
        num_weights = sum(each.num_weights for each in self._linears)
        num_bytes = sum(each.num_bytes for each in self._linears)
        recorder.count_compute(
            flops=2 * num_tokens * num_weights + 2 * pairs * self._num_heads * widths,
            weight_bytes=num_bytes if num_tokens else 0,
            kv_bytes=cache.position_bytes * positions,
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
    ) -> None:
        super().__init__(model, layer, source, mesh, rotary, model.head_dim)
        take, dim, tp = taker_of(source, layer), model.head_dim, mesh.layout.tp
        self._num_kv_heads = max(1, model.num_kv_heads // tp)
        self._kv_copies = max(1, tp // model.num_kv_heads)  # ranks that hold the same kv head
        first_kv = mesh.at.tp_rank // self._kv_copies * self._num_kv_heads
        heads = self._of_heads(dim)
        kv_heads = range(first_kv * dim, (first_kv + self._num_kv_heads) * dim)
        self._eps = model.rms_norm_eps
        sizes = model.attention_size, model.kv_size  # of queries and keys of all ranks
        self._sizes = torch.tensor(sizes, device=source.device)
        parts = {"query": heads, "key": kv_heads, "value": kv_heads}

        def ordered(rows: Tensor) -> Tensor:
            return _rotated_last(rows, dim, model.rotary_dim)

        def query_key_value() -> Linear:
            bias = None
            if model.qkv_bias:
                biases = [take(f"{part}_bias", rows) for part, rows in parts.items()]
                bias = torch.cat([*map(ordered, biases[:2]), biases[2]])
            matrices = [source.matrix(layer_name(layer, part), own) for part, own in parts.items()]
            if model.rotary_dim < dim:
                matrices[:2] = [reordered(matrix, ordered) for matrix in matrices[:2]]
            return self._ops.linear(side_by_side(matrices), bias)

        key = "query_key_value", heads, kv_heads
        self._query_key_value = source.once(layer, key, query_key_value)
        self._linears.insert(0, self._query_key_value)
        self._norms: tuple[Tensor, Tensor] | None = None
        self._head_norms: Tensor | None = None  # of query and key heads, [heads, head_dim]
        if model.qk_norm == "full":
            query_norm, key_norm = take("query_norm", heads), take("key_norm", kv_heads)
            self._norms = ordered(query_norm), ordered(key_norm)
        elif model.qk_norm == "head":
            norms = [ordered(take(part).float()) for part in ("query_norm", "key_norm")]
            counts = self._num_heads, self._num_kv_heads
            self._head_norms = torch.cat(
                [norm.expand(count, dim) for norm, count in zip(norms, counts, strict=True)]
            )

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """Heads, key_dim and value_dim of the cache."""
        return self._num_kv_heads, self._head_dim, self._head_dim

    def tensors(self) -> list[Tensor]:
        """All weights, for checksums."""
        own = [*super().tensors(), *(self._norms or ())]
        return own if self._head_norms is None else [*own, self._head_norms]

    def part(self, norm: Tensor | None) -> AttentionCall | None:
        """The whole attention in one call; None without such a call."""
        if self._norms is not None:  # norms over the heads of all ranks need a transfer
            return None
        return self._ops.attention_part(
            AttentionWeights(
                norm=norm,
                eps=self._eps,
                query_key_value=self._query_key_value,
                head_norms=self._head_norms,
                output=self._output,
                num_heads=self._num_heads,
                num_kv_heads=self._num_kv_heads,
                head_dim=self._head_dim,
                cos=self._rotary.cos,
                sin=self._rotary.sin,
                interleave=self._rotary.interleave,
                params=self._params,
            ),
            self._dtype,
        )

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Tensor]:
        """Attend from the batch's new tokens to all positions up to each.

        Args:
            x: [num_tokens, hidden_size]; all tokens of the data-parallel rank's part.

        Returns:
            [num_tokens, hidden_size].
        """
        num_turned = self._num_heads + self._num_kv_heads
        projected = self._query_key_value(x)
        heads = projected.view(len(x), num_turned + self._num_kv_heads, self._head_dim)
        query_key, value = heads[:, :num_turned], heads[:, num_turned:]
        if self._norms is not None:
            query_key = yield from self._norm_all_heads(query_key, self._norms)
        elif self._head_norms is not None:
            query_key = self._ops.rms_norm_heads_(query_key, self._head_norms, self._eps)
        query_key = self._rotary.rotate_(query_key, batch)
        query, key = query_key[:, : self._num_heads], query_key[:, self._num_heads :]
        attended = self._ops.paged_attention(query, key, value, cache, batch.pages, self._params)
        self._count(batch, cache)
        return self._output(attended.flatten(1))

    def _norm_all_heads(self, query_key: Tensor, norms: tuple[Tensor, Tensor]) -> Steps[Tensor]:
        """RMS norms of queries and of keys, each over the heads of all ranks together."""
        heads = [self._num_heads, self._num_kv_heads]
        query, key = (part.flatten(1).float() for part in torch.split(query_key, heads, dim=1))
        squares = torch.stack(
            [query.square().sum(dim=1), key.square().sum(dim=1) / self._kv_copies], dim=1
        )
        tp = self._mesh.tp
        if tp.size > 1:
            recorder = self._mesh.recorder
            layer = recorder.layer
            recorder.enter(Stage.COLLECTIVES, layer)
            width = squares.shape[1] * squares.itemsize
            gathered = yield from tp.gathered(
                squares, [len(squares)] * tp.size, metadata_bytes=width
            )
            squares = gathered.view(tp.size, -1, 2).sum(dim=0) if len(squares) else squares
            recorder.enter(Stage.ATTENTION, layer)
        factors = torch.rsqrt(squares / self._sizes + self._eps)
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
        buffer = KVCache.of(*self._buffers_for(part.num_positions, query))
        cached = part.in_cache.cached_slots
        if len(cached):
            of_cached = (x[: len(cached), :, 0] for x in (buffer.keys, buffer.values))
            self._expand(cache.keys_at(cached), *of_cached)
        keys, values = (x[:, :, 0] for x in self._buffers_for(len(query), query))
        self._expand(key, keys, values)
        return self._ops.paged_attention(
            query, keys, values, buffer, part.in_buffer, self._of_heads_params
        )

    def _buffers_for(self, num_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
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
