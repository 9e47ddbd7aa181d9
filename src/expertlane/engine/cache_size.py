"""The size of the cache by what is free after a step of the largest shape, in place of a count."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from expertlane.engine.commands import (
    Deploy,
    DescribeMachine,
    HeldBytes,
    MeasureStep,
    RankMachine,
)
from expertlane.engine.pool import RankPool
from expertlane.errors import CapacityError
from expertlane.memory import FREE_SHARE, RankMemory, size_text, too_little
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.schedule.request import Limits
from expertlane.spec.dispatch import DispatchTable
from expertlane.spec.layout import Layout, partition
from expertlane.spec.members import Members
from expertlane.spec.names import Phase
from expertlane.spec.sampling import SamplingParams, SamplingState


def largest_step(layout: Layout, limits: Limits, replica: int = 0) -> StepPlan:
    """As many sequences as may run, which together have as many new tokens as a step may hold.

    All positions are in the cache's first block: what is computed matters to nobody. Every sequence
    is sampled with limits, for which logits are copied and sorted.
    """
    num_seqs = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    most = min(limits.max_num_batched_tokens, num_seqs * limits.max_model_len)
    lengths = np.array([len(part) for part in partition(most, num_seqs)], dtype=np.int64)
    width = -(-int(lengths.max()) // limits.block_size)

    def batch(dp_rank: int) -> Batch:
        return Batch(
            seq_ids=np.arange(num_seqs) + dp_rank * num_seqs,
            num_scheduled_tokens=lengths,
            num_computed_tokens=np.zeros(num_seqs, dtype=np.int64),
            token_ids=np.arange(most, dtype=np.int64) % limits.vocab_size,
            block_tables=np.zeros((num_seqs, width), dtype=np.int32),
            yields_token=np.ones(num_seqs, dtype=np.bool_),
        )

    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
    nothing = np.zeros(0, dtype=np.int64)
    sampled = SamplingState(params, 0, np.zeros(1, dtype=np.int64), nothing)
    return StepPlan(
        *(0, replica, Phase.PREFILL, (tuple(batch(dp_rank) for dp_rank in range(layout.dp)),)),
        admitted=dict.fromkeys(range(num_seqs * layout.dp), sampled),
        record=False,
    )


def measured_limits(
    pool: RankPool,
    deploy: Deploy,
    members: Members,
    limits: Limits,
    log: Callable[[str], None],
) -> Limits:
    """The limits with as many blocks, up to `num_blocks`, as every rank has room for.

    The ranks' stages are built, each with a cache of one block.

    Raises:
        CapacityError: not even one sequence of `max_model_len` fits; with both numbers.
    """
    layout, spec, numbers = members.layout, deploy.spec, members.numbers
    one_block = msgspec.structs.replace(deploy, num_blocks=1, graphs=None)
    held = pool.call(one_block)
    step_bytes = max(_step_bytes(pool, deploy, members, limits))
    seen = pool.call(DescribeMachine())
    room = [room_of(seen[number], held[number], step_bytes, layout) for number in numbers]
    of_graphs = 0 if deploy.graphs is None else 1  # a block for padding
    blocks = [int(each.cache_bytes // each.block_bytes) - of_graphs for each in room]
    rank = int(np.argmin(blocks))
    fewest = min(-(-limits.max_model_len // limits.block_size), limits.num_blocks)
    num_blocks = min(limits.num_blocks, blocks[rank])
    if num_blocks < fewest:
        need = room[rank].with_blocks(fewest)
        free_bytes = need.weight_bytes + need.activation_bytes + max(0, room[rank].cache_bytes)
        raise CapacityError(too_little(spec.model, layout, need, free_bytes))
    need, machine = room[rank].with_blocks(num_blocks), seen[numbers[rank]]
    left = room[rank].cache_bytes - need.kv_bytes + (1 - FREE_SHARE) * machine.memory_bytes
    log(
        f"memory of a rank: weights {size_text(need.weight_bytes)}, KV cache "
        f"{size_text(need.kv_bytes)} ({num_blocks} blocks), activations "
        f"{size_text(need.activation_bytes)} (measured), free {size_text(left)} of "
        f"{size_text(machine.memory_bytes)}"
    )
    return replace(limits, num_blocks=num_blocks)


class Room(msgspec.Struct):
    """What a rank has taken, and has left for its cache.

    Attributes:
        step_bytes: of the largest step on the rank that most tokens reach.
        block_bytes: of a block, in all layers.
        cache_bytes: negative where not even a step fits.
    """

    weight_bytes: int
    step_bytes: int
    block_bytes: int
    cache_bytes: float

    def with_blocks(self, num_blocks: int) -> RankMemory:
        """In the parts of a memory count."""
        return RankMemory(self.weight_bytes, num_blocks * self.block_bytes, self.step_bytes, 0)


def room_of(machine: RankMachine, held: HeldBytes, step_bytes: int, layout: Layout) -> Room:
    """What is left on a rank: its share of what is free, but for a reserve of the whole device.

    Args:
        machine: seen once weights are loaded, while no step runs.
        held: with a cache of one block, which makes room for the others.
    """
    reserve = (1 - FREE_SHARE) * machine.memory_bytes
    own_bytes = (machine.free_bytes - reserve) / machine.num_sharing(layout.world_size)
    return Room(held.weight_bytes, step_bytes, held.kv_bytes, own_bytes - step_bytes)


def _step_bytes(pool: RankPool, deploy: Deploy, members: Members, limits: Limits) -> Sequence[int]:
    """Of each rank."""
    options, spec = deploy.options, deploy.spec
    if (table := options.fixed_table) is not None:
        tables: tuple[DispatchTable, ...] = (table,)
    else:
        modes = options.of_phase(Phase.DECODE).modes(spec.layout, spec.ranks_per_node)
        tables = tuple(DispatchTable.fixed(mode.form, mode.overlap) for mode in modes)
    commands = []
    for replica in range(members.layout.replicas):
        plan = largest_step(members.layout, limits, replica)
        commands += [
            (MeasureStep(step, tables), members.of_dp_rank(replica, dp_rank))
            for dp_rank, step in enumerate(plan.of_dp_ranks())
        ]
    return pool.collect(pool.submit_each(commands))
