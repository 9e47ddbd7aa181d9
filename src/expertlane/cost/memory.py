"""Bytes that a rank needs, known before anything is allocated, and that pools send each other."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod
from typing import NamedTuple

import numpy as np

from expertlane.balance.holding import Holding, Placements, Slices
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.step.operation import Floats, NumberTypes, weight_bytes
from expertlane.errors import CapacityError
from expertlane.results.record import PoolRecord
from expertlane.schedule.request import Limits
from expertlane.spec.layout import Layout, part_of, partition
from expertlane.spec.mixers import STREAMED, Mixing
from expertlane.spec.model import LayerKind, ModelConfig
from expertlane.spec.tensors import (
    FINAL_NORM,
    HEAD,
    cut_dim,
    expert_name,
    expert_shapes,
    is_matrix,
    layer_name,
    layer_shapes,
    tensor_shape,
)
from expertlane.spec.workload import NOTHING_SHARED, SharedPrefixes, Workload


class KVTransfers:
    """Seconds of a request's KV transfer from the prefill pool to the decode pool.

    The ranks of the data-parallel rank that prefilled send equal parts of what each pipeline stage
    holds; each rank that will decode gets all that it has to hold, copies of shared heads too, and
    with decode context parallelism only its share of the positions.

    Args:
        prefill, decode: the layouts of both pools.
        remote: the pools are on different nodes.
    """

    def __init__(
        self,
        model: ModelConfig,
        types: NumberTypes,
        prefill: Layout,
        decode: Layout,
        links: LinkModel,
        *,
        remote: bool = True,
    ) -> None:
        self._links = links
        self._remote = remote
        of_position, of_sequence = _of_stages(model, types, prefill, 1) / prefill.tp
        self._sent_bytes = np.repeat(of_position, prefill.tp)
        self._sent_state = np.repeat(of_sequence, prefill.tp)
        of_position, of_sequence = _of_stages(model, types, decode, decode.tp, decode.dcp)
        self._received_bytes = np.repeat(of_position / decode.dcp, decode.tp)
        self._received_state = np.repeat(of_sequence, decode.tp)

    def seconds(self, num_tokens: int) -> Floats:
        """[B]; seconds to transfer a prompt's keys and values, and its states."""
        sent, received = num_tokens * self._sent_bytes, num_tokens * self._received_bytes
        sent, received = sent + self._sent_state, received + self._received_state
        return self._links.kv_transfer(sent, received, self._remote).bounds[:, 0]


def _of_stages(
    model: ModelConfig, types: NumberTypes, layout: Layout, tp: int, dcp: int = 1
) -> Floats:
    """[2, pp]; bytes that a rank of each stage keeps of a position, and of a sequence besides."""
    layers = [layout.layers_of_stage(model.num_hidden_layers, rank) for rank in range(layout.pp)]
    kept = [kept_bytes(model, types, tp, each, dcp=dcp) for each in layers]
    return np.array(kept, dtype=np.float64).T


class KeptBytes(NamedTuple):
    """Bytes that a rank keeps in some layers.

    Attributes:
        position: for each position, in pages; a fraction where positions share an entry.
        sequence: for each sequence, whatever its length: states, and windows where no other
            positions are kept.
    """

    position: float
    sequence: int


def kept_bytes(
    model: ModelConfig,
    types: NumberTypes,
    tp: int,
    layers: range,
    *,
    dcp: int = 1,
    num_states: int = 1,
) -> KeptBytes:
    """Bytes of the cache that a rank keeps for some layers, with heads cut by `tp`.

    Args:
        dcp: ranks that share the positions of a window. States have no positions and are not
            divided by it, nor are the bytes of a position.
        num_states: states of a sequence in each layer with a state.
    """
    kept = [
        (num, _kept_in_layer(model, types, tp, mixing, dcp, num_states))
        for mixing, num in Counter(map(model.mixing_of_layer, layers)).items()
        if mixing is not None
    ]
    return KeptBytes(
        sum(num * each.position for num, each in kept),
        sum(num * each.sequence for num, each in kept),
    )


def _kept_in_layer(
    model: ModelConfig, types: NumberTypes, tp: int, mixing: Mixing, dcp: int, num_states: int
) -> KeptBytes:
    if mixing.kind == "state":
        return KeptBytes(0, num_states * held_state_bytes(model, types, tp))
    window = _kept_window(model, mixing)
    if window is None:
        has_index = mixing.choice == "own"
        return KeptBytes(held_kv_bytes(model, types, tp, has_index=has_index), 0)
    of_position = held_kv_bytes(model, types, tp, has_window=True)
    of_window = ceil(window / dcp) * of_position
    compressed, entries = model.compressed, mixing.entries
    if compressed is None or entries is None:
        return KeptBytes(0, of_window)
    indexer = model.indexer if entries == "chosen" else None
    of_index = 0 if indexer is None else indexer.position_bytes(types.activation_bytes)
    # Positions of an entry are kept one by one, so that rejected drafts are just dropped.
    of_state = compressed.state_bytes(entries, model.head_dim, indexer)
    return KeptBytes((of_position + of_index) / compressed.rate(entries), of_window + of_state)


def _kept_window(model: ModelConfig, mixing: Mixing) -> int | None:
    """Positions of a sequence that a layer keeps, if only those of its window, in whole blocks.

    So serving engines do; the caches of models that our engine runs hold all positions. A window
    may begin inside a block.
    """
    if mixing.window is None or (model.window_heads is None and model.compressed is None):
        return None
    return (ceil(mixing.window / BLOCK_SIZE) + 1) * BLOCK_SIZE


def held_kv_width(model: ModelConfig, tp: int) -> int:
    """Values of a position in a layer's cache that a rank holds: a head at least, a whole latent.

    Args:
        tp: ranks that share the heads; 1 for all of them.
    """
    return _held_values(model, tp)[0]


def held_kv_bytes(
    model: ModelConfig,
    types: NumberTypes,
    tp: int,
    *,
    has_window: bool = False,
    has_index: bool = False,
) -> int:
    """Bytes of a position that a rank keeps in a layer, with scales.

    Args:
        has_window: the layer has a window.
        has_index: the layer has an indexer, whose key is counted too.
    """
    of_index = 0
    if has_index:
        assert model.indexer is not None, "checked"
        of_index = model.indexer.position_bytes(types.activation_bytes)
    return types.cached_bytes(*_held_values(model, tp, has_window=has_window)) + of_index


def held_state_bytes(model: ModelConfig, types: NumberTypes, tp: int) -> int:
    """Bytes that a rank keeps of a sequence in a layer with a state; 0 where there are none."""
    return 0 if model.state is None else model.state.state_bytes(tp, types.activation_bytes)


def _held_values(model: ModelConfig, tp: int, *, has_window: bool = False) -> tuple[int, int]:
    """Values of a position that a rank holds, and in how many keys and values (or latents)."""
    if model.latent is not None:
        return model.latent.kv_lora_rank + model.latent.qk_rope_head_dim, 1
    if model.compressed is not None:
        return model.head_dim, 1
    num_heads = len(Slices(tp).kv_heads(model, has_window=has_window))
    return num_heads * (model.head_dim + model.value_dim), 2 * num_heads


BLOCK_SIZE = 16
STEP_TOKENS = 16_384  # tokens in a comparison's step, over all ranks
_FLOAT32_BYTES = 4
RANK_STEP_TOKENS = 8192  # tokens in a data-parallel rank's prefill step, by default
FREE_SHARE = 0.9  # share of a device's memory; the rest is for the framework and uncounted memory


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weight_bytes: held all the time.
        kv_bytes: of the whole cache, held all the time: pages, and states of sequences.
        activation_bytes: activations of the largest batch.
        loading_bytes: the largest matrix while it is drawn, before there is a cache.
    """

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    loading_bytes: int

    @property
    def total_bytes(self) -> int:
        """The most at any one time."""
        return self.weight_bytes + max(self.kv_bytes + self.activation_bytes, self.loading_bytes)


@dataclass(frozen=True)
class Capacity:
    """Sequences that the fullest rank can hold.

    Attributes:
        memory: of the fullest rank, with one sequence of full length.
        free_bytes: bytes that a rank may take.
        max_seqs: sequences of full length that a data-parallel rank holds at once; 0 where not
            even weights, activations and one sequence fit.
        num_blocks: blocks of a data-parallel rank's KV cache, not rounded.
    """

    layout: Layout
    memory: RankMemory
    free_bytes: float
    max_seqs: int
    num_blocks: float

    @property
    def num_resident(self) -> int:
        """Sequences of full length that all ranks hold at once."""
        return self.max_seqs * self.layout.dp * self.layout.replicas

    def record(self) -> PoolRecord:
        """The record of the pool, without a number of sequences."""
        return PoolRecord(
            weight_bytes=self.memory.weight_bytes,
            activation_bytes=self.memory.activation_bytes,
            sequence_bytes=self.memory.kv_bytes,
            allowed_bytes=int(self.free_bytes),
        )


@dataclass(frozen=True, eq=False)
class PlacedModel:
    """A model as its ranks hold it.

    Attributes:
        placements: [num_hidden_layers].
        num_drafts: draft tokens that a step verifies together. Each writes a state of its own,
            since the next step continues from the last accepted one.
    """

    model: ModelConfig
    layout: Layout
    types: NumberTypes
    placements: Placements
    num_drafts: int = 0

    def with_drafts(self, num_drafts: int) -> "PlacedModel":
        """This model with its drafting layers; experts placed as in the last layer with any."""
        if not num_drafts:
            return self
        placed = next((each for each in reversed(self.placements) if each is not None), None)
        kinds = self.model.draft_kinds
        of_drafts = tuple(placed if kind.mlp == "experts" else None for kind in kinds)
        return replace(
            self,
            model=self.model.with_draft(),
            placements=(*self.placements, *of_drafts),
            num_drafts=num_drafts,
        )

    def rank_memory(self, limits: Limits, rank: int, num_seqs: int = 0) -> RankMemory:
        """Bytes of a rank: weights, the whole cache, and the activations of the largest step.

        Activations are those of an even routing; the shares of a skewed one are not known before.

        Args:
            num_seqs: sequences whose states take room beside the blocks.
        """
        model, layout, types = self.model, self.layout, self.types
        holding = Holding(model, layout, rank, self.placements)
        own, layers = holding.slices, holding.layers
        of_layer = [
            len(placed.experts_of_rank[holding.at.ep_rank]) if placed else 0
            for placed in self.placements
        ]
        inner = len(part_of(model.moe_intermediate_size, own.etp, own.etp_rank))
        num_bytes = sum(
            count * _layer_bytes(model, types, own, kind, num_experts)
            for (kind, num_experts), count in Counter(
                (model.kind_of_layer(layer), of_layer[layer]) for layer in layers
            ).items()
        )
        outside = {name: _held(model, own, name) for name in holding.outside_layers}
        num_bytes += sum(_num_bytes(name, each, types) for name, each in outside.items())
        largest_matrix = model.hidden_size * max(inner, model.attention_size // layout.tp)
        largest_matrix = max(
            largest_matrix, *(prod(map(len, each)) for each in outside.values()), 0
        )
        # Token-expert pairs that reach this rank when routing is even; from the whole stage.
        num_tokens = limits.max_num_batched_tokens
        num_pairs_in_stage = layout.dp * num_tokens * model.num_experts_per_tok
        num_slots = max((placed.num_slots for placed in self.placements if placed), default=1)
        num_pairs = ceil(num_pairs_in_stage * max(of_layer) / num_slots)
        kv_width = held_kv_width(model, layout.tp)
        # Hidden states, queries, keys and values; the tokens of the experts with their inner layer.
        num_values = num_tokens * ((3 + model.num_streams) * model.hidden_size + 2 * kv_width)
        num_values += num_pairs * (2 * model.hidden_size + inner)
        num_positions = limits.num_blocks * limits.block_size
        kept = self._kept(rank)
        if not kept.position and limits.state_blocks:  # states of all in other stages
            most = limits.num_blocks // (limits.state_blocks + 1)
            num_seqs = max(num_seqs, min(most, limits.max_num_seqs))
        of_positions = ceil(ceil(num_positions / layout.dcp) * kept.position)
        kv_bytes = of_positions + num_seqs * kept.sequence
        return RankMemory(
            weight_bytes=num_bytes,
            kv_bytes=kv_bytes,
            activation_bytes=num_values * types.activation_bytes,
            loading_bytes=largest_matrix * _FLOAT32_BYTES
            + int(weight_bytes(largest_matrix, types.weights)),
        )

    def fit_cache(self, limits: Limits, free_bytes: float, cache_share: float = 1.0) -> Limits:
        """The limits with as many blocks, up to `num_blocks`, as every rank has room for.

        Args:
            free_bytes: free bytes of a rank.
            cache_share: of what is left beside weights and activations, how much the cache may
                take.

        Raises:
            CapacityError: not even one sequence of `max_model_len` fits; with both numbers.
        """
        fewest = min(ceil(limits.max_model_len / limits.block_size), limits.num_blocks)
        of_state = self.state_blocks(limits)
        limits = replace(limits, state_blocks=of_state)
        num_blocks = limits.num_blocks + of_state * limits.max_num_seqs
        fewest, smallest = fewest + of_state, replace(limits, num_blocks=fewest)
        for rank in range(self.layout.replica_size):  # replicas are alike
            need = self.rank_memory(smallest, rank, 1)
            if need.total_bytes > free_bytes:
                raise CapacityError(too_little(self.model, self.layout, need, free_bytes))
            of_cache = cache_share * (free_bytes - need.weight_bytes - need.activation_bytes)
            if not of_state:
                room = int(of_cache * fewest // need.kv_bytes)
            elif block_bytes := self._block_bytes(limits, rank):
                room = int(of_cache // block_bytes)
            else:  # a stage of states alone; a sequence takes one block of the others at least
                room = int(of_cache // max(need.kv_bytes, 1)) * (of_state + 1)
            num_blocks = min(num_blocks, max(fewest, room))
        return replace(limits, num_blocks=num_blocks)

    def state_blocks(self, limits: Limits) -> int:
        """Blocks of a rank's cache with as much room as a sequence's states, on every stage."""
        return max(
            -(-self._kept(rank).sequence // block_bytes) if block_bytes else 0
            for rank in self._firsts()
            for block_bytes in (self._block_bytes(limits, rank),)
        )

    def _firsts(self) -> range:
        """The first rank of each stage."""
        return range(0, self.layout.replica_size, self.layout.stage_size)

    def _kept(self, rank: int) -> KeptBytes:
        held = Holding(self.model, self.layout, rank, self.placements)
        sizes = {"dcp": self.layout.dcp, "num_states": 1 + self.num_drafts}
        return kept_bytes(self.model, self.types, self.layout.tp, held.layers, **sizes)

    def _block_bytes(self, limits: Limits, rank: int) -> int:
        """Bytes of a block of the paged cache on a rank, all its layers together."""
        return ceil(ceil(limits.block_size / self.layout.dcp) * self._kept(rank).position)

    def fullest(self, limits: Limits) -> RankMemory:
        """The memory of the fullest rank: the first ranks of the stages hold most."""
        needs = (self.rank_memory(limits, rank) for rank in self._firsts())
        return max(needs, key=lambda need: need.total_bytes)

    def capacity(
        self,
        device_bytes: float,
        full_len: int,
        num_batched_tokens: int,
        prefixes: SharedPrefixes = NOTHING_SHARED,
    ) -> Capacity:
        """Sequences that fit on the fullest rank: the first ranks of the stages hold most.

        Args:
            full_len: positions of a sequence when it is done.
            num_batched_tokens: tokens of a data-parallel rank's largest step.
            prefixes: shared by sequences; the cache holds each once.
        """
        free = FREE_SHARE * device_bytes
        blocks_per_seq = ceil(full_len / BLOCK_SIZE)
        limits = Limits(
            vocab_size=self.model.vocab_size,
            max_model_len=full_len,
            num_blocks=blocks_per_seq,
            max_num_batched_tokens=num_batched_tokens,
        )
        found = []
        limits = replace(limits, state_blocks=self.state_blocks(limits))
        blocks_per_seq += limits.state_blocks
        for rank in self._firsts():
            need = self.rank_memory(limits, rank, 1)
            cache_bytes = free - need.weight_bytes - need.activation_bytes
            room = cache_bytes // max(need.kv_bytes, 1)
            num_blocks = cache_bytes / max(need.kv_bytes, 1) * blocks_per_seq
            if prefixes.num:  # each is kept with its state
                num_blocks = max(num_blocks - prefixes.num * limits.state_blocks, 0.0)
                room = prefixes.num_sharing(num_blocks, blocks_per_seq - prefixes.num_blocks)
            fits = need.total_bytes <= free
            max_seqs = int(room) if fits else 0
            found.append(Capacity(self.layout, need, free, max_seqs, max(num_blocks, 0.0)))
        return min(found, key=lambda each: (each.max_seqs, -each.memory.total_bytes))


@cache
def _layer_bytes(
    model: ModelConfig, types: NumberTypes, own: Slices, kind: LayerKind, num_experts: int
) -> int:
    """Bytes of a rank's part of a layer's weights, scales included.

    Args:
        num_experts: experts that the rank holds, or holds a slice of.
    """
    num_of = {layer_name(0, part): 1 for part in layer_shapes(model, kind)}
    if num_experts:
        num_of |= {expert_name(0, 0, part): num_experts for part in expert_shapes(model)}
    return sum(
        num * _num_bytes(name, _held(model, own, name), types) for name, num in num_of.items()
    )


def _held(model: ModelConfig, own: Slices, name: str) -> list[range]:
    """The part of a tensor that a rank holds, by dimension."""
    held = [range(size) for size in tensor_shape(model, name)]
    held[cut_dim(name)] = own.of_tensor(model, name)
    return held


_WIDE = {
    *("attention_norm", "moe_norm", "query_a_norm", "kv_a_norm", FINAL_NORM),
    *("attention_norm_bias", "moe_norm_bias", f"{FINAL_NORM}_bias"),
    *("sinks", "router", "router_bias", "correction_bias", "decay_log", "step_bias", "skip"),
    *("index_weights", "index_norm", "index_norm_bias"),
    *("latent_norm", "entry_norm", "entry_bias", "index_entry_norm", "index_entry_bias"),
    *(f"{block}_streams{end}" for block in STREAMED for end in ("", "_bias", "_scale")),
    "experts_of_token",  # int32
}


def _num_bytes(name: str, held: list[range], types: NumberTypes) -> int:
    """Bytes of a part of a tensor: norms and routers are float32; only matrices are narrow."""
    part, num_values = name.rpartition(".")[2], prod(map(len, held))
    if part in _WIDE:
        number_type = "float32"
    elif not is_matrix(name) or (name == HEAD and not types.narrow_head):
        number_type = types.kept
    elif types.inputs_of_scale is not None:
        rows, inputs = held
        groups = ceil(inputs.stop / types.inputs_of_scale) - inputs.start // types.inputs_of_scale
        return num_values + (len(rows) * groups * _FLOAT32_BYTES if inputs else 0)
    elif ".experts." in name:
        number_type = types.of_part("experts")
    else:
        is_mlp = ".dense." in name or ".shared." in name
        number_type = types.of_part("mlp" if is_mlp else "attention")
    return int(weight_bytes(num_values, number_type))


def workload_limits(workload: Workload, model: ModelConfig, layout: Layout) -> Limits:
    """A scheduler's sizes for a fixed workload, its whole cache resident.

    Prompts and decodes are kept apart, so that each can be measured; and no prefix is shared, so
    that every deployment computes every token. All deployments take the same number of tokens in
    a step, whatever the number of their data-parallel ranks.
    """
    num_seqs = len(
        partition(len(partition(workload.num_sequences, layout.replicas)[0]), layout.dp)[0]
    )
    num_blocks = ceil(workload.max_len / BLOCK_SIZE) + 1  # one more: the scheduler's reserve
    num_tokens = min(STEP_TOKENS // (layout.replicas * layout.dp), num_seqs * workload.prompt_len)
    return Limits(
        vocab_size=model.vocab_size,
        max_model_len=workload.max_len,
        num_blocks=num_seqs * num_blocks,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=max(num_tokens, num_seqs),
        max_num_seqs=num_seqs,
        prefix_caching=False,
        phases_apart=True,
    )


def prefill_step_tokens(workload: Workload, layout: Layout, step_tokens: int | None = None) -> int:
    """New tokens of a data-parallel rank's prefill step: all its prompts, or as many as allowed.

    Args:
        step_tokens: allowed over the whole system; 8,192 on each data-parallel rank if None.
    """
    num_caches = layout.replicas * layout.dp
    allowed = RANK_STEP_TOKENS if step_tokens is None else max(1, step_tokens // num_caches)
    return min(allowed, workload.prompt_len * ceil(workload.num_sequences / num_caches))


def too_little(model: ModelConfig, layout: Layout, need: RankMemory, free_bytes: float) -> str:
    """The error line where not even one sequence fits."""
    return (
        f"{model.name} as {layout} needs {size_text(need.total_bytes)} per rank (weights "
        f"{size_text(need.weight_bytes)}, KV cache of one sequence {size_text(need.kv_bytes)}, "
        f"activations {size_text(need.activation_bytes)}) but {size_text(free_bytes)} of memory "
        "are free"
    )


def size_text(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    unit, name = (10**12, "TB") if num_bytes >= 10**12 else (10**9, "GB")
    return f"{num_bytes / unit:.3g} {name}"
