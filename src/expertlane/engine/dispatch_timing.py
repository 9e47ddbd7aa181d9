"""`dispatch = "auto"`: every form is timed once on this deployment's own layers."""

import time
from collections.abc import Sequence

import numpy as np

from expertlane.engine.pool import RankPool
from expertlane.errors import SpecError
from expertlane.schedule.limits import Limits
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.dispatch_table import DispatchRow, DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase

_RUN_STEP = "expertlane.engine.deployed_stage:run_step"
_SET_DISPATCH = "expertlane.engine.deployed_stage:set_dispatch"
SIZES = (1, 4, 16, 64, 256, 1024, 4096)  # tokens of a rank
NUM_ROUNDS = 3
_LONG_STEP_S = 0.3  # no larger size is timed: starting must not take minutes


def forms_of(layout: Layout, ranks_per_node: int) -> tuple[DispatchForm, ...]:
    """Those that make a difference: hierarchical only where nodes hold equally many of several."""
    if layout.ep == 1:
        return ("all_gather",)
    try:
        has_hierarchy = layout.ep_ranks_per_node(ranks_per_node) < layout.ep
    except SpecError:
        has_hierarchy = False
    return ("all_to_all", "all_gather", *(("hierarchical",) if has_hierarchy else ()))


def time_dispatch(
    pool: RankPool, layout: Layout, limits: Limits, forms: Sequence[DispatchForm]
) -> DispatchTable:
    """Time a prefill step of the first replica with each form and several numbers of tokens.

    Forms alternate; the least time of the rounds counts, since others only ever add to it.
    """
    if len(forms) == 1:
        return DispatchTable.fixed(forms[0])
    ranks = layout.ranks_of_replica(0)
    rows = []
    for size in SIZES:
        num_tokens = size * layout.tp  # of a data-parallel rank
        fits = limits.num_blocks * limits.block_size >= num_tokens
        if size > 1 and not (fits and num_tokens <= limits.max_num_batched_tokens):
            break
        plan = _plan(layout, limits, num_tokens)
        least: dict[DispatchForm, float] = dict.fromkeys(forms, float("inf"))
        for _ in range(NUM_ROUNDS + 1):  # the first round warms up
            for form in forms:
                pool.call(_SET_DISPATCH, DispatchTable.fixed(form), ranks=ranks)
                began_s = time.perf_counter()
                pool.call(_RUN_STEP, plan, ranks=ranks)
                least[form] = min(least[form], time.perf_counter() - began_s)
        rows.append(DispatchRow(size, least))
        if min(least.values()) > _LONG_STEP_S:
            break
    return DispatchTable(tuple(rows))


def _plan(layout: Layout, limits: Limits, num_tokens: int) -> StepPlan:
    """A prompt's chunk of different tokens on every data-parallel rank; nothing comes of it."""
    length = min(num_tokens, limits.max_model_len)
    blocks = -(-length // limits.block_size)
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
            yields_token=np.zeros(num_seqs, dtype=np.bool_),
        )
        for of_rank in tokens
    )
    return StepPlan(0, 0, Phase.PREFILL, (batches,), record=False)
