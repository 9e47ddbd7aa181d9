"""Loads on one server, or on two in turns: warm-up, rounds and results."""

import asyncio
import resource
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, TypeVar

import uvloop

from expertlane.client.connection import Connections, Url
from expertlane.client.measure import LoadAnswers, Round, Stop, drive, load_record, ratios
from expertlane.client.server import Server, Vocabulary, alike, find_server, flush_caches
from expertlane.errors import ExpertlaneError, UserError
from expertlane.progress import Progress
from expertlane.results.record import DeploymentRecord, RatioRecord
from expertlane.spec.workload import SLO, Load, check_lengths, draw_requests, warm_up_of

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Target:
    """A server to be measured.

    Attributes:
        key: API key; None for none.
        model: its name there; None for the only one.
    """

    url: Url
    key: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class MeasureOptions:
    """Loads to put on servers, and how.

    Attributes:
        num_warm_up: requests before each load that are not counted; None for a usual number.
        num_rounds: repetitions, each of requests of its own.
        timeout_s: seconds that a request may take.
        flushes_caches: whether prefix caches are emptied before each round.
    """

    loads: Sequence[Load]
    seed: int
    slos: Sequence[SLO] = ()
    tokenizer: Vocabulary | None = None
    is_chat: bool = False
    num_warm_up: int | None = None
    num_rounds: int = 1
    timeout_s: float = 600.0
    flushes_caches: bool = False


@dataclass(frozen=True)
class LoadResult:
    """Measurements, and why they ended if early.

    Attributes:
        models: name of the model at each server.
        ratios: the first of two servers over the second.
        why_ended: why measuring ended early; empty where it did not.
        signal: the signal that ended it.
        unflushed: URLs of servers whose prefix cache could not be emptied, though that was asked.
    """

    records: tuple[DeploymentRecord, ...]
    models: tuple[str, ...]
    ratios: tuple[RatioRecord, ...]
    why_ended: str
    signal: int | None
    unflushed: tuple[str, ...] = ()


def measure(targets: Sequence[Target], asked: MeasureOptions, progress: Progress) -> LoadResult:
    """Put loads on one server, or on two in turns; SIGINT and SIGTERM end it with what there is.

    Raises:
        UserError: a server refuses, or is not there; requests are too long for it.
        ExpertlaneError: not one request was answered.
    """
    allow_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(targets, asked, progress))


def run_until_told(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, or until a signal that has a handler: that is then called outside the loop.

    What a handler raises inside a callback, a loop only logs.
    """
    signals: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        found = {each: signal.getsignal(each) for each in (*_SIGNALS, signal.SIGHUP)}
        handlers = {number: each for number, each in found.items() if callable(each)}

    async def watched() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

        def end(number: int) -> None:
            signals.append(number)
            task.cancel()

        for number in handlers:
            loop.add_signal_handler(number, end, number)
        try:
            return await task
        finally:
            for number, handler in handlers.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(watched())
        except asyncio.CancelledError:
            if not signals:
                raise
    handlers[signals[0]](signals[0], None)
    raise KeyboardInterrupt  # of a handler that returns


def allow_connections() -> None:
    """Raise the limit on file descriptors to the most that this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _measure(
    targets: Sequence[Target], asked: MeasureOptions, progress: Progress
) -> LoadResult:
    loop, stop, signals = asyncio.get_running_loop(), Stop(), list[int]()

    def end(number: int) -> None:
        signals.append(number)
        stop("interrupted" if number == signal.SIGINT else "told to end")

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: each for number, each in before.items() if each is not signal.SIG_IGN}
    for number in before:
        loop.add_signal_handler(number, end, number)
    several = [Connections(each.url, headers_of(each)) for each in targets]
    try:
        looking = asyncio.gather(
            *(
                find_server(each, target.model, asked.tokenizer, is_chat=asked.is_chat)
                for each, target in zip(several, targets, strict=True)
            )
        )
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait((looking, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if stop.why:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            raise KeyboardInterrupt
        servers = alike(await looking)
        _check(servers, asked)
        unflushed = list[str]()
        rounds = await _rounds(servers, asked, stop, progress, unflushed)
    finally:
        for connections in several:
            connections.close()
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    seen = _seen(servers, asked, rounds, stop.why, signals[0] if signals else None)
    return replace(seen, unflushed=tuple(dict.fromkeys(unflushed)))


def headers_of(target: Target) -> dict[str, str]:
    """Headers of every request to a server."""
    return {} if target.key is None else {"Authorization": f"Bearer {target.key}"}


def _check(servers: Sequence[Server], asked: MeasureOptions) -> None:
    for server in servers:
        for load in asked.loads:
            if server.max_model_len is not None:
                check_lengths(load, server.max_model_len - 1)


_Rounds = dict[tuple[int, int], list[Round]]  # by server and load


async def _rounds(
    servers: Sequence[Server],
    asked: MeasureOptions,
    stop: Stop,
    progress: Progress,
    unflushed: list[str],
) -> _Rounds:
    """All rounds of all loads: in a round every server gets the same requests, in another others.

    Args:
        unflushed: gets the URLs of servers whose prefix cache could not be emptied.
    """
    found: _Rounds = {}
    for place, load in enumerate(asked.loads):
        for server in servers:
            if not stop.why:
                await warm_up(server, load, asked, place, stop)
        num_all = asked.num_rounds * len(servers) * load.num_requests
        progress.task(str(load), num_all)
        for number in range(asked.num_rounds):
            # A B, B A, A B…: what drifts meets both alike.
            order = range(len(servers)) if number % 2 == 0 else reversed(range(len(servers)))
            for which in order:
                if stop.why:
                    break
                connections = servers[which].connections
                if asked.flushes_caches and not await flush_caches(connections):
                    unflushed.append(str(connections.url))
                one = await one_round(servers[which], load, asked, place, number, stop, progress)
                found.setdefault((which, place), []).append(one)
        progress.done()
    return found


async def one_round(
    server: Server,
    load: Load,
    asked: MeasureOptions,
    place: int,
    number: int,
    stop: Stop,
    progress: Progress,
) -> Round:
    """Put a load on a server once; the same round has the same requests for every server.

    Args:
        place: the load's index.
        number: the round, from 0.
    """
    seed = [asked.seed, place, 0, *([number] if number else [])]
    driven = await _drive(server, load, asked, seed, stop, on_finished=progress.advance)
    return Round.of(driven, asked.slos)


async def warm_up(
    server: Server, load: Load, asked: MeasureOptions, place: int, stop: Stop
) -> None:
    """Put requests on a server that are not counted.

    Args:
        place: the load's index.

    Raises:
        UserError: it answered none.
    """
    if asked.num_warm_up != 0:
        before = warm_up_of(load, asked.num_warm_up)
        driven = await _drive(server, before, asked, [asked.seed, place, 1], stop)
        check_answered([driven], server)


async def _drive(
    server: Server,
    load: Load,
    asked: MeasureOptions,
    seed: Sequence[int],
    stop: Stop,
    on_finished: Callable[[], None] = lambda: None,
) -> LoadAnswers:
    requests = draw_requests(load, len(server.vocabulary), seed)
    return await drive(
        server, requests, load.batch, stop, timeout_s=asked.timeout_s, on_finished=on_finished
    )


def check_answered(driven: Sequence[LoadAnswers], server: Server) -> None:
    """Refuse to go on with a server that answers nothing.

    Raises:
        UserError: not one request was answered, and none was given up.
    """
    sent = [one for each in driven for one in each.sent]
    errors = [one.error for one in sent if one.error is not None]
    if errors and len(errors) == len(sent):
        first = errors[0]
        raise UserError(
            f"{server.connections.url} answered none of {len(sent)} requests: {first.name}, {first}"
        )


def _seen(
    servers: Sequence[Server], asked: MeasureOptions, rounds: _Rounds, why: str, number: int | None
) -> LoadResult:
    records = []
    for which, server in enumerate(servers):
        own = {place: found for (server_, place), found in rounds.items() if server_ == which}
        check_answered([each.driven for found in own.values() for each in found], server)
        serving = [
            load_record(asked.loads[place], found, asked.slos) for place, found in own.items()
        ]
        name = f"{server.connections.url}"
        if server.software:
            name += f" ({server.software})"
        full = tuple(each for each in serving if each is not None)
        if full:
            records.append(DeploymentRecord(name, None, None, "measured", serving=full))
    if not records:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise ExpertlaneError(f"ended before any request was answered: {why}")
    compared = []
    if len(records) == 2:
        names = records[0].name, records[1].name
        for place, load in enumerate(asked.loads):
            one, other = (rounds.get((which, place), []) for which in (0, 1))
            compared += ratios(load, one, other, names)
    models = tuple(each.model for each in servers)
    return LoadResult(tuple(records), models, tuple(compared), why, number)
