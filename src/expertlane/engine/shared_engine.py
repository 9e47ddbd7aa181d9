"""One engine for several threads: of those that wait for steps, one runs them for all."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from queue import SimpleQueue
from types import FrameType
from typing import Any

from expertlane.engine.engine import Chunk, Engine, Prompt, RequestOutput
from expertlane.errors import RankError
from expertlane.spec.sampling import SamplingParams


class Waiter:
    """A call that waits for steps.

    Args:
        is_ready: whether it has what it waits for; called from other threads too.
    """

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self.is_ready = is_ready
        self.error: Exception | None = None
        self.wake: SimpleQueue[None] = SimpleQueue()


class _Turn:
    """A thread's exclusive use of the engine, once all earlier turns have ended: a context."""

    __slots__ = ("_shared", "may_begin", "thread")

    def __init__(self, shared: "SharedEngine") -> None:
        self.thread = threading.get_ident()
        self.may_begin: SimpleQueue[None] | None = None  # for those that must wait
        self._shared = shared

    def __enter__(self) -> None:
        try:
            self._shared.enqueue(self)
            if self.may_begin is not None:
                self.may_begin.get()
        except BaseException:
            self._shared.end(self)
            raise

    def __exit__(self, *error: object) -> None:
        self._shared.end(self)


class SharedEngine:
    """Gives threads exclusive use of an engine, in the order in which they ask for it.

    One of the waiting threads is the leader: it runs steps until it has what it waits for, wakes
    others when they have theirs, and then makes the one that has waited longest the leader. Those
    that add requests or close get the engine between two steps.

    Args:
        is_closed: whether the ranks have been ended.
    """

    def __init__(self, engine: Engine[Any], is_closed: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_closed = is_closed
        # Never held during a step. Reentrant: a garbage collection in one may close a stream.
        self._guard = threading.RLock()
        self._turns: deque[_Turn] = deque()  # the first has the engine
        self._leader: Waiter | None = None
        self._followers: deque[Waiter] = deque()
        self._to_cancel: deque[str] = deque()
        self._arrivals: dict[str, deque[Chunk]] = {}  # by request id: chunks not yet yielded

    def exclusive(self) -> _Turn:
        """A context in which no other thread uses the engine."""
        return _Turn(self)

    def enqueue(self, turn: _Turn) -> None:
        """Put a turn behind those that asked before it."""
        with self._guard:
            # An interruption may have kept this thread from ending its last turn.
            for left in [each for each in self._turns if each.thread == turn.thread]:
                self.end(left)
            if self._turns:
                turn.may_begin = SimpleQueue()
            self._turns.append(turn)

    def end(self, turn: _Turn) -> None:
        """Take a turn out of the queue, and let the next one begin if it had the engine."""
        with self._guard:
            if turn not in self._turns:
                return
            had_it = self._turns[0] is turn
            if had_it:
                self._cancel_now()
            self._turns.remove(turn)
            if had_it and self._turns and (may_begin := self._turns[0].may_begin) is not None:
                may_begin.put(None)

    def add(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        name: str,
        arrived: deque[Chunk] | None,
    ) -> RequestOutput:
        """Queue a request.

        Args:
            arrived: gets its chunks, until it is cancelled.

        Raises:
            UserError: it can never be served.
        """
        with self.exclusive():
            output = self._engine.add(request_id, prompt, params, name=name)
            if arrived is not None:
                self._arrivals[request_id] = arrived
        return output

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End requests that are not finished, now or after the present step; does not wait."""
        for request_id in request_ids:
            self._arrivals.pop(request_id, None)
            self._to_cancel.append(request_id)
        with self._guard:
            if not self._turns:
                self._cancel_now()

    def _cancel_now(self) -> None:
        while self._to_cancel:
            self._engine.cancel(self._to_cancel.popleft())

    def close(self, close: Callable[[], None]) -> None:
        """Call `close` after the present step; those that wait for more get a `RankError`."""
        try:
            if self._turns and self._turns[0].thread == threading.get_ident():
                close()  # in a step of this thread
                return
            with self.exclusive():
                close()
        except BaseException:
            close()
            raise

    def wait(self, waiter: Waiter) -> None:
        """Run steps, or let another thread run them, until it is ready.

        Raises:
            RankError: a rank died, hung or failed, or the ranks are gone.
        """
        try:
            with self._guard:
                if self._leader is None:
                    self._leader = waiter
                else:
                    self._followers.append(waiter)
            while not waiter.is_ready():
                if waiter.error is not None:
                    raise copy(waiter.error)
                if self._leader is waiter:
                    self._lead(waiter)
                else:
                    waiter.wake.get()
        finally:
            with self._guard:
                if waiter in self._followers:
                    self._followers.remove(waiter)
                if self._leader is waiter:
                    self._leader = self._followers.popleft() if self._followers else None
                    if self._leader is not None:
                        self._leader.wake.put(None)

    def _lead(self, waiter: Waiter) -> None:
        """Run steps until it is ready or another thread asks for the engine."""
        try:
            with self.exclusive():
                while True:
                    self._step()
                    self._wake()
                    if waiter.is_ready() or len(self._turns) > 1 or self._to_cancel:
                        return
        except Exception as error:
            self._wake(error)
            raise

    def _wake(self, error: Exception | None = None) -> None:
        """Wake those that have what they wait for, or all with an error."""
        if not self._followers:
            return
        with self._guard:
            for follower in list(self._followers):
                if error is not None or follower.is_ready():
                    follower.error = error
                    self._followers.remove(follower)
                    follower.wake.put(None)

    def _step(self) -> None:
        if self._is_closed():
            raise RankError("the ranks are gone; make a new LLM")
        if self._followers and threading.current_thread() is threading.main_thread():
            # An interruption must not end a step that others wait for too.
            with deferred_interrupts() as is_noted:
                self._take_chunks()
            if is_noted():
                raise KeyboardInterrupt
        else:
            self._take_chunks()

    def _take_chunks(self) -> None:
        for chunk in self._engine.step():
            if (arrived := self._arrivals.get(chunk.request_id)) is not None:
                arrived.append(chunk)


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Only note a Ctrl-C; a second one raises `KeyboardInterrupt` at once. In the main thread.

    Yields:
        Whether there was one, to be called.
    """
    is_noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal is_noted
        if is_noted:
            raise KeyboardInterrupt
        is_noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: is_noted
    finally:
        signal.signal(signal.SIGINT, before)
