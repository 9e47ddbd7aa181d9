"""The data of `/live`: a frame of numbers each second, events, and alerts for the operator."""

import time
from base64 import b64encode
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import Placements
from expertlane.engine.comm.progress import NO_LAYER, Position
from expertlane.engine.elastic.scaling import PREPARING, Scaling
from expertlane.engine.rank_watch import RankWatch, Reading
from expertlane.server.health import CHANGES, change_under_way
from expertlane.server.metrics import IMBALANCE_S, WAITING
from expertlane.server.service import Service
from expertlane.spec.names import Stage
from expertlane.version import __version__

_STAGES = [stage for stage in Stage if stage != Stage.SETUP]
_LATELY_S = 60.0  # the window of percentiles and preemptions
_PERCENTILES = (50, 90, 99)
_MOST_EVENTS = 200
_MOST_HISTORY = 500_000  # token counts that a page gets at its start
_HISTORY_FRAMES = 60
_KEPT_LOOKS = 120
_MARKED_S = 180.0  # how long frames have a recovery; it draws two minutes


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


@dataclass(frozen=True)
class Event:
    """An event of the server, such as a preemption.

    Attributes:
        number: from 1, in order.
        at: time of the event, in seconds since 1970.
    """

    number: int
    at: float
    kind: Literal[
        "rebalance", "recovery", "scaling", "growth", "preemption", "error", "drain", "end"
    ]
    text: str


@dataclass
class LiveState:
    """The data that the `/live` pages of one server show; used in its event loop."""

    service: Service
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))
    _num_events: int = 0
    _seen: dict[str, int] = field(default_factory=dict)
    _began: float = field(default_factory=time.time)
    _began_s: float = field(default_factory=time.monotonic)
    _preempted_s: float = float("-inf")
    _speeds: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_KEPT_LOOKS))

    def add(self, kind: Any, text: str) -> None:
        """Add an event, and report it to `on_event`."""
        self._num_events += 1
        self.events.append(Event(self._num_events, time.time(), kind, text))
        if (on_event := self.service.options.on_event) is not None:
            on_event(kind, text)

    def look(self) -> None:
        """Add the events since the last look; to be called once a second."""
        service = self.service
        self._speeds.append((time.time(), service.metrics.num_generation_tokens))
        if more := self._more("preemptions", service.model.engine.scheduler.num_preemptions):
            self._preempted_s = time.monotonic()
            self.add(
                "preemption",
                f"{_count(more, 'request')} lost their cache blocks and will be computed again",
            )
        if more := self._more("failures", service.metrics.num_failures):
            self.add("error", f"{_count(more, 'response')} with status 5xx")
        if self._more("draining", service.is_draining):
            self.add("drain", "the server is draining: it takes no new requests")
        if service.engine.error is not None and self._more("end", 1):
            self.add("end", str(service.engine.error))
        self._look_at_rebalancer()
        self._look_at_recovery()

    def _more(self, name: str, number: int) -> int:
        more = number - self._seen.get(name, 0)
        self._seen[name] = number
        return more

    def _look_at_rebalancer(self) -> None:
        watch = self.service.model.watch
        if watch is None or watch.rebalancer is None:
            return
        switched = [each for each in watch.rebalancer.decisions if each.switched is not None]
        for each in switched[len(switched) - self._more("switched", len(switched)) :]:
            whose = f"replica {each.replica}, " if watch.layout.replicas > 1 else ""
            decision = each.decision
            self.add(
                "rebalance",
                f"{whose}step {each.switched}: {decision.num_bytes / 1e6:.3g} MB of experts moved "
                f"in about {decision.cost_s:.2g} s, to save {decision.gain_s:.2g} s within "
                f"{decision.num_steps} steps; the fullest rank's load over the mean should fall "
                f"from {each.predicted_before:.2f} to {each.predicted_after:.2f}",
            )

    def _look_at_recovery(self) -> None:
        recovery = self.service.model.engine.recovery
        if recovery is None:
            return
        over = [each for each in list(recovery.records) if each.is_over]
        number = recovery.num_recoveries + recovery.num_scalings + recovery.num_growths
        for record in over[len(over) - self._more("recoveries", number) :]:
            self.add(record.kind.value, record.line)

    def start(self) -> dict[str, Any]:
        """The data that a page gets once, before its first frame."""
        service, watch = self.service, self.service.model.watch
        limits = service.model.limits
        facts: dict[str, Any] = {
            "kind": "start",
            "version": __version__,
            "model": service.model.name,
            "began": self._began,
            "max_num_queued": service.options.max_num_queued,
            "max_num_seqs": limits.max_num_seqs,
            "num_blocks": limits.num_blocks,
            "block_size": limits.block_size,
            "stages": [*(stage.label for stage in _STAGES), WAITING],
            "ranks": [],
            "layers": [],
            "events": list(self.events),
            "speeds": list(self._speeds),
            "history": [],
        }
        if watch is None:
            return facts
        layout = watch.layout
        readings = list(watch.readings)
        most = max(2, _MOST_HISTORY // max(1, readings[-1].num_tokens.size))
        return facts | {
            "layout": str(layout),
            "is_rebalanced": watch.rebalancer is not None,
            "ranks": [
                {
                    "replica": at.replica,
                    "pp": at.pp_rank,
                    "dp": at.dp_rank,
                    "ep": at.ep_rank,
                }
                for at in map(layout.coordinates, range(layout.world_size))
            ],
            "num_experts": watch.num_experts,
            "layers": watch.layers,
            "stage_of_layer": watch.stage_of_layer,
            "placements": self.placements(watch.placements),
            "history": [
                self._totals(each) for each in _spread(readings, min(most, _HISTORY_FRAMES))
            ],
        }

    def placements(self, placements: Sequence[Placements]) -> list[list[list[list[int]]]]:
        """[replicas][num_moe_layers][ep]; the experts that each rank holds."""
        return [
            [[list(held) for held in each.experts_of_rank] for each in of_replica if each]
            for of_replica in placements
        ]

    def frame(self) -> dict[str, Any]:
        """The present numbers; counters are totals, so that frames may be lost."""
        service, metrics = self.service, self.service.metrics
        scheduler, watch = service.model.engine.scheduler, service.model.watch
        recovery = service.model.engine.recovery
        tables = list(chain.from_iterable(scheduler.tables))
        found: dict[str, Any] = {
            "kind": "frame",
            "at": time.time(),
            "state": self._state(),
            "num_open": service.num_open,
            "num_running": scheduler.num_running,
            "num_waiting": service.num_queued,
            "cache": [table.blocks.num_used / table.blocks.num_blocks for table in tables],
            "running": [table.num_running for table in tables],
            "dummy_steps": metrics.own.dummy_steps(),
            "num_generation_tokens": metrics.num_generation_tokens,
            "num_preemptions": scheduler.num_preemptions,
            "num_recovered": scheduler.num_recovered,
            "num_recoveries": 0 if recovery is None else recovery.num_recoveries,
            "dp_ranks": self._dp_ranks(),
            "num_queried": sum(table.num_queried for table in tables),
            "num_cached": scheduler.num_cached_tokens,
            "ttft": _percentiles(metrics.recent_ttft),
            "tpot": _percentiles(metrics.recent_tpot),
            "alerts": list(self.alerts()),
            "changes": self._changes(),
        }
        if watch is not None:
            reading = watch.readings[-1]
            now_s = time.monotonic()
            found |= {
                "totals": self._totals(reading),
                "link_bytes": reading.link_bytes.tolist(),
                "overlapped_s": round(reading.overlapped_s, 4),
                "exposed_s": round(reading.exposed_s, 4),
                "now": [
                    {
                        "stage": self._stage(position),
                        "layer": None if position.layer == NO_LAYER else position.layer,
                        "waiting": position.waiting,
                        "silent_s": round(max(0.0, now_s - position.time_s), 2),
                    }
                    for position in watch.positions
                ],
                "rebalances": self._rebalances(),
                "imbalance": {
                    str(layer): round(ratio, 3)
                    for layer, ratio in watch.imbalance(IMBALANCE_S).items()
                },
            }
        return found

    def _stage(self, position: Position) -> str:
        is_preparing = position.stage is Stage.SETUP and self._state() == PREPARING
        return PREPARING if is_preparing else position.stage.label

    def _rebalances(self) -> dict[str, Any] | None:
        """The rebalancer's decisions and moves so far; None without one."""
        watch = self.service.model.watch
        if watch is None or watch.rebalancer is None:
            return None
        decisions = list(watch.rebalancer.decisions)
        return {
            "num_decisions": len(decisions),
            "num_moved": sum(each.switched is not None for each in decisions),
            "saved_s": round(watch.rebalancer.saved_s, 4),
            "paid_s": round(watch.rebalancer.paid_s, 4),
            "latest": f"step {decisions[-1].step}: {decisions[-1].decision.line}"
            if decisions
            else None,
        }

    def _totals(self, reading: Reading) -> dict[str, Any]:
        """A reading of the ranks' totals for the page, times in ms."""
        own_s = (reading.spent_s - reading.waited_s)[:, _STAGES]
        waited_s = reading.waited_s.sum(axis=1, keepdims=True)
        return {
            "at": round(self._began + reading.time_s - self._began_s, 3),
            "tokens": _whole_numbers(reading.num_tokens),
            "rank_tokens": _whole_numbers(reading.rank_tokens),
            "ms": np.rint(1e3 * np.concatenate([own_s, waited_s], axis=1)).astype(int).tolist(),
        }

    def _state(self) -> str:
        if self.service.engine.error is not None:
            return "ended"
        recovery = self.service.model.engine.recovery
        if (change := change_under_way(recovery)) is not None:
            return change
        if self.service.is_draining:
            return "draining"
        if recovery is not None and recovery.shrunk_at is not None:
            return "shrunk"
        scaling = self.service.model.scaling
        return "running" if scaling is None or scaling.ahead is None else PREPARING

    def _changes(self) -> list[dict[str, Any]]:
        """Recoveries and changes of the layout of the last minutes, also one under way.

        `began` in seconds since 1970; `seconds` until a step was committed again, None before.
        """
        recovery = self.service.model.engine.recovery
        since = time.time() - _MARKED_S
        return [
            {
                "kind": each.kind.value,
                "began": each.at,
                "seconds": round(each.total_s, 3) if each.is_over else None,
                "ranks": each.ranks,
            }
            for each in ([] if recovery is None else list(recovery.records))
            if each.at > since
        ]

    def _dp_ranks(self) -> dict[str, Any] | None:
        """Numbers of data-parallel ranks, serving and all; None if lost ones are not replaced."""
        recovery = self.service.model.engine.recovery
        if recovery is None:
            return None
        serving, number = len(recovery.members.dp_ranks), len(recovery.whole.dp_ranks)
        return {"serving": serving, "all": number, "shrunk_at": recovery.shrunk_at}

    def alerts(self) -> Iterator[Alert]:
        """The present alerts, the worst first."""
        is_preempting = time.monotonic() - self._preempted_s < _LATELY_S
        return alerts_of(self.service, is_preempting=is_preempting)


def _percentiles(recent: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """Percentiles of the seconds observed in the last minute, and their number."""
    since_s = time.perf_counter() - _LATELY_S
    values = sorted(seconds for when_s, seconds in list(recent) if when_s >= since_s)
    found: dict[str, Any] = {"num": len(values)}
    if values:
        found |= {
            f"p{share}": round(values[min(len(values) - 1, len(values) * share // 100)], 5)
            for share in _PERCENTILES
        }
    return found


def _whole_numbers(numbers: npt.NDArray[np.int64]) -> str:
    """Base64 of numbers as uint32, which may wrap: pages take differences."""
    return b64encode(numbers.astype("<u4").tobytes()).decode()


def _spread(readings: Sequence[Reading], most: int) -> list[Reading]:
    """At most `most` readings, near-equally spaced in time, with the first and the last."""
    if len(readings) <= most:
        return list(readings)
    times = [each.time_s for each in readings]
    wanted = np.linspace(times[0], times[-1], most)
    places = dict.fromkeys(bisect_left(times, each) for each in wanted)
    return [readings[min(place, len(readings) - 1)] for place in places]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


_FULL, _NEARLY_FULL = 0.95, 0.8
_UNEVEN = 2.0


def alerts_of(service: Service, *, is_preempting: bool) -> Iterator[Alert]:
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
            f"{CHANGES[change]} ({recovery.state}): requests wait.",
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
        if (reason := service.stall.reason()) is not None:
            yield Alert(
                "red",
                f"{reason[0].upper()}{reason[1:]}.",
                "Check whether its process is stopped or its machine is swapping; after "
                "--timeout-s it counts as lost.",
            )
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
