"""A steady load on a server: the same prompts again and again, each answer kept as it came."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from expertlane.client.connection import (
    Answer,
    ClosedEarly,
    ConnectionFailed,
    Connections,
    error_message,
)
from expertlane.client.server import Server
from expertlane.endpoint.streams import Stream
from expertlane.errors import UserError
from expertlane.spec.workload import TimedRequest

_LOOK_S = 0.1  # between two looks at an answer that comes
_AGAIN_S = 0.25  # until a place of a closed loop asks again after a failure
_HEALTH = "/health"
_HEALTH_EVERY_S, _HEALTH_WITHIN_S = 0.25, 2.0
_TOP = 5  # log-probabilities of a token

End = Literal["whole", "failed", "hung", "cut", "unanswered"]


@dataclass(eq=False)
class Request:
    """A request, and its answer as far as it came.

    Attributes:
        prompt: index of its prompt.
        sent_s, ended_s: on the clock of `time.perf_counter`.
        end: how it ended; unanswered ones were given up at the end of the load.
        words: what was wrong; empty of a whole answer.
    """

    prompt: int
    sent_s: float
    stream: Stream
    ended_s: float = 0.0
    end: End = "unanswered"
    words: str = ""

    @property
    def is_lost(self) -> bool:
        """Whether it got no whole answer, though it was waited for."""
        return self.end in ("failed", "hung", "cut")

    def take_end(self, error: BaseException | None) -> None:
        """Judge how it ended.

        Args:
            error: what the connection raised; None where an answer ended by itself.
        """
        answer, stream = self.stream.answer, self.stream
        if answer.status not in (0, 200):
            message = error_message(bytes(answer.body))
            self.end, self.words = "failed", f"HTTP {answer.status}: {message}"
            return
        if stream.is_done and not stream.is_broken_off:
            self.end = "whole"
            return
        if stream.is_broken_off:
            why = stream.error or f"finish reason {stream.finish_reason}"
        elif error is not None:
            why = str(error) or type(error).__name__
        elif not answer.is_stream:
            why = f"no event stream, but {answer.content_type or 'an answer of no type'}"
        else:
            why = "the stream ended before [DONE]"
        self.end = "cut" if stream.times_s else "failed"
        num = f"{stream.num_tokens} tokens, then: " if stream.times_s else ""
        self.words = f"{num}{why}"


@dataclass(eq=False)
class SteadyLoad:
    """Requests for the same prompts at a constant concurrency, or at a rate.

    Args:
        prompts: the prompts; sent in turn.
        batch: concurrency of a closed loop; None for an open one.
        rate: Poisson arrivals a second of an open loop.
        seed: of the arrivals.
        hang_s: a request that gets no token for so long has hung, and is given up.
        fields: further fields of every request.

    Attributes:
        requests: all requests, in the order they were sent.
    """

    server: Server
    prompts: Sequence[TimedRequest]
    batch: int | None
    rate: float | None
    seed: int
    hang_s: float
    fields: Mapping[str, Any]
    on_ended: Callable[[Request], None] = lambda _: None
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._bodies = [
            msgspec.json.encode(msgspec.json.decode(self.server.body(each)) | self.fields)
            for each in self.prompts
        ]

    async def put(self, numbers: Iterator[int], stop: asyncio.Event) -> None:
        """Send a request for each number until `stop`; then wait for answers, `hang_s` at most.

        Args:
            numbers: the next prompt is the number modulo the number of prompts.
        """
        sending = asyncio.ensure_future(self._send(numbers, stop))
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((sending,), timeout=self.hang_s)
        finally:
            stopping.cancel()
            sending.cancel()
            (found, _) = await asyncio.gather(sending, stopping, return_exceptions=True)
        if isinstance(found, Exception):
            raise found

    async def _send(self, numbers: Iterator[int], stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            if self.batch is not None:
                for _ in range(self.batch):
                    group.create_task(self._place(numbers, stop))
                return
            assert self.rate is not None, "an open loop has one"
            generator = np.random.default_rng([self.seed, 2])
            due_s = time.perf_counter()
            for number in numbers:
                await _until(stop, due_s)
                if stop.is_set():
                    return
                group.create_task(self._one(number % len(self.prompts)))
                due_s += generator.exponential(1 / self.rate)

    async def _place(self, numbers: Iterator[int], stop: asyncio.Event) -> None:
        for number in numbers:
            if stop.is_set():
                return
            request = await self._one(number % len(self.prompts))
            if request.end == "failed":  # a server that refuses at once is not to be flooded
                await _until(stop, time.perf_counter() + _AGAIN_S)

    async def _one(self, prompt: int) -> Request:
        answer = Answer()
        request = Request(prompt, time.perf_counter(), Stream(answer))
        self.requests.append(request)
        path, body = self.server.form.path, self._bodies[prompt]
        asking = asyncio.ensure_future(self.server.connections.ask("POST", path, body, answer))
        try:
            await self._watch(request, asking)
        finally:
            request.ended_s = time.perf_counter()
            if not asking.done():
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        request.stream.answer = Answer(answer.status)  # its tokens are kept, its text is not
        self.on_ended(request)
        return request

    async def _watch(self, request: Request, asking: "asyncio.Future[Answer]") -> None:
        stream = request.stream
        while not asking.done():
            await asyncio.wait((asking,), timeout=_LOOK_S)
            stream.read()
            since_s = stream.times_s[-1] if stream.times_s else request.sent_s
            if not asking.done() and time.perf_counter() - since_s > self.hang_s:
                request.end = "hung"
                request.words = f"no token for {self.hang_s:g} s, after {stream.num_tokens} tokens"
                return
        error = asking.exception()
        if error is not None and not isinstance(error, ConnectionFailed | ClosedEarly):
            raise error
        request.take_end(error)


async def _until(stop: asyncio.Event, moment_s: float) -> None:
    """Wait until a moment, or `stop`."""
    left_s = moment_s - time.perf_counter()
    if left_s > 0:
        try:
            async with asyncio.timeout(left_s):
                await stop.wait()
        except TimeoutError:
            return


async def accepted_fields(
    server: Server, prompt: TimedRequest, hang_s: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields by which a server tells token ids, and log-probabilities; empty where it does not.

    Raises:
        UserError: it takes none of the requests, not even a plain one.
    """
    of_chat = {"logprobs": True, "top_logprobs": _TOP}
    logprobs = of_chat if server.form.is_chat else {"logprobs": _TOP}
    ids = {"return_token_ids": True}
    with_ids = await _tried(server, prompt, hang_s, ids)
    if with_ids.end != "whole":
        ids, plain = {}, await _tried(server, prompt, hang_s, {})
        if plain.end != "whole":
            raise UserError(f"{server.connections.url} answers no request: {plain.words}")
    elif not any(with_ids.stream.ids):
        ids = {}
    with_logprobs = await _tried(server, prompt, hang_s, ids | logprobs)
    has_margins = with_logprobs.end == "whole" and any(with_logprobs.stream.margins)
    return ids, logprobs if has_margins else {}


async def _tried(
    server: Server, prompt: TimedRequest, hang_s: float, fields: Mapping[str, Any]
) -> Request:
    load = SteadyLoad(server, [prompt], 1, None, 0, hang_s, fields)
    await load.put(iter(range(1)), asyncio.Event())
    return load.requests[0]


@dataclass(eq=False)
class HealthWatch:
    """Periodic requests for `/health`.

    Attributes:
        asked_s, statuses: when it was asked, on the clock of `time.perf_counter`, and the HTTP
            status of the answer; 0 for none in time.
    """

    connections: Connections
    asked_s: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            asked_s = time.perf_counter()
            self.statuses.append(await self._ask())
            self.asked_s.append(asked_s)
            await asyncio.sleep(max(0.0, asked_s + _HEALTH_EVERY_S - time.perf_counter()))

    async def _ask(self) -> int:
        try:
            async with asyncio.timeout(_HEALTH_WITHIN_S):
                return (await self.connections.ask("GET", _HEALTH)).status
        except (TimeoutError, ConnectionFailed, ClosedEarly):
            return 0
