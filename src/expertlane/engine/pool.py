"""The launcher's side of all ranks: commands, answers, and an end to every wait."""

import contextlib
import os
import select
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

from expertlane.comm.progress import Position
from expertlane.engine.commands import Command, result_type
from expertlane.engine.local_ranks import LocalRanks
from expertlane.engine.losses import Loss, Losses
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
from expertlane.errors import ExpertlaneError, RankError, RanksLostError, TerminatedError

_POLL_S = 0.5
_OWN_PAUSE_S = 1.0  # a longer one is no fault of the ranks
_START_TIMEOUT_S = 120.0  # imports on a cold disk; no rank is in a step yet
_NUM_STARTS = 3  # epochs in which ranks may be lost before all have started
_NODE_MARGIN_S = 2.0  # a rank that hangs is named first

ResultT = TypeVar("ResultT")


class Ticket(Generic[ResultT]):
    """A command under way on some ranks.

    Args:
        decoder: of the answers.
        epoch: it comes to nothing when another one begins.
    """

    def __init__(self, ranks: Sequence[int], decoder: Decoder[ResultT], epoch: int) -> None:
        self.ranks = list(ranks)
        self.decoder, self.epoch = decoder, epoch
        self.results: dict[int, ResultT] = {}
        self.submitted_s = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether every rank has answered."""
        return len(self.results) == len(self.ranks)

    @property
    def busy(self) -> list[int]:
        """Ranks that have not answered."""
        return [rank for rank in self.ranks if rank not in self.results]


class RankPool:
    """Ranks that stay alive from one deployment to the next.

    No wait is without an end: a rank that dies is noticed at once, and when
    no rank of a call has reported progress for `timeout_s`, the one that the others wait for is
    named. Either ends all ranks and raises, unless the ranks recover: then the others stay, and
    every method raises the same until `begin_epoch`.

    Args:
        ranks: started ranks; the pool owns and closes them.
        timeout_s: the longest time without any progress.

    Attributes:
        is_closed: whether the ranks are gone.
        epoch: how often other ranks took the places of lost ones.

    Raises:
        RankError: from any method, when a rank died, hung or raised, or a node's fork server.
        RanksLostError: the same where the others stay; never of a fork server.
        UserError: from any method, when a rank found a mistake in what was asked for.
    """

    def __init__(self, ranks: LocalRanks, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._losses = Losses(ranks, timeout_s, self._take_answer)
        self._waiting: list[deque[Ticket[Any]]] = [deque() for _ in ranks.channels]
        self.is_closed = False
        self.epoch = 0
        self._loss: Loss | None = None  # until another epoch begins
        self._replaced: frozenset[int] = frozenset()  # while one begins
        self._starting = set(range(self.num_ranks))
        self._own_pid = os.getpid()
        self._resumed_s = 0.0  # when this process went on after it was stopped itself, as by Ctrl-Z
        self._poll = self._poll_of(range(self.num_ranks))
        self._decoders: dict[type[Command[Any]], Decoder[Any]] = {}
        try:
            self._start()
        except BaseException:
            self.close(failed=True)
            raise

    def _poll_of(self, ranks: Collection[int]) -> select.poll:
        """Kept from one wait to the next: to make one a step costs it a few percent."""
        poll = select.poll()
        for channel in (*self._ranks.controls, *(self._ranks.channels[rank] for rank in ranks)):
            poll.register(channel.fileno(), select.POLLIN)
        return poll

    def _start(self) -> None:
        """Wait until all ranks are up; those that are lost meanwhile are replaced."""
        try:
            self._wait_for([self._started()], max(self._timeout_s, _START_TIMEOUT_S))
            return
        except RanksLostError as error:
            lost = error
        for _ in range(_NUM_STARTS - 1):
            try:
                self.begin_epoch(lost.ranks)
                return
            except RanksLostError as error:
                lost = error
        assert self._loss is not None, "what was raised"
        raise self._loss.error(recovers=False)

    def _started(self) -> Ticket[Ready]:
        """For the ranks that are not up yet to say so."""
        started = Ticket(sorted(self._starting), Decoder(Ready), self.epoch)
        for rank in started.ranks:
            self._waiting[rank].append(started)
        return started

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
        return self._ranks.pids.get(rank)

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

    @property
    def most_ranks(self) -> int:
        """That `begin_epoch` may be asked for; those of several nodes stay as many as they are."""
        return self.num_ranks if self.is_of_nodes else self._ranks.board.num_lines

    @property
    def is_of_nodes(self) -> bool:
        """Whether there are several."""
        return len(self._ranks.controls) > 1

    def begin_epoch(
        self,
        lost: Collection[int],
        on_fenced: Callable[[], None] = lambda: None,
        num_ranks: int | None = None,
    ) -> None:
        """Replace lost ranks by others; returns when these are up.

        All commands under way come to nothing: the other ranks leave them at once where they wait
        for ranks, else when they are done. No lost rank is alive then, and what is still on its
        way from it is refused.

        Args:
            lost: none for a new epoch alone, which parts ranks whose transfers broke.
            on_fenced: called when no lost rank is alive any more, before others are up.
            num_ranks: how many there are from then on, up to `most_ranks`: the last ones end, or
                more start; as many as before if not given.

        Raises:
            RanksLostError: more ranks are lost by now: of all those that are to be replaced.
        """
        self._check_open()
        self.epoch += 1
        num = self.num_ranks if num_ranks is None else num_ranks
        self._loss = None
        lost = self._replaced | frozenset(lost)  # with those of an epoch that has not begun wholly
        self._replaced = frozenset([*(r for r in lost if r < num), *range(self.num_ranks, num)])
        self._starting = {r for r in self._starting if r < num} | self._replaced
        self._waiting = [deque() for _ in range(num)]
        started = self._started()
        others = [rank for rank in range(num) if rank not in self._replaced]
        self._poll = self._poll_of(others)
        try:
            self._ranks.begin_epoch(self.epoch, self._replaced, num_ranks)
        except ExpertlaneError as error:
            self._fail(error)
        self._watch_connected()
        if (acceptor := self._ranks.acceptor()) is not None and self._replaced:
            self._poll.register(acceptor, select.POLLIN)
        while self._ranks.is_beginning:
            self._wait_once(self._timeout_s)
        on_fenced()
        self._wait_for([started], self._timeout_s)  # there is nothing to import
        if acceptor is not None and self._replaced:
            self._poll.unregister(acceptor)
        self._replaced = frozenset()

    def _watch_connected(self) -> None:
        for rank in self._ranks.take_connected():
            self._poll.register(self._ranks.channels[rank].fileno(), select.POLLIN)

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
        self._check_usable()
        ranks = sorted(rank for _, of_command in commands for rank in of_command)
        ticket = Ticket(ranks, self._decoder(commands[0][0]), self.epoch)
        for command, of_command in commands:
            encoded = encode(MessageKind.COMMAND, command, self.epoch)  # once for all
            for rank in of_command:
                self._waiting[rank].append(ticket)
                try:
                    self._ranks.channels[rank].send(encoded)
                except BlockingIOError:
                    self._lose(partial(self._losses.hang, ticket.busy, self._timeout_s))
                except OSError:
                    self._lose(partial(self._losses.death, rank))
        return ticket

    def _check_usable(self) -> None:
        self._check_open()
        self._check_whole()

    def _check_whole(self) -> None:
        if self._loss is not None:
            raise self._loss.error(recovers=True)

    def _check_open(self) -> None:
        if self.is_closed:
            raise RankError("the ranks are gone; start new ones")
        if os.getpid() != self._own_pid:
            raise RankError("the ranks belong to the process that this one was forked from")

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

    def lose(self, loss: Loss) -> NoReturn:
        """Treat ranks that answer as lost, for what their answers have shown."""
        self._lose(lambda: loss)

    def on_told_to_end(self, react: Callable[[], None]) -> None:
        """Call this, from then on, where a node is told to end, instead of ending all at once."""
        self._ranks.on_told_to_end = react

    def check(self) -> None:
        """Notice what has happened while nothing was asked of the ranks; does not wait."""
        self._check_whole()
        self._ranks.ping()
        self._receive_available(0)

    def _wait_for(self, tickets: Sequence[Ticket[Any]], bound_s: float) -> None:
        """Wait until one of the tickets is done."""
        while not any(ticket.is_done for ticket in tickets):
            self._check_whole()
            if any(ticket.epoch < self.epoch for ticket in tickets):
                raise RankError("a command was dropped because a new epoch began")
            self._wait_once(bound_s)
            old_s = time.monotonic() - bound_s
            for ticket in tickets:
                if ticket.is_done or ticket.submitted_s > old_s:
                    continue
                if self._silent_s(ticket) > bound_s:
                    self._lose(partial(self._losses.hang, ticket.busy, bound_s))

    def _wait_once(self, bound_s: float) -> None:
        """Wait a while for what ranks and nodes send."""
        self._ranks.ping()
        began_s, wait_s = time.monotonic(), min(_POLL_S, bound_s / 4)
        self._receive_available(wait_s)
        if time.monotonic() - began_s > wait_s + _OWN_PAUSE_S:
            self._resumed_s = time.monotonic()
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
                self._lose(partial(self._losses.hang, [rank], self._timeout_s))
            except (EOFError, OSError):
                self._lose(partial(self._losses.death, rank))
            except MessageError as error:
                text = f"rank {rank} sent an invalid message: {error}"
                self._lose(partial(Loss, frozenset([rank]), text))
        try:
            self._ranks.read_news(ready)
        except ExpertlaneError as error:
            self._fail(error)
        if self._ranks.acceptor() in ready:
            self._watch_connected()

    def _take(self, rank: int, message: Message) -> None:
        if message.kind is not MessageKind.FAILURE:
            self._take_answer(rank, message)
        elif not self._is_past(message):
            self._lose(partial(self._losses.failure, rank, message))

    def _is_past(self, message: Message) -> bool:
        """Whether a failure was only a transfer's, in an older epoch; its rank goes on."""
        if message.epoch == self.epoch:
            return False
        return Decoder(Failure).decode(message).kind is FailureKind.PEER

    def _take_answer(self, rank: int, message: Message) -> None:
        kind = message.kind
        if kind is MessageKind.RESULT and message.epoch < self.epoch:
            return  # of a command that came to nothing
        if kind not in (MessageKind.RESULT, MessageKind.READY) or not self._waiting[rank]:
            raise MessageError(f"{kind.name} was not expected")
        ticket = self._waiting[rank][0]
        result = ticket.results[rank] = ticket.decoder.decode(message)
        self._waiting[rank].popleft()
        if kind is MessageKind.READY:
            self._starting.discard(rank)
            if rank < self._ranks.ranks_per_node:
                self._ranks.pids[rank] = result.pid

    def _lose(self, find: Callable[[], Loss]) -> NoReturn:
        """End all ranks for a loss, or wait for another epoch.

        Args:
            find: gives it; what it raises ends all ranks.
        """
        try:
            loss = find()
        except MessageError as error:
            loss = Loss(frozenset(), f"a rank sent an invalid message: {error}")
        except ExpertlaneError as error:
            self._fail(error)
        if not self._ranks.recovers:
            self._fail(loss.error(recovers=False))
        self._loss = loss.with_others(self._losses.ended() | self._replaced)
        raise self._loss.error(recovers=True) from None

    def _fail(self, error: ExpertlaneError) -> NoReturn:
        with contextlib.suppress(TerminatedError):  # by a batch system, for the same reason
            self.close(failed=True)
        raise error from None
