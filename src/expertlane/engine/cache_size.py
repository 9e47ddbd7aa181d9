"""The KV cache's size: the memory left beside weights, the largest step, and CUDA graphs."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from expertlane.cost.memory import FREE_SHARE, RankMemory, size_text, too_little
from expertlane.engine.ranks.commands import (
    Deploy,
    DescribeMachine,
    HeldBytes,
    MeasureStep,
    RankMachine,
    RecordGraphs,
    SetDispatch,
)
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import CapacityError
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.schedule.request import Limits
from expertlane.spec.dispatch import DispatchTable
from expertlane.spec.layout import Layout, Members, partition
from expertlane.spec.names import Phase
from expertlane.spec.sampling import SamplingParams, SamplingState


def largest_step(layout: Layout, limits: Limits, replica: int = 0) -> StepPlan:
    """The prefill step that takes most memory: most sequences, and most new tokens together.

    All positions are in the cache's first block, since the result is not used. Every sequence is
    sampled with top-k and top-p, for which logits are copied and sorted.
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

    The ranks' stages are built, each with a cache of one block, and graphs are recorded on it:
    their memory does not depend on how many blocks there are.

    Raises:
        CapacityError: not even one sequence of `max_model_len` fits; it names the bytes needed and
            those free.
    """
    layout, spec, numbers = members.layout, deploy.spec, members.numbers
    held = pool.call(msgspec.structs.replace(deploy, num_blocks=1))
    step_bytes = max(_step_bytes(pool, deploy, members, limits))
    seen = pool.call(DescribeMachine())
    has_graphs = deploy.graphs is not None and held[numbers[0]].has_graphs
    graph_bytes = [0] * len(seen)
    if has_graphs:
        graph_bytes = _graph_bytes(pool, deploy, members, seen)
    room = [room_of(seen[n], held[n], step_bytes, graph_bytes[n], layout) for n in numbers]
    blocks = [int(each.cache_bytes // each.block_bytes) - has_graphs for each in room]
    rank = int(np.argmin(blocks))
    fewest = min(-(-limits.max_model_len // limits.block_size), limits.num_blocks)
    num_blocks = min(limits.num_blocks, blocks[rank])
    if num_blocks < fewest:
        need = room[rank].with_blocks(fewest)
        free_bytes = need.weight_bytes + need.activation_bytes + max(0, room[rank].cache_bytes)
        raise CapacityError(
            too_little(spec.model, layout, need, free_bytes)
            + _of_graphs("; of activations, {} are for CUDA graphs (--cuda-graphs off)", room[rank])
        )
    need, machine = room[rank].with_blocks(num_blocks), seen[numbers[rank]]
    left = room[rank].cache_bytes - need.kv_bytes + (1 - FREE_SHARE) * machine.memory_bytes
    log(
        f"memory of a rank: weights {size_text(need.weight_bytes)}, KV cache "
        f"{size_text(need.kv_bytes)} ({num_blocks} blocks), activations "
        f"{size_text(room[rank].step_bytes)} (measured), "
        f"{_of_graphs('CUDA graphs {}, ', room[rank])}free {size_text(left)} of "
        f"{size_text(machine.memory_bytes)}"
    )
    return replace(limits, num_blocks=num_blocks)


def _of_graphs(text: str, room: "Room") -> str:
    """The text with the size of the graphs put in; empty where there are none."""
    return text.format(size_text(room.graph_bytes)) if room.graph_bytes else ""


class Room(msgspec.Struct):
    """The memory that a rank has in use, and what is left for its KV cache.

    Attributes:
        step_bytes: activations of the largest step, on the rank that most tokens reach.
        graph_bytes: memory of all CUDA graphs.
        block_bytes: one block of the cache, over all layers.
        cache_bytes: what is left for the cache; negative where not even a step fits.
    """

    weight_bytes: int
    step_bytes: int
    graph_bytes: int
    block_bytes: int
    cache_bytes: float

    def with_blocks(self, num_blocks: int) -> RankMemory:
        """The rank's memory with a cache of so many blocks."""
        own_bytes = self.step_bytes + self.graph_bytes
        return RankMemory(self.weight_bytes, num_blocks * self.block_bytes, own_bytes, 0)


def room_of(
    machine: RankMachine, held: HeldBytes, step_bytes: int, graph_bytes: int, layout: Layout
) -> Room:
    """Memory left for a rank's cache: its share of what is free, less a reserve of the device.

    Args:
        machine: described once weights are loaded, before steps run or are recorded.
        held: measured with a cache of one block (two with graphs).
        step_bytes: activations of the largest step.
        graph_bytes: memory of this rank's CUDA graphs.
    """
    reserve = (1 - FREE_SHARE) * machine.memory_bytes
    own_bytes = (machine.free_bytes - reserve) / machine.num_sharing(layout.world_size)
    block_bytes = held.kv_bytes // (1 + held.has_graphs)
    left_bytes = own_bytes - step_bytes - graph_bytes
    return Room(held.weight_bytes, step_bytes, graph_bytes, block_bytes, left_bytes)


def _graph_bytes(
    pool: RankPool, deploy: Deploy, members: Members, seen: Sequence[RankMachine]
) -> list[int]:
    """[num_ranks]; memory of all graphs, estimated by recording the two largest.

    The largest allocates the memory for values, which all graphs share. Each other one is taken to
    need as much of its own as the second largest.

    Args:
        seen: [num_ranks]; described before any is recorded.
    """
    assert deploy.graphs is not None, "there are some"
    numbers, sizes = members.numbers, deploy.graphs.sizes
    tables = [each for each in _tables(deploy) if not all(mode.overlap for mode in each.modes)]
    firsts, others = np.zeros((2, len(seen)), dtype=np.int64)
    for table in tables:
        pool.call(SetDispatch(table), ranks=numbers)
        taken = [np.zeros_like(firsts)]
        for size in sizes[:-3:-1]:
            pool.call(RecordGraphs(size, (table.modes[0].form,)), ranks=numbers)
            now = pool.call(DescribeMachine())
            less = [
                (before.free_bytes - after.free_bytes) // before.num_sharing(len(numbers))
                for before, after in zip(seen, now, strict=True)
            ]
            taken.append(np.maximum(less, taken[-1]))
        firsts = np.maximum(firsts, taken[1])
        others = np.maximum(others, taken[-1] - taken[1])
    total: list[int] = (firsts + others * (len(tables) * len(sizes) - 1)).tolist()
    return total


def _tables(deploy: Deploy) -> tuple[DispatchTable, ...]:
    """One dispatch table for each mode that decode steps may run in."""
    options, spec = deploy.options, deploy.spec
    if (table := options.fixed_table) is not None:
        return (table,)
    modes = options.of_phase(Phase.DECODE).modes(spec.layout, spec.ranks_per_node)
    return tuple(DispatchTable.fixed(mode.form, mode.overlap) for mode in modes)


def _step_bytes(pool: RankPool, deploy: Deploy, members: Members, limits: Limits) -> Sequence[int]:
    """[world_size]; activations of the largest step on each rank, over all dispatch modes."""
    tables, commands = _tables(deploy), []
    for replica in range(members.layout.replicas):
        plan = largest_step(members.layout, limits, replica)
        commands += [
            (MeasureStep(step, tables), members.of_dp_rank(replica, dp_rank))
            for dp_rank, step in enumerate(plan.of_dp_ranks())
        ]
    return pool.collect(pool.submit_each(commands))
