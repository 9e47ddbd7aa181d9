"""How many bytes a rank needs, before anything is allocated."""

from collections import Counter
from dataclasses import dataclass, replace
from math import ceil

from expertlane.balance.deployed import Placements, placements_of
from expertlane.cost.number_types import NumberTypes
from expertlane.errors import CapacityError
from expertlane.plan.held_weights import Params, embedding_params, head_params, layer_params
from expertlane.schedule.limits import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.partition import partition
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
