"""A fault under a steady load: what the server did before it is the truth of what it does after.

First every prompt is answered twice under the load, with nothing killed; then the load goes on for
a while, the fault strikes once, and the load is watched. All waits are bounded: a server that hangs
or dies is a result.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from expertlane.client.connection import Connections
from expertlane.client.run import Target, allow_connections, headers_of, run_until_told
from expertlane.client.server import NoRoute, Server, Vocabulary, find_server
from expertlane.endpoint.faults import Fault, FaultOutcome
from expertlane.endpoint.judged import (
    Truth,
    changes_record,
    criteria,
    judged,
    outcome_records,
    tie_of,
)
from expertlane.endpoint.processes import Footprint, is_here, server_at
from expertlane.endpoint.steady import HealthWatch, Request, SteadyLoad, accepted_fields
from expertlane.endpoint.timeline import (
    Arrivals,
    full_rate,
    health_record,
    pauses,
    timeline_record,
    window_of,
)
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.results.drill_record import DrillRecord
from expertlane.results.metrics import ServedRequest, serving_record
from expertlane.results.serving_record import ServingRecord
from expertlane.spec.workload import Load, TimedRequest, check_lengths, draw_requests

_TICK_S = 0.5
_CONNECT_S = 2.0


@dataclass(frozen=True)
class DrillOptions:
    """A fault, the load that it strikes, and how long that is watched.

    Attributes:
        load: `num_requests` are the different prompts.
        after_s: seconds of load before the fault.
        observe_s: seconds that are watched after it.
        hang_s: a request without a token for so long has hung.
        health_s: `/health` may be wrong for so long.
    """

    load: Load
    seed: int
    after_s: float
    observe_s: float
    hang_s: float
    health_s: float
    is_chat: bool = False
    tokenizer: Vocabulary | None = None


@dataclass(frozen=True)
class DrillResult:
    """The outcome of a drill.

    Attributes:
        undisturbed: throughput and latency before the fault.
        footprint: what the server held on this machine; None where it is not here.
    """

    record: DrillRecord
    undisturbed: ServingRecord
    model: str
    software: str
    footprint: Footprint | None

    def with_left_after_end(self) -> "DrillResult":
        """With what is left now, when its server has been ended, too."""
        if self.footprint is None:
            return self
        left = dict.fromkeys((*self.record.left, *self.footprint.left()))
        return replace(self, record=replace(self.record, left=tuple(left)))


def drill(
    target: Target,
    asked: DrillOptions,
    fault_of: Callable[[int | None], Fault],
    progress: Progress,
    root: int | None = None,
) -> DrillResult:
    """Strike a server under load, and judge what it does.

    Args:
        fault_of: gives the fault; gets the server's first process on this machine, if there is one.
        root: that process; None to look for the one that listens at the URL's port.

    Raises:
        UserError: the server is not there, or fails without a fault; the fault could not be done.
    """
    allow_connections()
    if root is None and is_here(target.url.host):
        root = server_at(target.url.port)
    fault = fault_of(root)
    fault.check()
    return run_until_told(drilling(target, asked, fault, progress, root))


async def drilling(
    target: Target, asked: DrillOptions, fault: Fault, progress: Progress, root: int | None
) -> DrillResult:
    """`drill`, in a loop that runs.

    Raises:
        UserError: as there.
    """
    connections = Connections(target.url, headers_of(target))
    try:
        try:
            server = await find_server(
                connections, target.model, asked.tokenizer, is_chat=asked.is_chat
            )
        except NoRoute as error:
            raise UserError(
                f"{error}; --endpoint {'completions' if asked.is_chat else 'chat'} asks for others"
            ) from None
        if server.max_model_len is not None:
            check_lengths(asked.load, server.max_model_len - 1)
        prompts = draw_requests(asked.load, len(server.vocabulary), [asked.seed, 0])
        ids, logprobs = await accepted_fields(server, prompts[0], asked.hang_s)
        progress.task("undisturbed", 2 * len(prompts))
        first = await _undisturbed(server, asked, prompts, ids | logprobs, progress)
        again = await _undisturbed(server, asked, prompts, ids, progress)
        progress.done()
        truth = Truth([each.stream for each in sorted(first, key=lambda each: each.prompt)])
        truth.add(again)
        struck = await _strike(server, asked, fault, prompts, ids, root, progress)
        return _drilled(server, asked, fault, truth, struck)
    finally:
        connections.close()


async def _undisturbed(
    server: Server,
    asked: DrillOptions,
    prompts: Sequence[TimedRequest],
    fields: Mapping[str, Any],
    progress: Progress,
) -> list[Request]:
    """Each prompt once, under the load.

    Raises:
        UserError: a request fails without a fault.
    """
    stop = asyncio.Event()

    def ended(request: Request) -> None:
        progress.advance()
        if request.is_lost:
            stop.set()

    load = _load(server, asked, prompts, fields)
    load.on_ended = ended
    await load.put(iter(range(len(prompts))), stop)
    _check_well(server, load.requests)
    return load.requests


def _load(
    server: Server, asked: DrillOptions, prompts: Sequence[TimedRequest], fields: Mapping[str, Any]
) -> SteadyLoad:
    load = asked.load
    return SteadyLoad(server, prompts, load.batch, load.rate, asked.seed, asked.hang_s, fields)


def _check_well(server: Server, requests: Sequence[Request]) -> None:
    """Refuse a server that fails without a fault.

    Raises:
        UserError: it does.
    """
    lost = [each for each in requests if each.is_lost]
    if lost:
        raise UserError(
            f"{server.connections.url} fails without a fault: {len(lost)} of {len(requests)} "
            f"requests {lost[0].end}, the first: {lost[0].words}"
        )


@dataclass(frozen=True)
class _Observation:
    """Outcome of a strike; all times on the clock of `time.perf_counter`."""

    what: FaultOutcome
    requests: list[Request]
    health: HealthWatch
    began_s: float
    fault_s: float
    end_s: float
    before: Footprint | None
    after: Footprint | None
    is_running: bool


async def _strike(
    server: Server,
    asked: DrillOptions,
    fault: Fault,
    prompts: Sequence[TimedRequest],
    fields: Mapping[str, Any],
    root: int | None,
    progress: Progress,
) -> _Observation:
    """Put on the load, strike once, and watch what follows.

    Raises:
        UserError: the server fails before, or the fault could not be done.
    """
    stop = asyncio.Event()
    load = _load(server, asked, prompts, fields)
    connections = server.connections
    health = HealthWatch(connections)
    began_s = time.perf_counter()
    loading = asyncio.ensure_future(load.put(itertools.count(), stop))
    watching = asyncio.ensure_future(health.run())
    try:
        progress.task("before the fault", round(asked.after_s / _TICK_S))
        await _wait(began_s + asked.after_s, loading, progress)
        progress.done()
        _check_well(server, load.requests)
        if not any(each.end == "whole" for each in load.requests):
            raise UserError(
                f"no request was answered within {asked.after_s:g} s, before the fault; give a "
                "longer --after-s, or shorter outputs"
            )
        before = await asyncio.to_thread(Footprint.of, root)
        fault_s = time.perf_counter()
        what = await fault.strike()
        progress.task("after the fault", round(asked.observe_s / _TICK_S))
        end_s = fault_s + asked.observe_s
        await _wait(end_s, loading, progress)
        after = await asyncio.to_thread(Footprint.of, root)
        stop.set()
        await loading
        progress.done()
        is_running = await _takes_connections(connections)
    finally:
        stop.set()
        for task in (loading, watching):
            task.cancel()
        await asyncio.gather(loading, watching, return_exceptions=True)
    return _Observation(
        *(what, load.requests, health, began_s, fault_s, end_s, before, after, is_running)
    )


async def _wait(until_s: float, loading: "asyncio.Future[None]", progress: Progress) -> None:
    """Wait until a moment, while the load runs.

    Raises:
        Exception: the load's, if it ended by one.
    """
    while (left_s := until_s - time.perf_counter()) > 0:
        await asyncio.wait((loading,), timeout=min(left_s, _TICK_S))
        if loading.done():
            loading.result()
        progress.advance()


async def _takes_connections(connections: Connections) -> bool:
    url = connections.url
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(url.host, url.port)
        writer.close()
        return True
    return False


def _drilled(
    server: Server, asked: DrillOptions, fault: Fault, truth: Truth, struck: _Observation
) -> DrillResult:
    """The record of what happened."""
    requests, zero_s = struck.requests, struck.fault_s
    began_s, end_s = struck.began_s - zero_s, struck.end_s - zero_s
    undisturbed = [each for each in requests if each.end == "whole" and each.ended_s < zero_s]
    truth.add(undisturbed)
    tie = tie_of(truth)
    ended = [each for each in requests if each.end != "unanswered" and each.ended_s >= zero_s]
    several = [judged(each, truth, tie) for each in ended]
    arrivals, waits = Arrivals(requests, zero_s), pauses(requests, zero_s)
    window_s = window_of(undisturbed, -began_s)
    tps, full_tps, full_rate_s = full_rate(arrivals, began_s, end_s, window_s)
    lost_s = [each.ended_s - zero_s for each in requests if each.is_lost]
    held = None if struck.before is None else struck.before.with_later(struck.after)
    later_s = arrivals.times_s[arrivals.times_s > 0]
    record = DrillRecord(
        fault=fault.words,
        exit_code=struck.what.exit_code,
        fault_s=round(struck.what.took_s, 3),
        printed=struck.what.printed,
        observed_s=asked.observe_s,
        hang_s=asked.hang_s,
        health_s=asked.health_s,
        tps_before=tps,
        full_tps=full_tps,
        full_rate_s=None if full_rate_s is None else round(full_rate_s, 3),
        usual_pause_s=round(max((w for _, b, w in waits if b <= 0), default=0.0), 3),
        pause_s=round(max((w for _, b, w in waits if b > 0), default=0.0), 3),
        last_token_s=round(float(later_s[-1]), 3) if len(later_s) else None,
        first_lost_s=round(min(lost_s), 3) if lost_s else None,
        num_unanswered=sum(each.end == "unanswered" for each in requests),
        outcomes=outcome_records(several, zero_s),
        changes=changes_record(truth, several, tie, zero_s),
        health=health_record(
            [each - zero_s for each in struck.health.asked_s],
            struck.health.statuses,
            *(arrivals, lost_s, full_rate_s, began_s, end_s),
        ),
        is_local=held is not None,
        is_running=struck.is_running,
        left=() if held is None else tuple(held.left()),
        timeline=timeline_record(requests, arrivals, zero_s, began_s, end_s),
    )
    why_failed, cautions = criteria(record)
    defects = [*truth.defects()]
    if defects:
        why_failed = (
            f"{len(defects):,} undisturbed answers are wrong, the first: {defects[0]}",
            *why_failed,
        )
    record = replace(record, why_failed=why_failed, cautions=cautions)
    serving = _serving(asked.load, undisturbed, struck)
    return DrillResult(record, serving, server.model, server.software, held)


def _serving(load: Load, requests: Sequence[Request], struck: _Observation) -> ServingRecord:
    """Throughput and latency before the fault."""
    served = [
        ServedRequest(
            load.prompt_len.low,
            each.stream.num_counted or each.stream.num_tokens,
            each.sent_s - struck.began_s,
            [moment - struck.began_s for moment in each.stream.times_s],
        )
        for each in requests
        if each.stream.times_s
    ]
    return replace(serving_record(served), batch=load.batch, rate=load.rate)
