"""One load on a server: requests sent when they are due, and the record of their answers.

All times of a request count from when it was due: one that could only be sent late does not look
faster. In a closed loop a request is due when it takes the place of another.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from expertlane.client.connection import Answer, AnswerError, TokenTimes
from expertlane.client.server import Server
from expertlane.client.watch import ServerSamples, engine_record
from expertlane.results.engine_record import EngineCounts, RoundCounts
from expertlane.results.estimate import Estimate, Summary, median_interval, ratio_interval
from expertlane.results.metrics import ServedRequest, serving_record
from expertlane.results.record import RatioRecord
from expertlane.results.serving_record import (
    ClientRecord,
    FailureRecord,
    RequestsRecord,
    ServingRecord,
)
from expertlane.spec.workload import SLO, Load, TimedRequest

_MOST_LOST = 20  # requests in a row that find no server


@dataclass(eq=False)
class RequestResult:
    """A request that was sent, or was to be.

    Attributes:
        number: index in the load.
        due_s, sent_s, ended_s: on the clock of `time.perf_counter`.
        generated: None where it failed.
    """

    number: int
    request: TimedRequest
    due_s: float
    sent_s: float
    ended_s: float = 0.0
    generated: TokenTimes | None = None
    error: AnswerError | None = None


@dataclass(eq=False)
class LoadAnswers:
    """Outcome of a load.

    Attributes:
        sent: requests that were answered or failed, as they ended.
        num_unsent: requests that were not sent, or not waited for.
        why_ended: why the load ended early; empty where it did not.
        cpu_s, wall_s: CPU time of this process, and duration of the load.
        watched: what the server's own metrics tell; None where it has none.
    """

    sent: list[RequestResult] = field(default_factory=list)
    num_unsent: int = 0
    why_ended: str = ""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    began_s: float = 0.0
    watched: ServerSamples | None = None


class Stop:
    """A signal to end a load early; of one event loop."""

    def __init__(self) -> None:
        self.why = ""
        self._event = asyncio.Event()

    def __call__(self, why: str) -> None:
        """End the load."""
        self.why = self.why or why
        self._event.set()

    async def wait(self) -> None:
        """Wait until the load is to end."""
        await self._event.wait()


async def drive(
    server: Server,
    requests: Sequence[TimedRequest],
    max_unfinished: int | None,
    stop: Stop,
    *,
    timeout_s: float,
    on_finished: Callable[[], None] = lambda: None,
) -> LoadAnswers:
    """Send requests, and wait for all; meanwhile the server's metrics are read.

    Args:
        requests: by due time.
        max_unfinished: concurrency of a closed loop; None for an open one.
        timeout_s: seconds that a request may take from when it was sent.
        on_finished: called after each.
    """
    run = _Run(server, stop, timeout_s, on_finished)
    watch = server.watch
    if watch is None:
        return await _driven(run, requests, max_unfinished, stop)
    before = await watch.read()
    async with watch.watching() as watched:
        found = await _driven(run, requests, max_unfinished, stop)
    found.watched = watched
    if not found.why_ended:
        await watch.settle(watched, before, partial(_both, found))
    return found


async def _driven(
    run: "_Run", requests: Sequence[TimedRequest], max_unfinished: int | None, stop: Stop
) -> LoadAnswers:
    cpu_s, found = time.process_time(), run.driven
    found.began_s = time.perf_counter()
    load = run.closed(requests, max_unfinished) if max_unfinished else run.open(requests)
    sending, stopping = asyncio.ensure_future(load), asyncio.ensure_future(stop.wait())
    await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
    for task in (stopping, sending):
        task.cancel()
    done = await asyncio.gather(sending, return_exceptions=True)
    for error in done:
        if isinstance(error, Exception):
            raise error
    found.cpu_s = time.process_time() - cpu_s
    found.wall_s = time.perf_counter() - found.began_s
    found.num_unsent = len(requests) - len(found.sent)
    found.why_ended = stop.why
    return found


def _both(driven: LoadAnswers, engine: EngineCounts) -> RoundCounts:
    """The client's counts of a load beside the engine's."""
    answered = [(each.request, each.generated) for each in driven.sent if each.generated]
    failed = [each.request for each in driven.sent if each.generated is None]
    prompts = [found.num_prompt_tokens for _, found in answered]
    outputs = [found.num_tokens for _, found in answered]
    return RoundCounts(
        engine,
        EngineCounts(
            num_requests=len(answered),
            num_aborted=len(failed),
            num_prompt_tokens=_sum_of_all(prompts),
            num_output_tokens=_sum_of_all(outputs),
        ),
        sum(len(each.prompt_token_ids) for each in failed),
        sum(each.output_len for each in failed),
    )


def _sum_of_all(counts: Sequence[int | None]) -> int | None:
    known = [each for each in counts if each is not None]
    return sum(known) if len(known) == len(counts) else None


class _Run:
    def __init__(
        self, server: Server, stop: Stop, timeout_s: float, on_finished: Callable[[], None]
    ) -> None:
        self.driven = LoadAnswers()
        self._server, self._stop = server, stop
        self._timeout_s = timeout_s
        self._on_finished = on_finished
        self._num_lost = 0

    async def open(self, requests: Sequence[TimedRequest]) -> None:
        """Open loop: send each request when it is due, however many are under way."""
        began_s = self.driven.began_s
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                due_s = began_s + request.due_s
                while (left_s := due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(left_s)
                group.create_task(self._one(number, request, due_s))

    async def closed(self, requests: Sequence[TimedRequest], num: int) -> None:
        """Closed loop: keep `num` requests under way."""
        waiting = deque(enumerate(requests))

        async def place() -> None:
            while waiting:
                number, request = waiting.popleft()
                await self._one(number, request, time.perf_counter())

        async with asyncio.TaskGroup() as group:
            for _ in range(min(num, len(requests))):
                group.create_task(place())

    async def _one(self, number: int, request: TimedRequest, due_s: float) -> None:
        body = self._server.body(request)
        sent = RequestResult(number, request, due_s, time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                sent.generated = await self._server.generate(body, Answer())
        except AnswerError as error:
            sent.error = error
        except TimeoutError:
            sent.error = AnswerError("timeout", f"not answered within {self._timeout_s:g} s")
        sent.ended_s = time.perf_counter()
        self.driven.sent.append(sent)
        self._on_finished()
        is_lost = sent.error is not None and sent.error.name == "no connection"
        self._num_lost = self._num_lost + 1 if is_lost else 0
        if self._num_lost >= _MOST_LOST:
            self._stop(f"the server is gone ({sent.error})")


@dataclass(frozen=True, eq=False)
class Round:
    """One repetition of a load.

    Attributes:
        served: the answered requests; times from the round's start.
        record: record of this round alone; None where nothing was answered.
    """

    driven: LoadAnswers
    answered: tuple[RequestResult, ...]
    served: tuple[ServedRequest[float], ...]
    record: ServingRecord | None

    @classmethod
    def of(cls, driven: LoadAnswers, slos: Sequence[SLO]) -> "Round":
        """The round of a driven load."""
        answered = sorted(
            (each for each in driven.sent if each.generated is not None),
            key=lambda each: each.due_s,
        )
        served = tuple(_served(each, driven.began_s) for each in answered)
        num_failed = len(driven.sent) - len(answered)
        record = serving_record(served, slos, num_failed) if served else None
        return cls(driven, tuple(answered), served, record)


def _served(sent: RequestResult, began_s: float) -> ServedRequest[float]:
    found = sent.generated
    assert found is not None
    num_events = len(found.times_s)
    return ServedRequest(
        found.num_prompt_tokens or len(sent.request.prompt_token_ids),
        max(found.num_tokens or num_events, 1),
        sent.due_s - began_s,
        [each - began_s for each in found.times_s],
    )


def load_record(load: Load, rounds: Sequence[Round], slos: Sequence[SLO]) -> ServingRecord | None:
    """All rounds of one load; None where nothing was answered.

    Latencies are of the requests of all rounds; throughput is the median of the rounds, with its
    90 % interval where there are enough.
    """
    full = [each for each in rounds if each.record is not None]
    if not full:
        return None
    client = _client(load, rounds)
    later_s, served = 0.0, list[ServedRequest[float]]()
    for each in full:
        assert each.record is not None
        served += [_shifted(one, later_s - each.served[0].due_s) for one in each.served]
        later_s += each.record.wall_s.value if each.record.wall_s else 0.0
    record = serving_record(served, slos, client.num_failed)
    cached = [
        one.generated.num_cached_tokens for each in full for one in each.answered if one.generated
    ]
    known = [each for each in cached if each is not None]
    medians: dict[str, Any] = _medians([each.record for each in full])
    engine = engine_record([each.driven.watched for each in rounds])
    counts = EngineCounts() if engine is None else engine.counts
    return replace(
        record,
        batch=load.batch,
        rate=load.rate,
        num_cached_tokens=sum(known) if known else counts.num_cached_tokens,
        num_preemptions=counts.num_preemptions,
        client=client,
        engine=engine,
        **medians,
    )


def _shifted(served: ServedRequest[float], by_s: float) -> ServedRequest[float]:
    times_s = [each + by_s for each in served.token_times_s]
    return ServedRequest(served.prompt_len, served.output_len, served.due_s + by_s, times_s)


_RATES = ("output_tps", "total_tps", "requests_per_s", "goodput")


def _medians(records: Sequence[ServingRecord | None]) -> dict[str, Estimate]:
    found = {}
    for name in _RATES:
        values = [getattr(each, name) for each in records]
        if None not in values:
            found[name] = median_interval([each.value for each in values])
    return found


def _client(load: Load, rounds: Sequence[Round]) -> ClientRecord:
    failed = [one for each in rounds for one in each.driven.sent if one.error is not None]
    counts = Counter(one.error.name for one in failed if one.error)
    messages = {one.error.name: str(one.error) for one in reversed(failed) if one.error}
    cpu_s = sum(each.driven.cpu_s for each in rounds)
    wall_s = sum(each.driven.wall_s for each in rounds)
    answered = [one for each in rounds for one in each.answered]
    late_s = [one.sent_s - one.due_s for each in rounds for one in each.driven.sent]
    asked = [one.request for one in answered]
    return ClientRecord(
        num_rounds=len(rounds),
        num_failed=len(failed),
        num_unsent=sum(each.driven.num_unsent for each in rounds),
        failures=tuple(
            FailureRecord(name, num, messages[name]) for name, num in counts.most_common()
        ),
        why_ended=next((e.driven.why_ended for e in rounds if e.driven.why_ended), ""),
        num_events=sum(len(one.generated.times_s) for one in answered if one.generated),
        num_uncounted=sum(
            one.generated is not None and one.generated.num_tokens is None for one in answered
        ),
        late_s=None if load.is_closed else Summary.of(late_s),
        cpu_s=cpu_s,
        cpu_share=cpu_s / wall_s if wall_s else 0.0,
        asked_prompt_len=_mean([len(each.prompt_token_ids) for each in asked]),
        asked_output_len=_mean([each.output_len for each in asked]),
        requests=_requests(rounds),
    )


def _mean(values: Sequence[int]) -> float:
    return float(np.mean(values)) if values else 0.0


def _requests(rounds: Sequence[Round]) -> RequestsRecord:
    rows = [
        (
            *(number, sent.number),
            *(round(served.due_s, 6), round(sent.sent_s - sent.due_s, 6)),
            *(round(served.ttft_s, 6), round(served.e2e_s, 6)),
            *(served.prompt_len, served.output_len, len(served.token_times_s)),
        )
        for number, each in enumerate(rounds, 1)
        for sent, served in zip(each.answered, each.served, strict=True)
    ]
    return RequestsRecord(*zip(*rows, strict=True))


def ratios(
    load: Load, rounds: Sequence[Round], others: Sequence[Round], names: tuple[str, str]
) -> list[RatioRecord]:
    """Ratios of one server's metrics to another's, from rounds measured in pairs."""
    pairs = [
        (one.record, other.record)
        for one, other in zip(rounds, others, strict=False)
        if one.record is not None and other.record is not None
    ]
    found = []
    for name, path in _METRICS.items():
        values = [(_value(one, path), _value(other, path)) for one, other in pairs]
        known = [(a, b) for a, b in values if a is not None and b is not None and a > 0 and b > 0]
        if known and len(known) == len(pairs):
            ratio = ratio_interval(*zip(*known, strict=True))
            found.append(RatioRecord(*names, str(load), name, len(known), ratio))
    return found


def _value(record: ServingRecord, path: str) -> float | None:
    found: Any = record
    for name in path.split("."):
        found = getattr(found, name, None)
    return None if found is None else float(found.value)


_METRICS = {  # by name: where a record has it
    "output tokens/s": "output_tps",
    "goodput": "goodput",
    "TTFT median": "ttft_s.median",
    "TTFT p99": "ttft_s.p99",
    "TPOT median": "tpot_s.median",
    "ITL p99": "itl_s.p99",
    "E2E median": "e2e_s.median",
}
