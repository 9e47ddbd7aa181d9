"""How many bytes a rank needs, before anything is allocated."""

from dataclasses import dataclass
from math import ceil

from expertlane.balance.placement import Placement
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.partition import partition
from expertlane.spec.workload import Workload

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


def rank_memory(
    model: ModelConfig, layout: Layout, workload: Workload, rank: int, itemsize: int
) -> RankMemory:
    """What `rank` holds when the whole workload is resident and is prefilled in one step.

    Activations are those of an even routing; the shares of a skewed one are not known beforehand.

    Args:
        itemsize: bytes of a weight or of a cached value.
    """
    at = layout.coordinates(rank)
    num_layers = len(layout.layers_of_stage(model.num_hidden_layers, at.pp_rank))
    num_experts = len(Placement.linear(model.num_experts, layout.ep).experts_of_rank[at.ep_rank])
    inner = len(partition(model.moe_intermediate_size, layout.etp)[at.etp_rank])
    per_layer = (
        model.num_attention_params // layout.tp
        + model.num_experts * model.hidden_size
        + 2 * model.hidden_size
        + num_experts * model.num_expert_params * inner // model.moe_intermediate_size
    )
    params = num_layers * per_layer
    largest_matrix = model.hidden_size * max(inner, model.attention_size // layout.tp)
    if at.pp_rank == 0:
        embedding = model.vocab_size * model.hidden_size
        params += embedding
        largest_matrix = max(largest_matrix, embedding)
    if at.pp_rank == layout.pp - 1:
        head = len(partition(model.vocab_size, layout.tp)[at.tp_rank]) * model.hidden_size
        params += head + model.hidden_size
        largest_matrix = max(largest_matrix, head)
    in_replica = partition(workload.num_sequences, layout.replicas)[at.replica]
    # Token-expert pairs that reach this rank when routing is even; they come from the whole stage.
    num_pairs_in_stage = len(in_replica) * workload.prompt_len * model.num_experts_per_tok
    num_pairs = ceil(num_pairs_in_stage * num_experts / model.num_experts)
    num_seqs = len(partition(len(in_replica), layout.dp)[at.dp_rank])
    if model.latent is None:
        kv_width = 2 * max(model.kv_size // layout.tp, model.head_dim)
    else:  # the latent is replicated
        kv_width = model.latent.kv_lora_rank + model.latent.qk_rope_head_dim
    num_tokens = num_seqs * workload.prompt_len
    # Hidden states, queries, keys and values; the tokens of the experts with their inner layer.
    num_values = num_tokens * (4 * model.hidden_size + 2 * kv_width)
    num_values += num_pairs * (2 * model.hidden_size + inner)
    return RankMemory(
        weight_bytes=params * itemsize,
        kv_bytes=num_layers * num_seqs * workload.max_len * kv_width * itemsize,
        activation_bytes=num_values * itemsize,
        loading_bytes=largest_matrix * (_FLOAT32_BYTES + itemsize),
    )


def largest_rank_memory(
    model: ModelConfig, layout: Layout, workload: Workload, itemsize: int
) -> RankMemory:
    """The needs of the rank that needs most."""
    return max(
        (rank_memory(model, layout, workload, rank, itemsize) for rank in range(layout.world_size)),
        key=lambda memory: memory.total_bytes,
    )
