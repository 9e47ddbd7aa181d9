"""Alerts on `/live`: conditions that the operator of a server should look at."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol

from expertlane.engine.async_engine import AsyncEngine
from expertlane.engine.elastic.recovery import Recovery
from expertlane.engine.elastic.recovery_record import OVER, Kind
from expertlane.engine.elastic.scaling import Scaling
from expertlane.engine.rank_watch import RankWatch
from expertlane.server.metrics import Metrics
from expertlane.server.own_metrics import IMBALANCE_S
from expertlane.server.setup import ServedModel, ServerOptions
from expertlane.spec.names import Stage

_FULL, _NEARLY_FULL = 0.95, 0.8
_UNEVEN = 2.0
_SILENT_S = 5.0

Change = Literal["recovering", "scaling", "growing"]
_CHANGES: dict[Change, str] = {
    "recovering": "Ranks were lost",
    "scaling": "The layout changes",
    "growing": "Lost ranks join again",
}
_CHANGE_OF: dict[Kind, Change] = {
    Kind.RECOVERY: "recovering",
    Kind.SCALING: "scaling",
    Kind.GROWTH: "growing",
}


@dataclass(frozen=True)
class Alert:
    """A condition that an operator should look at.

    Attributes:
        level: red where requests suffer, amber where they may soon.
        advice: the advice to the operator.
    """

    level: Literal["red", "amber"]
    text: str
    advice: str


class Watched(Protocol):
    """The part of `Service` that `/live` reads."""

    model: ServedModel
    options: ServerOptions
    metrics: Metrics
    engine: AsyncEngine
    is_draining: bool
    num_open: int

    @property
    def num_queued(self) -> int:
        """Requests that wait for their first step, or for blocks that they lost."""
        ...


def alerts_of(service: Watched, *, is_preempting: bool) -> Iterator[Alert]:
    """The present alerts, the worst first.

    Args:
        is_preempting: whether requests lost their blocks in the last minute.
    """
    if service.engine.error is not None:
        yield Alert("red", str(service.engine.error), "Start the server again; its log says more.")
        return
    recovery = service.model.engine.recovery
    if recovery is not None and (change := change_under_way(recovery)) is not None:
        yield Alert(
            "amber",
            f"{_CHANGES[change]} ({recovery.state}): requests wait.",
            "Nothing: requests go on by themselves. The server's log says what happened.",
        )
    else:
        if recovery is not None and (since := recovery.shrunk_at) is not None:
            yield Alert(
                "amber",
                f"{recovery.shares} since {time.strftime('%H:%M:%S', time.localtime(since))}: "
                "lost ranks are starting and loading their weights.",
                "Nothing: they serve again once their weights are loaded.",
            )
        yield from _of_preparing(service.model.scaling)
        yield from _of_ranks(service.model.watch)
    scheduler, most = service.model.engine.scheduler, service.options.max_num_queued
    if service.num_queued >= _NEARLY_FULL * most:
        yield Alert(
            "red",
            f"{service.num_queued} requests are waiting, of at most {most}: soon new ones get "
            "status 429.",
            "Send less, add data-parallel ranks or replicas, or raise --max-num-queued.",
        )
    tables = chain.from_iterable(scheduler.tables)
    used = max(table.blocks.num_used / table.blocks.num_blocks for table in tables)
    if is_preempting:
        yield Alert(
            "red" if used >= _FULL else "amber",
            "The KV cache was full in the last minute: requests lost their blocks and are "
            "computed again.",
            "Raise --num-blocks, lower --max-num-seqs, or add data-parallel ranks.",
        )
    elif used >= _FULL and scheduler.num_waiting:
        yield Alert(
            "amber",
            f"A rank's KV cache is {used:.0%} full: requests wait for blocks.",
            "Raise --num-blocks, or add data-parallel ranks.",
        )
    if service.is_draining:
        yield Alert(
            "amber",
            "The server is draining: new requests get status 503.",
            "Nothing: it ends once running requests have finished.",
        )


def change_under_way(recovery: Recovery | None) -> Change | None:
    """The recovery or layout change that keeps requests waiting; None while they run."""
    if recovery is None or recovery.state in OVER:
        return None
    return _CHANGE_OF[recovery.records[-1].kind]


def _of_preparing(scaling: Scaling | None) -> Iterator[Alert]:
    if scaling is not None and (ahead := scaling.ahead) is not None:
        yield Alert(
            "amber",
            f"Layout {ahead.layout} is being prepared: {ahead.share:.0%} of its layers, "
            f"{ahead.num_bytes / 1e6:,.0f} MB so far. Requests go on, somewhat slower.",
            "Nothing: the layout changes once all weights are loaded.",
        )


def _of_ranks(watch: RankWatch | None) -> Iterator[Alert]:
    if watch is None:
        return
    now_s = time.monotonic()
    for rank, position in zip(watch.numbers, watch.positions, strict=True):
        silent_s = now_s - position.time_s
        if position.stage not in (Stage.IDLE, Stage.SETUP) and silent_s > _SILENT_S:
            yield Alert(
                "red",
                f"Rank {rank} has reported nothing for {silent_s:.0f} s, in {position}.",
                "Check whether its process is stopped or its machine is swapping; after "
                "--timeout-s it counts as lost.",
            )
    uneven = watch.imbalance(IMBALANCE_S)
    worst = max(uneven, key=lambda layer: uneven[layer], default=None)
    if watch.layout.ep > 1 and worst is not None and uneven[worst] >= _UNEVEN:
        advice = (
            "Wait for the rebalancer, or add copies of experts (--num-redundant-experts)."
            if watch.rebalancer is not None
            else "Rebalance experts (--rebalance-steps) or add copies (--num-redundant-experts)."
        )
        yield Alert(
            "amber",
            f"Layer {worst}: the fullest rank computes {uneven[worst]:.1f} times the mean's "
            f"tokens (last {IMBALANCE_S:.0f} s), and the others wait for it.",
            advice,
        )
