"""How many bytes a rank needs, before anything is allocated."""

from collections import Counter
from dataclasses import dataclass, replace
from math import ceil

from expertlane.balance.placement_file import Placements, placements_of
from expertlane.cost.number_types import ITEM_BYTES, NumberTypes
from expertlane.errors import CapacityError
from expertlane.schedule.limits import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Coordinates, Layout, partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.model_parts import LatentAttention
from expertlane.spec.workload import Workload

BLOCK_SIZE = 16
STEP_TOKENS = 16_384  # of a comparison, over all ranks
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weight_bytes, kv_bytes: held all the time.
        activation_bytes: of the largest batch.
        loading_bytes: of the largest matrix while it is drawn, before there is a cache.
    """

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    loading_bytes: int

    @property
    def total_bytes(self) -> int:
        """The most at any one time."""
        return self.weight_bytes + max(self.kv_bytes + self.activation_bytes, self.loading_bytes)


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


def fit_cache(
    model: ModelConfig,
    layout: Layout,
    limits: Limits,
    types: NumberTypes,
    free_bytes: float,
    cache_share: float = 1.0,
    placements: Placements | None = None,
) -> Limits:
    """The same with as many blocks of the cache, up to `num_blocks`, as every rank has room for.

    Args:
        free_bytes: of a rank.
        cache_share: of what is left beside weights and activations, how much the cache may take.
        placements: as for `rank_memory`.

    Raises:
        CapacityError: not even one sequence of `max_model_len` fits; with both numbers.
    """
    fewest = min(ceil(limits.max_model_len / limits.block_size), limits.num_blocks)
    smallest = replace(limits, num_blocks=fewest)
    num_blocks = limits.num_blocks
    for rank in range(layout.pp * layout.dp * layout.tp):  # replicas are alike
        need = rank_memory(model, layout, smallest, rank, types, placements)
        if need.total_bytes > free_bytes:
            raise CapacityError(
                f"{model.name} as {layout} needs {size_text(need.total_bytes)} on a rank (weights "
                f"{size_text(need.weight_bytes)}, key/value cache of one sequence "
                f"{size_text(need.kv_bytes)}, activations {size_text(need.activation_bytes)}) but "
                f"{size_text(free_bytes)} of memory are free for it"
            )
        of_cache = cache_share * (free_bytes - need.weight_bytes - need.activation_bytes)
        num_blocks = min(num_blocks, max(fewest, int(of_cache * fewest // need.kv_bytes)))
    return replace(limits, num_blocks=num_blocks)


def size_text(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    unit, name = (10**12, "TB") if num_bytes >= 10**12 else (10**9, "GB")
    return f"{num_bytes / unit:.3g} {name}"


def rank_memory(
    model: ModelConfig,
    layout: Layout,
    limits: Limits,
    rank: int,
    types: NumberTypes,
    placements: Placements | None = None,
) -> RankMemory:
    """What `rank` holds: weights, the whole cache, and the activations of the largest step.

    Activations are those of an even routing; the shares of a skewed one are not known beforehand.

    Args:
        placements: [num_hidden_layers]; linear ones without copies if not given.
    """
    placements = placements or placements_of(model, layout, Options())
    at = layout.coordinates(rank)
    layers = layout.layers_of_stage(model.num_hidden_layers, at.pp_rank)
    of_layer = [
        len(placed.experts_of_rank[at.ep_rank]) if (placed := placements[layer]) else 0
        for layer in range(model.num_hidden_layers)
    ]
    inner = len(partition(model.moe_intermediate_size, layout.etp)[at.etp_rank])
    kinds = Counter((model.is_dense(layer), of_layer[layer]) for layer in layers)
    params = Params()
    for (is_dense, num_experts), count in kinds.items():
        of_layer_kind = layer_params(model, layout, at, is_dense=is_dense, num_experts=num_experts)
        params += of_layer_kind * count
    largest_matrix = model.hidden_size * max(inner, model.attention_size // layout.tp)
    if at.pp_rank == 0:
        embedding = embedding_params(model)
        params += embedding
        largest_matrix = max(largest_matrix, embedding.kept)
    if at.pp_rank == layout.pp - 1:
        head = head_params(model, layout, at)
        params += head
        largest_matrix = max(largest_matrix, head.kept)
    # Token-expert pairs that reach this rank when routing is even; they come from the whole stage.
    num_tokens = limits.max_num_batched_tokens
    num_pairs_in_stage = layout.dp * num_tokens * model.num_experts_per_tok
    num_slots = max((placed.num_slots for placed in placements if placed is not None), default=1)
    num_pairs = ceil(num_pairs_in_stage * max(of_layer) / num_slots)
    if model.latent is None:
        kv_width = 2 * max(model.kv_size // layout.tp, model.head_dim)
    else:  # the latent is replicated
        kv_width = model.latent.kv_lora_rank + model.latent.qk_rope_head_dim
    # Hidden states, queries, keys and values; the tokens of the experts with their inner layer.
    num_values = num_tokens * (4 * model.hidden_size + 2 * kv_width)
    num_values += num_pairs * (2 * model.hidden_size + inner)
    num_positions = limits.num_blocks * limits.block_size
    return RankMemory(
        weight_bytes=params.num_bytes(types),
        kv_bytes=len(layers) * num_positions * kv_width * types.kv_bytes,
        activation_bytes=num_values * types.activation_bytes,
        loading_bytes=largest_matrix * (_FLOAT32_BYTES + types.weight_bytes),
    )


@dataclass(frozen=True)
class Params:
    """Numbers of parameters, by the type they are held in.

    Attributes:
        matrices: in the type of weights; those that float8 checkpoints quantise.
        kept: in `NumberTypes.kept`: embedding, head, biases, and what latent attention absorbs.
        wide: in float32: norms and routers.
    """

    matrices: int = 0
    kept: int = 0
    wide: int = 0

    def __add__(self, other: "Params") -> "Params":
        return Params(
            self.matrices + other.matrices, self.kept + other.kept, self.wide + other.wide
        )

    def __mul__(self, times: int) -> "Params":
        return Params(times * self.matrices, times * self.kept, times * self.wide)

    def num_bytes(self, types: NumberTypes) -> int:
        """Scales of float8 are not counted."""
        return (
            self.matrices * types.weight_bytes
            + self.kept * ITEM_BYTES[types.kept]
            + self.wide * ITEM_BYTES["float32"]
        )


def embedding_params(model: ModelConfig) -> Params:
    """Of a rank of the first stage; it is not cut."""
    return Params(kept=model.vocab_size * model.hidden_size)


def head_params(model: ModelConfig, layout: Layout, at: Coordinates) -> Params:
    """Of a rank of the last stage: its rows, also where the head is the embedding; final norm."""
    rows = len(partition(model.vocab_size, layout.tp)[at.tp_rank])
    return Params(kept=rows * model.hidden_size, wide=model.hidden_size)


def layer_params(
    model: ModelConfig, layout: Layout, at: Coordinates, *, is_dense: bool, num_experts: int
) -> Params:
    """Of a layer.

    Args:
        num_experts: that the rank holds, or holds a slice of.
    """
    params = Params(wide=2 * model.hidden_size) + _attention(model, layout.tp, at.tp_rank)
    if is_dense:
        return params + _mlp(model, model.intermediate_size, layout, at)
    routing, hidden = model.routing, model.hidden_size
    num_biases = int(routing.router_bias) + int(routing.correction_bias)
    router = Params(wide=model.num_experts * (hidden + num_biases))
    shared = _mlp(model, model.shared_expert_intermediate_size, layout, at)
    gate = Params(kept=hidden if model.shared_expert_gate else 0)
    return params + router + shared + gate + _expert(model, layout, at) * num_experts


def _attention(model: ModelConfig, tp: int, tp_rank: int) -> Params:
    heads = model.num_attention_heads // tp
    if model.latent is None:
        params = _grouped_query(model, heads, max(1, model.num_kv_heads // tp))
    else:
        params = _latent(model, model.latent, heads)
    has_bias = model.output_bias and tp_rank == 0  # partial sums are added up
    return params + Params(kept=model.hidden_size if has_bias else 0)


def _grouped_query(model: ModelConfig, heads: int, kv_heads: int) -> Params:
    """Key/value heads fewer than `tp` are held by several ranks each."""
    hidden, dim = model.hidden_size, model.head_dim
    width = (heads + 2 * kv_heads) * dim
    kept = width if model.qkv_bias else 0
    if model.qk_norm == "head":
        kept += 2 * dim
    elif model.qk_norm == "full":
        kept += (heads + kv_heads) * dim
    matrices = hidden * width + hidden * heads * dim
    return Params(matrices, kept, wide=heads if model.attention_sinks else 0)


def _latent(model: ModelConfig, latent: LatentAttention, heads: int) -> Params:
    """Both projections down are whole on every rank."""
    hidden, rank = model.hidden_size, latent.kv_lora_rank
    matrices = hidden * (rank + latent.qk_rope_head_dim) + hidden * heads * latent.v_head_dim
    wide, query_in = rank, hidden
    if latent.q_lora_rank is not None:
        matrices += hidden * latent.q_lora_rank
        wide, query_in = wide + latent.q_lora_rank, latent.q_lora_rank
    matrices += query_in * heads * model.head_dim
    absorbed = rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    return Params(matrices, absorbed, wide)


def _mlp(model: ModelConfig, inner: int, layout: Layout, at: Coordinates) -> Params:
    """A dense MLP or the shared expert."""
    return Params(model.num_mlp_params(len(partition(inner, layout.tp)[at.tp_rank])))


def _expert(model: ModelConfig, layout: Layout, at: Coordinates) -> Params:
    inner = len(partition(model.moe_intermediate_size, layout.etp)[at.etp_rank])
    kept = 0
    if model.expert_bias:
        kept = (2 if model.gated_mlp else 1) * inner
        kept += model.hidden_size if at.etp_rank == 0 else 0  # partial sums are added up
    return Params(model.num_mlp_params(inner), kept)


_RANK_STEP_TOKENS = 8192  # of a data-parallel rank's prefill step, if nothing else is said
FREE_SHARE = 0.9  # of a device's memory; the rest is for the framework and what is not counted


@dataclass(frozen=True)
class Capacity:
    """Of the fullest rank.

    Attributes:
        memory: with one sequence of full length.
        free_bytes: what a rank may take.
        max_seqs: sequences of full length that a data-parallel rank holds at once; 0 where not
            even weights, activations and one sequence fit.
    """

    memory: RankMemory
    free_bytes: float
    max_seqs: int


def prefill_step_tokens(
    layout: Layout, num_sequences: int, prompt_len: int, step_tokens: int | None = None
) -> int:
    """Of a data-parallel rank's prefill step, at most: all its prompts, or as many as allowed.

    Args:
        num_sequences: over the whole system.
        step_tokens: allowed over the whole system; 8,192 on each data-parallel rank if None.
    """
    num_caches = layout.replicas * layout.dp
    allowed = _RANK_STEP_TOKENS if step_tokens is None else max(1, step_tokens // num_caches)
    return min(allowed, prompt_len * ceil(num_sequences / num_caches))


def capacity(
    model: ModelConfig,
    layout: Layout,
    placements: Placements,
    types: NumberTypes,
    device_bytes: float,
    full_len: int,
    num_batched_tokens: int,
) -> Capacity:
    """Of the first ranks of the first and the last stage, which hold most.

    Args:
        num_batched_tokens: of a data-parallel rank's largest step.
        full_len: positions of a sequence in the end.
    """
    free = FREE_SHARE * device_bytes
    limits = Limits(
        vocab_size=model.vocab_size,
        max_model_len=full_len,
        num_blocks=ceil(full_len / BLOCK_SIZE),
        max_num_batched_tokens=num_batched_tokens,
    )
    fewest: Capacity | None = None
    for rank in {0, (layout.pp - 1) * layout.stage_size}:
        need = rank_memory(model, layout, limits, rank, types, placements)
        seqs = 0
        if need.total_bytes <= free:
            seqs = int((free - need.weight_bytes - need.activation_bytes) // need.kv_bytes)
        if fewest is None or seqs < fewest.max_seqs:
            fewest = Capacity(need, free, seqs)
    assert fewest is not None, "there is a rank"
    return fewest
