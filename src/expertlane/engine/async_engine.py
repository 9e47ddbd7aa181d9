"""The engine for asyncio: one thread runs all steps; a step's chunks reach the loop in one call."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from expertlane.engine.engine import Engine, Prompt
from expertlane.errors import RankError, UserError
from expertlane.schedule.request import Chunk, RequestOutput
from expertlane.spec.sampling import SamplingParams

_IDLE_S = 1.0  # between looks at idle ranks
_AT_ONCE = 32  # requests that are queued before the loop has its turn


class RequestGroup:
    """Requests that were queued together, such as those of one HTTP request.

    Not thread-safe: but for `begin`, its methods are called in one event loop.

    Attributes:
        request_ids: [num_requests].
        outputs: [num_requests]; the engine's thread fills them, so they may be ahead of the chunks
            that `add` has taken in.
        unfinished: ids of requests whose last chunk has not arrived.
    """

    def __init__(self, request_ids: Sequence[str], cancel: Callable[[list[str]], None]) -> None:
        self.request_ids = request_ids
        self.outputs: list[RequestOutput] = []
        self.unfinished = dict.fromkeys(request_ids)
        self._places = {request_id: place for place, request_id in enumerate(request_ids)}
        self._cancel = cancel

    @property
    def is_finished(self) -> bool:
        """True if all last chunks have arrived; `Generation.take` may still have some to give."""
        return not self.unfinished

    def begin(self, output: RequestOutput) -> None:
        """Add the output of the next request; called in the engine's thread."""
        self.outputs.append(output)

    def add(self, chunk: Chunk) -> RequestOutput:
        """Take in a chunk from the engine, and return the output that it belongs to."""
        raise NotImplementedError

    def end(self, error: Exception) -> None:
        """Cancel the unfinished requests, and raise the error where the group is awaited."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Have the engine end the unfinished requests, before its next step."""
        if self.unfinished:
            self._cancel(list(self.unfinished))
            self.unfinished.clear()


class Generation(RequestGroup):
    """The chunks of a group's requests, queued for one consumer."""

    def __init__(self, request_ids: Sequence[str], cancel: Callable[[list[str]], None]) -> None:
        super().__init__(request_ids, cancel)
        self._arrived: deque[tuple[int, Chunk]] = deque()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[tuple[int, Chunk]]:
        """Wait for chunks, and return (index of the request, chunk) of all since the last call.

        Returns an empty list once all requests are finished.

        Raises:
            Exception: the error that ended the requests.
        """
        while not self._arrived and self.unfinished and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def end(self, error: Exception) -> None:
        """Cancel the unfinished requests, and have `take` raise the error.

        Has no effect once all chunks are taken.
        """
        if self.unfinished or self._arrived:
            self._error = self._error or error
        self.cancel()
        self._wake()

    def add(self, chunk: Chunk) -> RequestOutput:
        """Take in a chunk from the engine, and return the output that it belongs to."""
        place = self._places[chunk.request_id]
        self._arrived.append((place, chunk))
        if chunk.finish_reason is not None:
            self.unfinished.pop(chunk.request_id, None)
        self._wake()
        return self.outputs[place]

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _nothing() -> None:
    pass


def _settle(answer: "asyncio.Future[None]", error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)


class AsyncEngine:
    """Runs an engine in a thread of its own, for one event loop.

    Args:
        engine: used by no other thread until `close` has returned.
        check_ranks: called once a second while no step runs; raises when a rank has ended.
        on_chunk: called in the loop with every chunk; the last one of a cancelled request says so.
        on_end: called in the loop when the ranks have ended.
        before_chunks: called in the loop with all chunks of a step, before they are delivered; if
            it calls `fail`, none is.

    Attributes:
        error: what ended the ranks; None while they run.
        num_unseen: requests that the engine has not taken in yet.
    """

    def __init__(
        self,
        engine: Engine[Any],
        *,
        check_ranks: Callable[[], None] = lambda: None,
        on_chunk: Callable[[RequestOutput, Chunk], None],
        on_end: Callable[[Exception], None] = lambda error: None,
        before_chunks: Callable[[list[Chunk]], None] = lambda chunks: None,
    ) -> None:
        self.error: Exception | None = None
        self.num_unseen = 0
        self._engine = engine
        self._check_ranks, self._on_chunk, self._on_end = check_ranks, on_chunk, on_end
        self._before_chunks = before_chunks
        self._loop = asyncio.get_running_loop()
        self._numbers = count()
        self._actions: deque[Callable[[], None]] = deque()  # run between two steps
        self._pending: set[asyncio.Future[None]] = set()  # one for each action not yet run
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._live: dict[str, RequestGroup] = {}
        self._asked: dict[RequestGroup, asyncio.Future[None]] = {}
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        priority: int = 0,
    ) -> Generation:
        """Queue requests, all of them or none.

        Raises:
            UserError: one of them can never be served.
            RankError: the ranks have ended.
        """
        generation = Generation([str(next(self._numbers)) for _ in prompts], self.cancel)
        await self.begin(generation, prompts, params, priority=priority)
        return generation

    async def begin(
        self,
        group: RequestGroup,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        priority: int = 0,
        earlier: Sequence[RequestOutput | None] | None = None,
    ) -> None:
        """Queue a group's unfinished requests, all of them or none.

        Args:
            prompts, params, earlier: [num_unfinished]; arguments of `Engine.add`.

        Raises:
            UserError: one of them can never be served.
            RankError: the ranks have ended.
        """
        if self.error is not None:
            raise self.error
        request_ids = list(group.unfinished)
        answer = self._asked[group] = self._loop.create_future()
        self._live.update(dict.fromkeys(request_ids, group))
        self.num_unseen += len(request_ids)
        before = earlier or [None] * len(request_ids)
        requests = list(zip(request_ids, prompts, params, before, strict=True))
        asked_s = time.perf_counter()
        self._orders.put(partial(self._add, group, requests, priority, asked_s))
        try:
            await answer
        except BaseException:
            group.cancel()
            raise
        finally:
            self._asked.pop(group, None)

    async def between_steps(self, action: Callable[[], None]) -> None:
        """Run an action in the engine's thread, between two steps, and wait for it.

        Raises:
            Exception: from the action; any but a `UserError` ends the engine.
        """
        if self.error is not None:
            raise self.error
        answer = self._loop.create_future()
        self._pending.add(answer)
        try:
            self._actions.append(partial(self._act, action, answer))
            self._orders.put(_nothing)
            await answer
        finally:
            self._pending.discard(answer)

    def stop(self) -> None:
        """Let the thread end after the present step; no requests may follow."""
        self._orders.put(None)
        self.stop_waiting()

    def stop_waiting(self) -> None:
        """Stop waiting for a lost node: all ranks end instead."""
        if self._engine.recovery is not None:
            self._engine.recovery.stop_waiting()

    async def close(self) -> None:
        """Stop, and wait until the thread has ended; unfinished requests get a `RankError`."""
        self.stop()
        await asyncio.to_thread(self._thread.join)
        if self.error is None:
            self.fail(RankError("the server has ended"))

    def cancel(self, request_ids: list[str]) -> None:
        """Have the engine end requests, before its next step."""
        self._orders.put(partial(self._cancel_now, request_ids))

    # In the engine's thread.

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                if self._engine.is_idle:
                    self._wait_for_order()
                self._take_orders()
                while self._actions and not self._is_stopped:
                    self._actions.popleft()()
                # Also between a step's end and the next plan: requests queued until then are in
                # that plan, and cancelled ones are not.
                if chunks := self._engine.step(self._take_orders):
                    self._tell(self._deliver, chunks)
        except Exception as error:
            self._tell(self.fail, error)

    def _act(self, action: Callable[[], None], answer: "asyncio.Future[None]") -> None:
        error: UserError | None = None
        try:
            action()
        except UserError as refusal:
            error = refusal
        self._tell(_settle, answer, error)

    def _wait_for_order(self) -> None:
        try:
            self._take(self._orders.get(timeout=_IDLE_S))
        except Empty:
            self._check_ranks()

    def _take_orders(self) -> None:
        """Run the orders queued since the last call."""
        with suppress(Empty):
            while True:
                self._take(self._orders.get_nowait())

    def _take(self, order: Callable[[], None] | None) -> None:
        if order is None:
            self._is_stopped = True
        else:
            order()

    def _add(
        self,
        group: RequestGroup,
        requests: list[tuple[str, Prompt, SamplingParams, RequestOutput | None]],
        priority: int,
        asked_s: float,
    ) -> None:
        error: UserError | None = None
        try:
            for number, (request_id, prompt, params, earlier) in enumerate(requests, 1):
                name = "prompt" if len(requests) == 1 else f"prompt {number}"
                output = self._engine.add(
                    *(request_id, prompt, params), priority=priority, name=name, earlier=earlier
                )
                output.arrival_s = asked_s  # it may have waited for a step
                group.begin(output)
                if number % _AT_ONCE == 0:
                    time.sleep(0)  # releases the interpreter lock, which the loop waits for
        except UserError as refusal:
            error = refusal
            self._cancel_now([request_id for request_id, *_ in requests])
        self._tell(self._answer, group, [request_id for request_id, *_ in requests], error)

    def _cancel_now(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._engine.cancel(request_id)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(function, *arguments)

    # In the loop.

    def _answer(self, group: RequestGroup, request_ids: list[str], error: UserError | None) -> None:
        self.num_unseen -= len(request_ids)
        if error is not None:
            for request_id in request_ids:
                self._live.pop(request_id, None)
        answer = self._asked.get(group)
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    def _deliver(self, chunks: list[Chunk]) -> None:
        self._before_chunks(chunks)
        for chunk in chunks:
            group = self._live.get(chunk.request_id)
            if group is None:
                continue
            if chunk.finish_reason is not None:
                del self._live[chunk.request_id]
            self._on_chunk(group.add(chunk), chunk)

    def fail(self, error: Exception) -> None:
        """End all requests with an error, and take no others."""
        self.error = error
        for group in dict.fromkeys(self._live.values()):
            group.end(error)
        self._live.clear()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(error)
        for pending in self._pending:
            _settle(pending, error)
        self._on_end(error)
