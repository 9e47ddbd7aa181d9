"""Warm-up before the first request: timing dispatch modes, and recording decode graphs.

Where `dispatch` or `overlap` is `auto`, steps are timed once on this deployment's own layers. All
graphs are recorded ahead, so that no request waits for one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from math import hypot, sqrt
from statistics import mean, quantiles
from typing import Any, TypeVar

import numpy as np

from expertlane.engine.ranks.commands import RecordGraphs
from expertlane.engine.ranks.pool import RankPool
from expertlane.schedule.plan import Batch, Runner, StepPlan
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import GraphLimits
from expertlane.spec.dispatch import DispatchForm, DispatchMode, DispatchRow, DispatchTable
from expertlane.spec.layout import Layout, Members
from expertlane.spec.names import Phase

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
