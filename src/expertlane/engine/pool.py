"""The launcher's side of all ranks: calls, answers, and an end to every wait."""

import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol

import psutil

from expertlane.engine.messages import Call, Failure, FailureKind, Result
from expertlane.errors import ExpertlaneError, RankError, UserError
from expertlane.parallel.progress import Position, ProgressBoard
from expertlane.spec.names import Stage

_POLL_S = 0.5
_START_TIMEOUT_S = 120.0  # imports on a cold disk; no rank is in a step yet
_BLAME_WINDOW_S = 2.0  # how long to look for the cause after a victim has complained


class Ranks(Protocol):
    """What started the ranks and can end them."""

    connections: list[Connection]
    control: Any
    board: ProgressBoard

    def read_control(self) -> None:
        """Take in news of ranks that ended."""
        ...

    def exit_code(self, rank: int) -> int | None:
        """How a rank ended, None while not known."""
        ...

    def close(self) -> None:
        """End all ranks."""
        ...


class Ticket:
    """A call under way on some ranks."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self.ranks = list(ranks)
        self.results: dict[int, Any] = {}

    @property
    def is_done(self) -> bool:
        """Whether every rank has answered."""
        return len(self.results) == len(self.ranks)


class RankPool:
    """Ranks that stay alive from one deployment to the next.

    No wait is without an end (design, contract 3): a rank that dies is noticed at once, and when
    no rank has reported progress for `timeout_s` the one that the others wait for is named. Either
    ends all ranks and raises.

    Args:
        ranks: started ranks; the pool owns and closes them.
        timeout_s: the longest time without any progress.

    Raises:
        RankError: from any method, when a rank died, hung or raised.
        UserError: from any method, when a rank found a mistake in what was asked for.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._waiting: list[deque[Ticket]] = [deque() for _ in ranks.connections]
        self._closed = False
        self._pids: dict[int, int] = {}
        started = Ticket(range(self.num_ranks))
        for rank in started.ranks:
            self._waiting[rank].append(started)
        try:
            self._wait_until(lambda: started.is_done, max(timeout_s, _START_TIMEOUT_S))
        except BaseException:
            self.close()
            raise
        for rank, (host, pid) in started.results.items():
            if host == socket.gethostname():
                self._pids[rank] = pid

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def num_ranks(self) -> int:
        """Ranks in the pool."""
        return len(self._ranks.connections)

    @property
    def is_closed(self) -> bool:
        """Whether the ranks are gone."""
        return self._closed

    def pid(self, rank: int) -> int | None:
        """The process of a rank on this machine; None for another node's."""
        return self._pids.get(rank)

    def position(self, rank: int) -> Position:
        """What a rank last reported."""
        return self._ranks.board.position(rank)

    def close(self) -> None:
        """End all ranks; may be called again."""
        if not self._closed:
            self._closed = True
            self._ranks.close()

    def call(self, function: str, *args: Any, ranks: Sequence[int] | None = None) -> list[Any]:
        """Run `function` (`module:name`) on some ranks, all by default; results in rank order."""
        return self.collect(self.submit(function, *args, ranks=ranks))

    def submit(self, function: str, *args: Any, ranks: Sequence[int] | None = None) -> Ticket:
        """Begin `function(context, *args)` on some ranks; each takes its calls in order."""
        if self._closed:
            raise RankError("the ranks are gone; start new ones")
        ticket = Ticket(range(self.num_ranks) if ranks is None else ranks)
        for rank in ticket.ranks:
            try:
                self._ranks.connections[rank].send(Call(function, args))
            except BlockingIOError:
                self._fail(self._hang())
            except OSError:
                self._fail(self._death(rank))
            self._waiting[rank].append(ticket)
        return ticket

    def first_done(self, tickets: Sequence[Ticket]) -> Ticket:
        """Wait until one of the tickets is done, and give that one."""
        self._wait_until(lambda: any(ticket.is_done for ticket in tickets), self._timeout_s)
        return next(ticket for ticket in tickets if ticket.is_done)

    def collect(self, ticket: Ticket) -> list[Any]:
        """Wait for a ticket; its results in rank order."""
        self._wait_until(lambda: ticket.is_done, self._timeout_s)
        return [ticket.results[rank] for rank in ticket.ranks]

    def _wait_until(self, is_done: Callable[[], bool], bound_s: float) -> None:
        counters: list[int] = []
        changed_at = time.monotonic()
        while not is_done():
            if self._take_news(min(_POLL_S, bound_s / 4)):
                changed_at = time.monotonic()
            now_at = [self.position(rank).counter for rank in range(self.num_ranks)]
            if now_at != counters:
                counters, changed_at = now_at, time.monotonic()
            elif time.monotonic() - changed_at > bound_s:
                self._fail(self._hang())

    def _take_news(self, timeout_s: float) -> bool:
        """Take in answers and deaths for up to `timeout_s`; whether there were any answers."""
        connections = self._ranks.connections
        rank_of = {id(connection): rank for rank, connection in enumerate(connections)}
        answered = False
        for ready in wait([*connections, self._ranks.control], timeout_s):
            if ready is self._ranks.control:
                self._ranks.read_control()
                continue
            rank = rank_of[id(ready)]
            try:
                message = connections[rank].recv()
            except (EOFError, OSError):
                self._fail(self._death(rank))
            if isinstance(message, Failure):
                self._fail(self._blame(rank, message))
            assert isinstance(message, Result), "a rank answers with a result or a failure"
            self._waiting[rank].popleft().results[rank] = message.value
            answered = True
        return answered

    def _fail(self, error: ExpertlaneError) -> None:
        self.close()
        raise error from None

    def _blame(self, rank: int, failure: Failure) -> ExpertlaneError:
        """The error behind a failure: a broken transfer is only a symptom of another rank's end."""
        if failure.kind is FailureKind.USER:
            return UserError(failure.text)
        if failure.kind is FailureKind.BUG:
            error = RankError(f"rank {rank} failed in {self.position(rank)}: {failure.text}")
            error.add_note(failure.details)
            return error
        until = time.monotonic() + _BLAME_WINDOW_S
        others = {r: c for r, c in enumerate(self._ranks.connections) if r != rank}
        while others and time.monotonic() < until:
            ready = wait([*others.values(), self._ranks.control], _POLL_S)
            if self._ranks.control in ready:
                self._ranks.read_control()
            for other in [r for r, connection in others.items() if connection in ready]:
                try:
                    message = others[other].recv()
                except (EOFError, OSError):
                    return self._death(other)
                if isinstance(message, Failure):
                    if message.kind is not FailureKind.PEER:
                        return self._blame(other, message)
                    del others[other]
        if others:  # the ranks that said nothing are those that the others waited for
            return self._hang()
        return RankError(f"rank {rank} lost its peers in {self.position(rank)}: {failure.text}")

    def _death(self, rank: int) -> RankError:
        until = time.monotonic() + _BLAME_WINDOW_S
        while self._ranks.exit_code(rank) is None and time.monotonic() < until:
            if wait([self._ranks.control], _POLL_S):
                self._ranks.read_control()
        code = self._ranks.exit_code(rank)
        if code is None:
            how = "is gone"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return RankError(f"rank {rank} {how} in {self.position(rank)}; all ranks were ended")

    def _hang(self) -> RankError:
        rank, stopped = self._culprit()
        position = self.position(rank)
        why = " (its process is stopped)" if stopped else ""
        return RankError(
            f"rank {rank} hung in {position}{why}: no progress for {self._timeout_s:g} s; "
            "all ranks were ended"
        )

    def _culprit(self) -> tuple[int, bool]:
        """The rank that the others wait for, and whether its process is stopped.

        A stopped process, else one that computes while others wait, else the one silent longest.
        """
        busy = [rank for rank in range(self.num_ranks) if self._waiting[rank]]
        busy = busy or list(range(self.num_ranks))
        for rank in range(self.num_ranks):
            if self._is_stopped(rank):
                return rank, True

        def order(rank: int) -> tuple[bool, float]:
            position = self.position(rank)
            idle = position.waiting or position.stage is Stage.IDLE
            return idle, position.time_s

        return min(busy, key=order), False

    def _is_stopped(self, rank: int) -> bool:
        pid = self.pid(rank)
        try:
            return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False
