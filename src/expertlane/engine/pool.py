"""The launcher's side of all ranks: calls, answers, and an end to every wait."""

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, NoReturn, Protocol

import psutil

from expertlane.engine.messages import Call, Failure, FailureKind, Heartbeat
from expertlane.errors import ExpertlaneError, RankError, TerminatedError, UserError
from expertlane.parallel.progress import Position, ProgressBoard
from expertlane.spec.names import Stage

_POLL_S = 0.5
_START_TIMEOUT_S = 120.0  # imports on a cold disk; no rank is in a step yet
_BLAME_WINDOW_S = 2.0  # how long to look for the cause after a victim has complained
_LAST_WORDS_S = 0.5


class Ranks(Protocol):
    """What started the ranks and can end them.

    Attributes:
        connections: one a rank.
        control: readable when there is news of ranks that ended.
        reports_exits: whether `exit_code` will come to know how any rank ended.
    """

    connections: list[Connection]
    control: socket.socket
    board: ProgressBoard
    reports_exits: bool

    def read_control(self) -> str | None:
        """Take in news; a line if the ranks can no longer be watched, else None."""
        ...

    def exit_code(self, rank: int) -> int | None:
        """How a rank ended, negative for a signal; None while not known."""
        ...

    def close(self) -> None:
        """End all ranks."""
        ...


class Ticket:
    """A call under way on some ranks."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.results: dict[int, Any] = {}
        self.submitted_s = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether every rank has answered."""
        return len(self.results) == len(self.ranks)


class RankPool:
    """Ranks that stay alive from one deployment to the next.

    No wait is without an end (design, contract 3): a rank that dies is noticed at once, and when
    no rank of a call has reported progress for `timeout_s`, the one that the others wait for is
    named. Either ends all ranks and raises.

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
        self._pids: dict[int, int] = {}
        self._closed = False
        self._poll = select.poll()  # kept: to make one a step costs a decode step a few percent
        for descriptor in (ranks.control.fileno(), *(c.fileno() for c in ranks.connections)):
            self._poll.register(descriptor, select.POLLIN)
        started = Ticket(range(self.num_ranks))
        for waiting in self._waiting:
            waiting.append(started)
        try:
            self._wait_for([started], lambda: started.is_done, max(timeout_s, _START_TIMEOUT_S))
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
            try:
                self._ranks.close()
            except (KeyboardInterrupt, TerminatedError):
                self._ranks.close()  # a signal came in between: not before all is clean
                raise

    def call(self, function: str, *args: Any, ranks: Sequence[int] | None = None) -> list[Any]:
        """Run `function` (`module:name`) on some ranks, all by default; results in rank order."""
        return self.collect(self.submit(function, *args, ranks=ranks))

    def submit(self, function: str, *args: Any, ranks: Sequence[int] | None = None) -> Ticket:
        """Begin `function(context, *args)` on some ranks; each takes its calls in order."""
        if self._closed:
            raise RankError("the ranks are gone; start new ones")
        ticket = Ticket(range(self.num_ranks) if ranks is None else ranks)
        call = ForkingPickler.dumps(Call(function, args))  # once for all
        for rank in ticket.ranks:
            self._waiting[rank].append(ticket)
            try:
                self._ranks.connections[rank].send_bytes(call)
            except BlockingIOError:
                self._fail(self._hang(ticket, self._timeout_s))
            except OSError:
                self._fail(self._death(rank))
        return ticket

    def first_done(self, tickets: Sequence[Ticket]) -> Ticket:
        """Wait until one of the tickets is done, and give that one."""
        self._wait_for(tickets, lambda: any(ticket.is_done for ticket in tickets), self._timeout_s)
        return next(ticket for ticket in tickets if ticket.is_done)

    def collect(self, ticket: Ticket) -> list[Any]:
        """Wait for a ticket; its results in rank order."""
        self._wait_for([ticket], lambda: ticket.is_done, self._timeout_s)
        return [ticket.results[rank] for rank in ticket.ranks]

    def _wait_for(
        self, tickets: Sequence[Ticket], is_done: Callable[[], bool], bound_s: float
    ) -> None:
        try:
            while not is_done():
                self._take_news(min(_POLL_S, bound_s / 4))
                old_s = time.monotonic() - bound_s
                for ticket in tickets:
                    if ticket.is_done or ticket.submitted_s > old_s:
                        continue
                    if self._silent_s(ticket) > bound_s:
                        self._fail(self._hang(ticket, bound_s))
        except TerminatedError:
            if not self._closed:
                self._take_news(_LAST_WORDS_S)  # torchrun ends us when a rank has died: say which
            raise

    def _silent_s(self, ticket: Ticket) -> float:
        """Seconds since any rank of the ticket reported progress."""
        reported_s = max(self.position(rank).time_s for rank in ticket.ranks)
        return time.monotonic() - max(reported_s, ticket.submitted_s)

    def _take_news(self, timeout_s: float) -> None:
        """Take in answers and deaths for up to `timeout_s`."""
        connections = self._ranks.connections
        ready = {descriptor for descriptor, _ in self._poll.poll(1e3 * timeout_s)}
        for rank in [r for r, connection in enumerate(connections) if connection.fileno() in ready]:
            try:
                message = connections[rank].recv()
            except (EOFError, OSError):
                self._fail(self._death(rank))
            if isinstance(message, Failure):
                self._fail(self._blame(rank, message))
            elif isinstance(message, Heartbeat):
                self._ranks.board.update(rank, message.cells)
            else:
                self._waiting[rank].popleft().results[rank] = message.value
        if self._ranks.control.fileno() in ready and (lost := self._ranks.read_control()):
            self._fail(RankError(lost))

    def _fail(self, error: ExpertlaneError) -> NoReturn:
        with contextlib.suppress(TerminatedError):  # by torchrun, for the same reason
            self.close()
        raise error from None

    def _blame(self, rank: int, failure: Failure) -> ExpertlaneError:
        """The error behind a failure: a broken transfer is only a symptom of another rank's end."""
        if failure.kind is FailureKind.USER:
            return UserError(failure.text)
        is_symptom = failure.kind is not FailureKind.BUG
        until = time.monotonic() + (_BLAME_WINDOW_S if is_symptom else _LAST_WORDS_S)
        others = {r: c for r, c in enumerate(self._ranks.connections) if r != rank}
        while others and time.monotonic() < until:
            ready = wait(list(others.values()), _POLL_S)
            for other in [r for r, connection in others.items() if connection in ready]:
                try:
                    message = others[other].recv()
                except (EOFError, OSError):
                    return self._death(other)
                if isinstance(message, Failure):
                    if message.kind is FailureKind.USER:
                        return UserError(message.text)
                    if is_symptom and message.kind is FailureKind.BUG:
                        return self._bug(other, message)
                    del others[other]
        if failure.kind is FailureKind.TERMINATED:
            return TerminatedError(failure.text)
        if is_symptom:
            return RankError(
                f"rank {rank} lost its peers in {self.position(rank)}: {failure.text}; "
                "all ranks were ended"
            )
        return self._bug(rank, failure)

    def _bug(self, rank: int, failure: Failure) -> RankError:
        error = RankError(
            f"rank {rank} failed in {self.position(rank)}: {failure.text}; all ranks were ended"
        )
        error.add_note(failure.details)
        return error

    def _death(self, rank: int) -> RankError:
        until = time.monotonic() + (_BLAME_WINDOW_S if self._ranks.reports_exits else 0.0)
        while self._ranks.exit_code(rank) is None and time.monotonic() < until:
            if wait([self._ranks.control], _POLL_S) and (lost := self._ranks.read_control()):
                return RankError(lost)
        code = self._ranks.exit_code(rank)
        if code is None:
            how = "is gone"
        elif code == -signal.SIGKILL:
            how = "was killed by SIGKILL (by someone, or by the system for lack of memory)"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return RankError(f"rank {rank} {how} in {self.position(rank)}; all ranks were ended")

    def _hang(self, ticket: Ticket, bound_s: float) -> RankError:
        """A stopped process, else one that computes while others wait, else the longest silent."""
        busy = [rank for rank in ticket.ranks if rank not in ticket.results]
        stopped = [rank for rank in busy if self._is_stopped(rank)]

        def order(rank: int) -> tuple[bool, float]:
            position = self.position(rank)
            return position.waiting or position.stage is Stage.IDLE, position.time_s

        rank = stopped[0] if stopped else min(busy, key=order)
        if stopped:  # torchrun would wait half a minute for it to end by itself
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[rank], signal.SIGKILL)
        why = " (its process is stopped)" if stopped else ""
        remedy = "" if stopped else "; if it was only slow, raise --timeout-s"
        return RankError(
            f"rank {rank} hung in {self.position(rank)}{why}: no progress for {bound_s:g} s; "
            f"all ranks were ended{remedy}"
        )

    def _is_stopped(self, rank: int) -> bool:
        pid = self.pid(rank)
        try:
            return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False
