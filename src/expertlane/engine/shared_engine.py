"""An engine shared by threads: of those that wait for steps, one runs them for all."""

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

    One of the waiting threads is the leader: it runs steps until its own condition holds, wakes
    others when theirs do, and then another leads. Threads that add requests or close get the engine
    between two steps.

    Args:
        is_closed: tells whether the ranks have been ended.
    """

    def __init__(self, engine: Engine[Any], is_closed: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_closed = is_closed
        # Never held during a step. Reentrant: a garbage collection in one may close a stream.
        self._changed = threading.Condition()
        self._turns: deque[int] = deque()  # threads; the first has the engine
        self._leader: int | None = None
        self._followers: list[Callable[[], bool]] = []  # the conditions that others wait for
        self._errors: list[Exception] = []  # raised by steps
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
        """Run steps, or let another thread run them, until a condition holds.

        Args:
            is_ready: the condition; called from other threads too.

        Raises:
            RankError: a rank died, hung or failed, or the ranks are gone.
        """
        own = threading.get_ident()
        try:
            while not is_ready():
                with self._changed:
                    if self._leader not in (None, own):
                        self._follow(is_ready)
                    elif not is_ready():
                        self._leader = own
                if self._leader == own:
                    self._lead(is_ready)
        finally:
            with self._changed:
                if self._leader == own:
                    self._leader = None
                    self._changed.notify_all()

    def _follow(self, is_ready: Callable[[], bool]) -> None:
        """Wait until the condition holds or there is no leader; raises a leader's error."""
        num_errors = len(self._errors)
        self._followers.append(is_ready)
        try:
            self._changed.wait_for(lambda: self._leader is None or is_ready())
        finally:
            self._followers.remove(is_ready)
        if len(self._errors) > num_errors and not is_ready():
            raise copy(self._errors[-1])

    def _lead(self, is_ready: Callable[[], bool]) -> None:
        """Run steps until the condition holds or another thread asks for the engine."""
        try:
            with self.exclusive():
                while not is_ready():
                    self._step()
                    if self._followers:
                        with self._changed:
                            if any(follower() for follower in self._followers):
                                self._changed.notify_all()
                    if len(self._turns) > 1 or self._to_cancel:
                        return
        except Exception as error:
            self._errors.append(error)
            raise

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
