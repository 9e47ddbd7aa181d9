"""How many bytes a rank needs, before anything is allocated."""

from dataclasses import dataclass
from math import ceil

from expertlane.balance.placement import Placement
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.partition import partition
from expertlane.spec.workload import Workload

# Interpreter, torch and process groups of one rank that shares its libraries with others:
# the proportional set size of an idle rank, rounded up.
RANK_OVERHEAD_BYTES = 64 * 10**6


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: weights, key/value cache, the largest batch's activations, the process."""

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    overhead_bytes: int = RANK_OVERHEAD_BYTES

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.overhead_bytes


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
        + num_experts * 2 * model.hidden_size * inner
    )
    params = num_layers * per_layer
    if at.pp_rank == 0:
        params += model.vocab_size * model.hidden_size
    if at.pp_rank == layout.pp - 1:
        vocab = len(partition(model.vocab_size, layout.tp)[at.tp_rank])
        params += vocab * model.hidden_size + model.hidden_size
    in_replica = partition(workload.num_sequences, layout.replicas)[at.replica]
    # Token-expert pairs that reach this rank when routing is even; they come from the whole stage.
    num_pairs_in_stage = len(in_replica) * workload.prompt_len * model.num_experts_per_tok
    num_pairs = ceil(num_pairs_in_stage * num_experts / model.num_experts)
    num_seqs = len(partition(len(in_replica), layout.dp)[at.dp_rank])
    kv_width = 2 * model.attention_size // layout.tp
    num_tokens = num_seqs * workload.prompt_len
    # Hidden states, queries, keys and values; the tokens of the experts with their inner layer.
    num_values = num_tokens * (4 * model.hidden_size + 2 * kv_width)
    num_values += num_pairs * (2 * model.hidden_size + inner)
    return RankMemory(
        weight_bytes=params * itemsize,
        kv_bytes=num_layers * num_seqs * workload.max_len * kv_width * itemsize,
        activation_bytes=num_values * itemsize,
    )


def largest_rank_memory(
    model: ModelConfig, layout: Layout, workload: Workload, itemsize: int
) -> RankMemory:
    """The needs of the rank that needs most."""
    return max(
        (rank_memory(model, layout, workload, rank, itemsize) for rank in range(layout.world_size)),
        key=lambda memory: memory.total_bytes,
    )
