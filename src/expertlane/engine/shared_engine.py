"""An engine shared by threads: whoever waits for requests runs steps, which serve all of them."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from types import FrameType
from typing import Any

from expertlane.engine.engine import Engine, Prompt
from expertlane.errors import RankError
from expertlane.schedule.request import Chunk, RequestOutput
from expertlane.spec.sampling import SamplingParams


class SharedEngine:
    """Gives threads exclusive use of an engine, in the order in which they ask for it.

    A thread that waits runs steps until its condition holds, or until another thread asks for the
    engine: to add requests, to close, or to wait as well.

    Args:
        is_closed: tells whether the ranks have been ended.
    """

    def __init__(self, engine: Engine[Any], is_closed: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_closed = is_closed
        # Never held during a step. Reentrant: a garbage collection in one may close a stream.
        self._changed = threading.Condition()
        self._turns: deque[int] = deque()  # threads; the first has the engine
        self._num_waiting = 0  # threads in `wait`
        self._error: Exception | None = None  # the latest that a step has raised
        self._to_cancel: deque[str] = deque()
        self._arrivals: dict[str, deque[Chunk]] = {}  # by request id: chunks not yet yielded

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """A context in which no other thread uses the engine."""
        own = threading.get_ident()
        try:
            with self._changed:
                self._end_turn(own)  # an interruption may have kept this thread from it
                self._turns.append(own)
                self._changed.wait_for(lambda: self._turns[0] == own)
            yield
        finally:
            with self._changed:
                self._end_turn(own)

    def _end_turn(self, thread: int) -> None:
        if thread in self._turns:
            if self._turns[0] == thread:
                self._cancel_now()
            self._turns.remove(thread)
            self._changed.notify_all()

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
            arrived: the queue to which its chunks are added, until it is cancelled.

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
        with self._changed:
            if not self._turns:
                self._cancel_now()

    def _cancel_now(self) -> None:
        while self._to_cancel:
            self._engine.cancel(self._to_cancel.popleft())

    def close(self, close: Callable[[], None]) -> None:
        """Call `close` after the present step; threads that still wait get a `RankError`."""
        try:
            if self._turns and self._turns[0] == threading.get_ident():
                close()  # in a step of this thread
                return
            with self.exclusive():
                close()
        except BaseException:
            close()
            raise

    def wait(self, is_ready: Callable[[], bool]) -> None:
        """Run steps, in turn with other threads that wait, until a condition holds.

        Raises:
            RankError: a rank died, hung or failed, or the ranks are gone.
        """
        with self._changed:
            self._num_waiting += 1
        error_before = self._error
        try:
            while not is_ready():
                with self.exclusive():
                    while not is_ready():
                        if self._is_closed():
                            error = None if self._error is error_before else self._error
                            raise copy(error) or RankError("the ranks are gone; make a new LLM")
                        self._step()
                        if len(self._turns) > 1 or self._to_cancel:
                            break
        finally:
            with self._changed:
                self._num_waiting -= 1

    def _step(self) -> None:
        if self._num_waiting > 1 and threading.current_thread() is threading.main_thread():
            # An interruption must not end a step that others wait for too.
            with deferred_interrupts() as is_noted:
                self._take_chunks()
            if is_noted():
                raise KeyboardInterrupt
        else:
            self._take_chunks()

    def _take_chunks(self) -> None:
        try:
            chunks = self._engine.step()
        except Exception as error:
            self._error = error
            raise
        for chunk in chunks:
            if (arrived := self._arrivals.get(chunk.request_id)) is not None:
                arrived.append(chunk)


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """A context that only notes a first Ctrl-C; a second one raises `KeyboardInterrupt` at once.

    For the main thread.

    Yields:
        A function that tells whether there was one.
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
