"""Warm-up before the first request: the cache's size, timing dispatch modes, recording graphs.

The KV cache gets the memory left beside weights, the largest step, and CUDA graphs.
Where `dispatch` or `overlap` is `auto`, steps are timed once on this deployment's own layers. All
graphs are recorded ahead, so that no request waits for one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import hypot, sqrt
from statistics import mean, quantiles
from typing import Any, TypeVar

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
from expertlane.schedule.plan import Batch, Runner, StepPlan
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import (
    DispatchForm,
    DispatchMode,
    DispatchRow,
    DispatchTable,
    GraphLimits,
)
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
    use = [memory_use(seen[n], held[n], step_bytes, graph_bytes[n], layout) for n in numbers]
    blocks = [int(each.cache_bytes // each.block_bytes) - has_graphs for each in use]
    rank = int(np.argmin(blocks))
    fewest = min(-(-limits.max_model_len // limits.block_size), limits.num_blocks)
    num_blocks = min(limits.num_blocks, blocks[rank])
    if num_blocks < fewest:
        need = use[rank].with_blocks(fewest)
        free_bytes = need.weight_bytes + need.activation_bytes + max(0, use[rank].cache_bytes)
        raise CapacityError(
            too_little(spec.model, layout, need, free_bytes)
            + _of_graphs("; of activations, {} are for CUDA graphs (--cuda-graphs off)", use[rank])
        )
    need, machine = use[rank].with_blocks(num_blocks), seen[numbers[rank]]
    left = use[rank].cache_bytes - need.kv_bytes + (1 - FREE_SHARE) * machine.memory_bytes
    log(
        f"memory of a rank: weights {size_text(need.weight_bytes)}, KV cache "
        f"{size_text(need.kv_bytes)} ({num_blocks} blocks), activations "
        f"{size_text(use[rank].step_bytes)} (measured), "
        f"{_of_graphs('CUDA graphs {}, ', use[rank])}free {size_text(left)} of "
        f"{size_text(machine.memory_bytes)}"
    )
    return replace(limits, num_blocks=num_blocks)


def _of_graphs(text: str, use: "MemoryUse") -> str:
    """The text with the size of the graphs put in; empty where there are none."""
    return text.format(size_text(use.graph_bytes)) if use.graph_bytes else ""


class MemoryUse(msgspec.Struct):
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


def memory_use(
    machine: RankMachine, held: HeldBytes, step_bytes: int, graph_bytes: int, layout: Layout
) -> MemoryUse:
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
    return MemoryUse(held.weight_bytes, step_bytes, graph_bytes, block_bytes, left_bytes)


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
            (MeasureStep(step, tables), members.of_dp_rank[replica, dp_rank])
            for dp_rank, step in enumerate(plan.of_dp_ranks())
        ]
    return pool.collect(pool.submit_each(commands))


_SetDispatch = Callable[[DispatchTable], None]
ModeT = TypeVar("ModeT")

SIZES = (1, 4, 16, 64, 256, 1024, 4096)  # tokens of a rank
# With these and six modes starting takes half a minute, or one and a half where steps are long.
_LONG_STEP_S = 0.6  # no larger size is timed: its steps would take four times as long
_SIZE_S = 5.0  # time limit of a size, once it has had the least rounds
_LEAST_ROUNDS, _JUDGED_ROUNDS, _MOST_ROUNDS = 2, 8, 200


def time_dispatch(
    runner: Runner[Any],
    set_dispatch: _SetDispatch,
    layout: Layout,
    limits: Limits,
    modes: Sequence[DispatchMode],
) -> DispatchTable:
    """Time steps of the first replica in each mode, with several numbers of tokens per rank."""
    if len(modes) == 1:
        return DispatchTable.fixed(modes[0].form, modes[0].overlap)
    rows = []
    for size in SIZES:
        num_tokens = size * layout.tp  # of each data-parallel rank
        fits = limits.num_blocks * limits.block_size >= num_tokens
        if size > 1 and not (fits and num_tokens <= limits.max_num_batched_tokens):
            break
        step_s = _step_s(runner, set_dispatch, _plan(layout, limits, num_tokens), modes)
        rows.append(DispatchRow(size, step_s))
        if min(step_s) > _LONG_STEP_S:
            break
    return DispatchTable(tuple(modes), tuple(rows))


def _step_s(
    runner: Runner[Any],
    set_dispatch: _SetDispatch,
    plan: StepPlan,
    modes: Sequence[DispatchMode],
) -> tuple[float, ...]:
    """[num_modes]; seconds of the plan's step in each mode; the modes take turns.

    A step that cannot be split runs without overlap in both kinds of modes. Modes that are clearly
    slower are timed no further.
    """
    can_split = any(batch.num_seqs > 1 for batch in plan.micro_batches[0])
    as_run = [mode if can_split else DispatchMode(mode.form) for mode in modes]
    seconds: dict[DispatchMode, list[float]] = {mode: [] for mode in as_run}
    timed = list(seconds)
    began_s = time.perf_counter()
    for number in range(1 + _MOST_ROUNDS):  # the first warms up
        if number > _LEAST_ROUNDS and time.perf_counter() - began_s > _SIZE_S:
            break
        if number > _JUDGED_ROUNDS:
            timed = still_hopeful({mode: seconds[mode] for mode in timed})
            if len(timed) == 1:
                break
        for mode in timed[:: 1 if number % 2 else -1]:
            set_dispatch(DispatchTable.fixed(mode.form, mode.overlap))
            submitted_s = time.perf_counter()
            runner.collect(runner.submit(plan))
            if number:
                seconds[mode].append(time.perf_counter() - submitted_s)
    return tuple(middle_mean(seconds[mode]) for mode in as_run)


def still_hopeful(seconds: Mapping[ModeT, Sequence[float]]) -> list[ModeT]:
    """The modes whose mean is within three standard errors of the fastest one's.

    Args:
        seconds: by mode; equally many timings of each, eight or more.
    """
    means = {mode: middle_mean(of) for mode, of in seconds.items()}
    errors = {mode: _standard_error(of) for mode, of in seconds.items()}
    best = min(means, key=means.__getitem__)
    return [
        mode
        for mode, of_mode in means.items()
        if of_mode - means[best] <= 3 * hypot(errors[mode], errors[best])
    ]


def _standard_error(values: Sequence[float]) -> float:
    """Standard error of a mean; the middle half of normal values is 1.35 deviations wide."""
    low, _, high = quantiles(values, n=4)
    return (high - low) / 1.35 / sqrt(len(values))


def middle_mean(values: Sequence[float]) -> float:
    """The mean of the middle half: stalls do not count, and it varies less than a median."""
    cut = len(values) // 4
    return mean(sorted(values)[cut : len(values) - cut])


def _plan(layout: Layout, limits: Limits, num_tokens: int) -> StepPlan:
    """A step to be timed, with other tokens on every data-parallel rank.

    Up to `max_num_seqs` tokens, each is a sequence of its own, as in decode; more are those of
    prompts.
    """
    most_seqs = min(limits.max_num_seqs, limits.num_blocks)
    length = 1 if num_tokens <= most_seqs else min(-(-num_tokens // 2), limits.max_model_len)
    blocks = limits.blocks_for(length)
    num_seqs = max(1, min(num_tokens // length, limits.num_blocks // blocks))
    tables = np.arange(num_seqs * blocks, dtype=np.int32).reshape(num_seqs, blocks)
    tokens = np.arange(num_seqs * length * layout.dp).reshape(layout.dp, -1) % limits.vocab_size
    batches = tuple(
        Batch(
            seq_ids=np.arange(num_seqs),
            num_scheduled_tokens=np.full(num_seqs, length),
            num_computed_tokens=np.zeros(num_seqs, dtype=np.int64),
            token_ids=of_rank,
            block_tables=tables,
            yields_token=np.ones(num_seqs, dtype=np.bool_),  # two halves read the head twice
        )
        for of_rank in tokens
    )
    return StepPlan(0, 0, Phase.PREFILL, (batches,), record=False)


_MOST_RECORDING_S = 120.0  # the other sizes are recorded when a step first has one


def forms_of_sizes(
    limits: GraphLimits, table: DispatchTable, layout: Layout
) -> dict[int, tuple[DispatchForm, ...]]:
    """The dispatch forms that decode graphs need, by batch size, the largest size first.

    A step takes the form of the data-parallel rank with most sequences, so a graph of few sequences
    may run in any form of a larger size too.
    """
    forms: dict[DispatchForm, None] = {}
    found, sizes = {}, limits.sizes
    for before, size in zip((*sizes[-2::-1], 0), sizes[::-1], strict=True):
        for most in range(size, before, -1):
            mode = table.choose(-(-most // layout.tp), most > 1, Phase.DECODE)
            if not mode.overlap:
                forms[mode.form] = None
        found[size] = (*forms,)
    return found


def record_graphs(
    pool: RankPool,
    members: Members,
    limits: GraphLimits,
    table: DispatchTable,
    log: Callable[[str], None],
) -> None:
    """Have all ranks record the decode graphs of all sizes, and log how many.

    Every size is a command of its own: all ranks record in one order, and are watched meanwhile.
    No size is begun after two minutes (`_MOST_RECORDING_S`).
    """
    began_s, num_sizes = time.monotonic(), 0
    by_size = forms_of_sizes(limits, table, members.layout)
    for size, forms in by_size.items():
        if forms:
            nums = pool.call(RecordGraphs(size, forms), ranks=members.numbers)
            num_sizes += any(nums)
        if time.monotonic() - began_s > _MOST_RECORDING_S:
            break
    if num_sizes:
        some = f"{num_sizes} of {len(by_size)}" if num_sizes < len(by_size) else f"{num_sizes}"
        log(
            f"CUDA graphs of decode steps: {some} batch sizes up to {limits.sizes[-1]} sequences, "
            f"recorded in {time.monotonic() - began_s:.1f} s"
        )
