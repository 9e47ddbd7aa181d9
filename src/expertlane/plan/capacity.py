"""How many sequences the ranks of a modelled deployment have memory for."""

from dataclasses import dataclass
from math import ceil

from expertlane.balance.deployed import Placements
from expertlane.cost.number_types import NumberTypes
from expertlane.plan.memory import BLOCK_SIZE, RankMemory, rank_memory
from expertlane.schedule.limits import Limits
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

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
