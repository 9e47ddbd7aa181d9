"""Send requests to a server when they are due, and keep the outcome of each.

All times of a request count from when it was due: one that could only be sent late does not look
faster. In a closed loop a request is due when it takes the place of another.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from expertlane.client.connection import Answer
from expertlane.client.events import AnswerError, Generated
from expertlane.client.server import Server
from expertlane.spec.workload import TimedRequest

_MOST_LOST = 20  # requests in a row that find no server


@dataclass(eq=False)
class Sent:
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
    generated: Generated | None = None
    error: AnswerError | None = None


@dataclass(eq=False)
class Driven:
    """Outcome of a load.

    Attributes:
        sent: requests that were answered or failed, as they ended.
        num_unsent: requests that were not sent, or not waited for.
        why_ended: why the load ended early; empty where it did not.
        cpu_s, wall_s: CPU time of this process, and duration of the load.
    """

    sent: list[Sent] = field(default_factory=list)
    num_unsent: int = 0
    why_ended: str = ""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    began_s: float = 0.0


class Stop:
    """Tells a load to end before its time; of one event loop."""

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
) -> Driven:
    """Send requests, and wait for all.

    Args:
        requests: by due time.
        max_unfinished: concurrency of a closed loop; None for an open one.
        timeout_s: seconds that a request may take from when it was sent.
        on_finished: called after each.
    """
    run = _Run(server, stop, timeout_s, on_finished)
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


class _Run:
    def __init__(
        self, server: Server, stop: Stop, timeout_s: float, on_finished: Callable[[], None]
    ) -> None:
        self.driven = Driven()
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
        sent = Sent(number, request, due_s, time.perf_counter())
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
