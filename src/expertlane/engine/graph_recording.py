"""Records decode steps as graphs before the first request, so that no request waits for it."""

import time
from collections.abc import Callable

from expertlane.engine.ranks.commands import RecordGraphs
from expertlane.engine.ranks.pool import RankPool
from expertlane.spec.deployment import GraphLimits
from expertlane.spec.dispatch import DispatchForm, DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.members import Members
from expertlane.spec.names import Phase

_MOST_S = 120.0  # the other sizes are recorded when a step first has one


def forms_of_sizes(
    limits: GraphLimits, table: DispatchTable, layout: Layout
) -> dict[int, tuple[DispatchForm, ...]]:
    """The dispatch forms that need graphs, by size, the largest first.

    A step in which a data-parallel rank has few sequences takes the form of the rank that has most,
    so those of larger sizes count too.
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
    """Have all ranks record all sizes, one after the other; `log` takes a line.

    Every size is a command of its own: all ranks record in one order, and are watched meanwhile.
    No size is begun after `_MOST_S`.
    """
    began_s, num_sizes = time.monotonic(), 0
    by_size = forms_of_sizes(limits, table, members.layout)
    for size, forms in by_size.items():
        if forms:
            nums = pool.call(RecordGraphs(size, forms), ranks=members.numbers)
            num_sizes += any(nums)
        if time.monotonic() - began_s > _MOST_S:
            break
    if num_sizes:
        some = f"{num_sizes} of {len(by_size)}" if num_sizes < len(by_size) else f"{num_sizes}"
        log(
            f"CUDA graphs of decode steps: {some} batch sizes up to {limits.sizes[-1]} sequences, "
            f"recorded in {time.monotonic() - began_s:.1f} s"
        )
