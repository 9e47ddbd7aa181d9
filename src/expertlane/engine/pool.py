"""The launcher's side of all ranks: commands, answers, and an end to every wait."""

import contextlib
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, Generic, NoReturn, TypeVar

from expertlane.comm.progress import Position
from expertlane.engine.commands import Command, result_type
from expertlane.engine.fork_server import is_stopped
from expertlane.engine.local_ranks import LocalRanks
from expertlane.engine.messages import (
    Decoder,
    Failure,
    FailureKind,
    Message,
    MessageError,
    MessageKind,
    Ready,
    encode,
)
from expertlane.errors import ExpertlaneError, RankError, TerminatedError, UserError
from expertlane.spec.names import Stage

_POLL_S = 0.5
_OWN_PAUSE_S = 1.0  # a longer one is no fault of the ranks
_START_TIMEOUT_S = 120.0  # imports on a cold disk; no rank is in a step yet
_NODE_MARGIN_S = 2.0  # a rank that hangs is named first
_BLAME_WINDOW_S = 2.0  # how long to look for the cause after a symptom was reported
_FAILURE_WAIT_S = 0.5  # for a user's mistake that another rank has found

ResultT = TypeVar("ResultT")


class Ticket(Generic[ResultT]):
    """A command under way on some ranks.

    Args:
        decoder: of the answers.
    """

    def __init__(self, ranks: Sequence[int], decoder: Decoder[ResultT]) -> None:
        self.ranks = list(ranks)
        self.decoder = decoder
        self.results: dict[int, ResultT] = {}
        self.submitted_s = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether every rank has answered."""
        return len(self.results) == len(self.ranks)


class RankPool:
    """Ranks that stay alive from one deployment to the next.

    No wait is without an end: a rank that dies is noticed at once, and when
    no rank of a call has reported progress for `timeout_s`, the one that the others wait for is
    named. Either ends all ranks and raises.

    Args:
        ranks: started ranks; the pool owns and closes them.
        timeout_s: the longest time without any progress.

    Attributes:
        is_closed: whether the ranks are gone.

    Raises:
        RankError: from any method, when a rank died, hung or raised.
        UserError: from any method, when a rank found a mistake in what was asked for.
    """

    def __init__(self, ranks: LocalRanks, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._waiting: list[deque[Ticket[Any]]] = [deque() for _ in ranks.channels]
        self._pids: dict[int, int] = {}
        self.is_closed = False
        self._own_pid = os.getpid()
        self._resumed_s = 0.0  # when this process went on after it was stopped itself, as by Ctrl-Z
        self._poll = select.poll()  # kept: to make one a step costs a decode step a few percent
        for channel in (*ranks.controls, *ranks.channels):
            self._poll.register(channel.fileno(), select.POLLIN)
        self._decoders: dict[type[Command[Any]], Decoder[Any]] = {}
        started = Ticket(range(self.num_ranks), Decoder(Ready))
        for waiting in self._waiting:
            waiting.append(started)
        try:
            self._wait_for([started], max(timeout_s, _START_TIMEOUT_S))
        except BaseException:
            self.close(failed=True)
            raise
        for rank, ready in started.results.items():
            if rank < ranks.ranks_per_node:
                self._pids[rank] = ready.pid

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error_type is not None)

    @property
    def num_ranks(self) -> int:
        """Ranks in the pool."""
        return len(self._ranks.channels)

    def pid(self, rank: int) -> int | None:
        """The process of a rank on this machine; None for another node's."""
        return self._pids.get(rank)

    def position(self, rank: int) -> Position:
        """What a rank last reported."""
        return self._ranks.board.position(rank)

    def close(self, *, failed: bool = False) -> None:
        """End all ranks; may be called again.

        Args:
            failed: whether torchrun is to see a failure on all nodes.
        """
        if not self.is_closed and os.getpid() == self._own_pid:  # not for a process forked from it
            self.is_closed = True
            try:
                self._ranks.close(failed=failed)
            except (KeyboardInterrupt, TerminatedError):
                self._ranks.close(failed=True)  # a signal came in between: not before all is clean
                raise

    def call(
        self, command: Command[ResultT], *, ranks: Sequence[int] | None = None
    ) -> list[ResultT]:
        """Run a command on some ranks, all by default; results in rank order."""
        return self.collect(self.submit(command, ranks=ranks))

    def submit(
        self, command: Command[ResultT], *, ranks: Sequence[int] | None = None
    ) -> Ticket[ResultT]:
        """Begin a command on some ranks, all by default; each takes its commands in order."""
        return self.submit_each([(command, range(self.num_ranks) if ranks is None else ranks)])

    def submit_each(
        self, commands: Sequence[tuple[Command[ResultT], Sequence[int]]]
    ) -> Ticket[ResultT]:
        """Begin commands of one type, each on ranks of its own, under one ticket."""
        if self.is_closed:
            raise RankError("the ranks are gone; start new ones")
        if os.getpid() != self._own_pid:
            raise RankError("the ranks belong to the process that this one was forked from")
        ranks = sorted(rank for _, of_command in commands for rank in of_command)
        ticket = Ticket(ranks, self._decoder(commands[0][0]))
        for command, of_command in commands:
            encoded = encode(MessageKind.COMMAND, command)  # once for all
            for rank in of_command:
                self._waiting[rank].append(ticket)
                try:
                    self._ranks.channels[rank].send(encoded)
                except BlockingIOError:
                    self._fail(self._hang(ticket, self._timeout_s))
                except OSError:
                    self._fail(self._death(rank))
        return ticket

    def _decoder(self, command: Command[ResultT]) -> Decoder[ResultT]:
        kind = type(command)
        if kind not in self._decoders:
            self._decoders[kind] = Decoder(result_type(kind))
        return self._decoders[kind]

    def first_done(self, tickets: Sequence[Ticket[ResultT]]) -> Ticket[ResultT]:
        """Wait until one of the tickets is done, and give that one."""
        self._wait_for(tickets, self._timeout_s)
        return next(ticket for ticket in tickets if ticket.is_done)

    def collect(self, ticket: Ticket[ResultT]) -> list[ResultT]:
        """Wait for a ticket; its results in rank order."""
        self._wait_for([ticket], self._timeout_s)
        return [ticket.results[rank] for rank in ticket.ranks]

    def fail(self, error: RankError) -> NoReturn:
        """Treat ranks as failed, for what their answers have shown; raises the error."""
        self._fail(error)

    def on_told_to_end(self, react: Callable[[], None]) -> None:
        """Call this, from then on, where a node is told to end, instead of ending all at once."""
        self._ranks.on_told_to_end = react

    def check(self) -> None:
        """Notice what has happened while nothing was asked of the ranks; does not wait."""
        self._ranks.ping()
        self._receive_available(0)

    def _wait_for(self, tickets: Sequence[Ticket[Any]], bound_s: float) -> None:
        """Wait until one of the tickets is done."""
        while not any(ticket.is_done for ticket in tickets):
            self._ranks.ping()
            began_s, wait_s = time.monotonic(), min(_POLL_S, bound_s / 4)
            self._receive_available(wait_s)
            if time.monotonic() - began_s > wait_s + _OWN_PAUSE_S:
                self._resumed_s = time.monotonic()
            old_s = time.monotonic() - bound_s
            for ticket in tickets:
                if ticket.is_done or ticket.submitted_s > old_s:
                    continue
                if self._silent_s(ticket) > bound_s:
                    self._fail(self._hang(ticket, bound_s))
            try:
                self._ranks.check_answers(bound_s + _NODE_MARGIN_S, self._resumed_s)
            except RankError as error:
                self._fail(error)

    def _silent_s(self, ticket: Ticket[Any]) -> float:
        """Seconds since any rank of the ticket reported progress."""
        reported_s = max(self.position(rank).time_s for rank in ticket.ranks)
        return time.monotonic() - max(reported_s, ticket.submitted_s, self._resumed_s)

    def _receive_available(self, timeout_s: float) -> None:
        """Receive what ranks send, and notice those that ended, for up to `timeout_s`."""
        channels = self._ranks.channels
        ready = {descriptor for descriptor, _ in self._poll.poll(1e3 * timeout_s)}
        for rank in [r for r, channel in enumerate(channels) if channel.fileno() in ready]:
            try:
                self._take(rank, channels[rank].receive())
            except BlockingIOError:  # it stopped in the middle of a message
                self._fail(self._hang(Ticket([rank], Decoder(Ready)), self._timeout_s))
            except (EOFError, OSError):
                self._fail(self._death(rank))
            except MessageError as error:
                self._fail(RankError(f"rank {rank} sent an invalid message: {error}"))
        try:
            self._ranks.read_news(ready)
        except ExpertlaneError as error:
            self._fail(error)

    def _take(self, rank: int, message: Message) -> None:
        if message.kind is MessageKind.FAILURE:
            self._fail(self._blame(rank, self._failure(rank, message)))
        elif message.kind in (MessageKind.RESULT, MessageKind.READY) and self._waiting[rank]:
            ticket = self._waiting[rank][0]
            ticket.results[rank] = ticket.decoder.decode(message)
            self._waiting[rank].popleft()
        else:
            raise MessageError(f"{message.kind.name} was not expected")

    def _failure(self, rank: int, message: Message) -> Failure:
        failure = Decoder(Failure).decode(message)
        if failure.line is not None:
            self._ranks.board.update(rank, failure.line)
        return failure

    def _fail(self, error: ExpertlaneError) -> NoReturn:
        with contextlib.suppress(TerminatedError):  # by a batch system, for the same reason
            self.close(failed=True)
        raise error from None

    def _blame(self, rank: int, failure: Failure) -> ExpertlaneError:
        """The error behind a failure: a broken transfer is only a symptom of another rank's end."""
        if failure.kind is FailureKind.USER:
            return UserError(failure.text)
        is_symptom = failure.kind is not FailureKind.BUG
        until = time.monotonic() + (_BLAME_WINDOW_S if is_symptom else _FAILURE_WAIT_S)
        others = {r: c for r, c in enumerate(self._ranks.channels) if r != rank}
        while others and time.monotonic() < until:
            ready = wait([channel.fileno() for channel in others.values()], _POLL_S)
            for other in [r for r, channel in others.items() if channel.fileno() in ready]:
                try:
                    message = others[other].receive()
                except (EOFError, OSError, MessageError):
                    return self._death(other)
                if message.kind is MessageKind.FAILURE:
                    also = self._failure(other, message)
                    if also.kind is FailureKind.USER:
                        return UserError(also.text)
                    if is_symptom and also.kind is FailureKind.BUG:
                        return self._bug(other, also)
                    del others[other]
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

    def _death(self, rank: int) -> ExpertlaneError:
        try:
            code = self._ranks.exit_code(rank, _BLAME_WINDOW_S)
        except ExpertlaneError as error:
            return error
        if code is None:
            how = "is gone"
        elif code == -signal.SIGKILL:
            how = "was killed by SIGKILL (by someone, or by the system for lack of memory)"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return RankError(f"rank {rank} {how} in {self.position(rank)}; all ranks were ended")

    def _hang(self, ticket: Ticket[Any], bound_s: float) -> RankError:
        """A stopped process, else one that computes while others wait, else the longest silent."""
        busy = [rank for rank in ticket.ranks if rank not in ticket.results]
        stopped = [rank for rank in busy if self._is_stopped(rank)]

        def order(rank: int) -> tuple[bool, float]:
            position = self.position(rank)
            return position.waiting or position.stage is Stage.IDLE, position.time_s

        rank = stopped[0] if stopped else min(busy, key=order)
        why = " (its process is stopped)" if stopped else ""
        can_wait_longer = not stopped and bound_s == self._timeout_s
        remedy = "; if it was only slow, raise --timeout-s" if can_wait_longer else ""
        return RankError(
            f"rank {rank} hung in {self.position(rank)}{why}: no progress for {bound_s:g} s; "
            f"all ranks were ended{remedy}"
        )

    def _is_stopped(self, rank: int) -> bool:
        pid = self.pid(rank)
        return rank in self._ranks.stopped if pid is None else is_stopped(pid)
