"""Receives messages of ranks and nodes at the launcher, notices losses, and bounds every wait.

Each command under way has a ticket, queued for each of its ranks until they have answered.
"""

import contextlib
import select
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

from expertlane.engine.ranks.commands import Command, result_type
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.losses import Loss, Losses, Presence
from expertlane.engine.ranks.messages import (
    Decoder,
    Failure,
    FailureKind,
    Message,
    MessageError,
    MessageKind,
    Ready,
)
from expertlane.errors import ExpertlaneError, RankError, RanksLostError, TerminatedError

ResultT = TypeVar("ResultT")

NEW_EPOCH = "a new epoch began"
_POLL_S = 0.5
_OWN_PAUSE_S = 1.0  # after a longer pause of this process, ranks get more time
_NODE_MARGIN_S = 2.0  # longer, so that a rank that hangs is named before its node
_EARLY_LOOK_S = 0.5  # between checks of ranks that are not of the epoch
_EARLY_END_S = 0.2  # to learn how one of these ended; the others wait meanwhile


class Ticket(Generic[ResultT]):
    """A command under way on some ranks.

    Args:
        decoder: decodes the answers.
        needs_epoch: the command is dropped when another epoch begins.

    Attributes:
        results: answers so far, by rank.
        why_lost: why it will never be done; empty as long as it may be.
        submitted_s: when the command was submitted, on the monotonic clock.
    """

    def __init__(
        self, ranks: Sequence[int], decoder: Decoder[ResultT], *, needs_epoch: bool = True
    ) -> None:
        self.ranks = list(ranks)
        self.decoder, self.needs_epoch = decoder, needs_epoch
        self.results: dict[int, ResultT] = {}
        self.why_lost = ""
        self.submitted_s = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether every rank has answered."""
        return len(self.results) == len(self.ranks)

    @property
    def is_lost(self) -> bool:
        """Whether the call will never be done: a new epoch began, or one of its ranks is gone."""
        return bool(self.why_lost)

    @property
    def busy(self) -> list[int]:
        """Ranks that have not answered."""
        return [rank for rank in self.ranks if rank not in self.results]


class Tickets:
    """The tickets that ranks have not answered, in order for each rank."""

    def __init__(self) -> None:
        self._waiting: defaultdict[int, deque[Ticket[Any]]] = defaultdict(deque)
        self._decoders: dict[type[Command[Any]], Decoder[Any]] = {}

    def new(self, command: Command[ResultT], ranks: Sequence[int]) -> Ticket[ResultT]:
        """A ticket for a command, or others of its type, that each of the ranks gets next."""
        kind = type(command)
        if kind not in self._decoders:
            self._decoders[kind] = Decoder(result_type(kind))
        ticket = Ticket(ranks, self._decoders[kind], needs_epoch=kind.needs_epoch)
        for rank in ranks:
            self._waiting[rank].append(ticket)
        return ticket

    def take(self, rank: int, message: Message) -> None:
        """Take a rank's answer to its oldest command.

        Raises:
            MessageError: it is of another type, or no answer is due.
        """
        if not (waiting := self._waiting[rank]):
            raise MessageError(f"{message.kind.name} was not expected")
        waiting[0].results[rank] = waiting[0].decoder.decode(message)
        waiting.popleft()

    def waits_since_s(self, rank: int) -> float | None:
        """When the rank's oldest unanswered command was submitted; None without one."""
        waiting = self._waiting.get(rank)
        return waiting[0].submitted_s if waiting else None

    def lose_epoch(self) -> None:
        """Drop all commands of the epoch before; those that need no epoch go on."""
        for rank, waiting in self._waiting.items():
            for ticket in waiting:
                if ticket.needs_epoch:
                    ticket.why_lost = NEW_EPOCH
            self._waiting[rank] = deque(each for each in waiting if not each.needs_epoch)

    def lose_ranks(self, ranks: Collection[int], why: str) -> None:
        """Drop the commands of ranks that ended; others may still answer theirs."""
        for rank in ranks:
            for ticket in self._waiting.pop(rank, ()):
                ticket.why_lost = why


class Inbox:
    """Messages and losses of a pool. Methods that wait raise the errors that `RankPool` states.

    Args:
        timeout_s: the longest time without any progress.
        end: ends all ranks.

    Attributes:
        presence: the state of each rank number.
        tickets: commands that ranks have not answered.
        epoch: the number of the current epoch.
        loss: the loss of ranks of this epoch, if any, until another epoch begins.
        waits: whether lost nodes are waited for; if not, their loss ends all ranks.
        log: called with a line when a rank that is not of the epoch is gone.
    """

    def __init__(self, ranks: LocalRanks, timeout_s: float, end: Callable[[], None]) -> None:
        self._ranks, self._timeout_s, self._end = ranks, timeout_s, end
        self.presence, self.tickets = Presence(len(ranks.channels)), Tickets()
        self.epoch = 0
        self.loss: Loss | None = None
        self.waits = True
        self.log: Callable[[str], None] = lambda line: None
        self._losses = Losses(ranks, self.presence, timeout_s, self._take_answer)
        self._replaced: frozenset[int] = frozenset()  # while an epoch begins
        self._resumed_s = 0.0  # when this process went on after it was stopped itself, as by Ctrl-Z
        self._looked_s = 0.0  # time of the last check of early ranks
        self._started_s: dict[int, float] = {}  # start times of early ranks
        self.watch()

    def watch(self) -> None:
        """Register all present connections with the poll.

        The poll is kept from one wait to the next: a new one for each step would cost a few percent
        of it.
        """
        self._poll = select.poll()
        channels = *(node.control for node in self._ranks.nodes), *self._ranks.connected().values()
        for channel in channels:
            if channel.fileno() >= 0:  # else its node is lost
                self._poll.register(channel.fileno(), select.POLLIN)
        if (acceptor := self._ranks.acceptor()) is not None:
            self._poll.register(acceptor, select.POLLIN)

    def begin_epoch(
        self,
        lost: Collection[int],
        on_fenced: Callable[[], None],
        num_ranks: int,
        *,
        replaces: bool,
        joining: Collection[int] | None,
    ) -> None:
        """Begin an epoch, and wait until all its ranks are up; see `RankPool.begin_epoch`."""
        lost = self._replaced | frozenset(lost)  # with those of an epoch that has not begun wholly
        change = self.presence.begin_epoch(lost, num_ranks, replaces=replaces, joining=joining)
        self.epoch += 1
        self.loss, self._replaced = None, change.starts
        self.tickets.lose_epoch()
        self.tickets.lose_ranks(change.starts | change.ends, "a rank was lost")
        try:
            self._ranks.begin_epoch(self.epoch, change.ends, change.starts, num_ranks)
        except ExpertlaneError as error:
            self.fail(error)
        self.watch()
        while self._ranks.is_beginning:
            self._wait_once(self._timeout_s)
        on_fenced()
        self.wait_until_up(self._timeout_s)  # there is nothing to import
        self._replaced = frozenset()

    def check_whole(self) -> None:
        """Raise the loss of this epoch, if there is one."""
        if self.loss is not None:
            raise self.loss.error(recovers=True)

    def look(self) -> None:
        """Process what has arrived; does not wait."""
        self._ranks.ping()
        self._receive_available(0)
        self._look_at_early()

    def wait_for(self, tickets: Sequence[Ticket[Any]]) -> None:
        """Wait until one of the tickets is done."""
        bound_s = self._timeout_s
        while not any(ticket.is_done for ticket in tickets):
            self.check_whole()
            if lost := next((ticket for ticket in tickets if ticket.is_lost), None):
                raise RankError(f"a command was dropped because {lost.why_lost}")
            self._wait_once(bound_s)
            old_s = time.monotonic() - bound_s
            for ticket in tickets:
                if ticket.is_done or ticket.submitted_s > old_s:
                    continue
                if self._silent_s(ticket.ranks, ticket.submitted_s) > bound_s:
                    self.lose(partial(self._losses.hang, ticket.busy, bound_s))

    def wait_until_up(self, bound_s: float) -> None:
        """Wait until no rank of the epoch is starting."""
        presence, since_s = self.presence, time.monotonic()
        while starting := presence.starting & presence.present:
            self.check_whole()
            self._wait_once(bound_s)
            if self._ranks.awaited:  # for longer
                since_s = time.monotonic()
            still = presence.starting & starting
            stopped = still & self._ranks.stopped
            if stopped and self._silent_s(stopped, since_s) > self._timeout_s:
                self.lose(partial(self._losses.hang, sorted(stopped), self._timeout_s))
            if still and self._silent_s(starting, since_s) > bound_s:
                self.lose(partial(self._losses.hang, sorted(still), bound_s))

    def _wait_once(self, bound_s: float) -> None:
        """Wait for messages of ranks and nodes, for a limited time."""
        self._ranks.ping()
        began_s, wait_s = time.monotonic(), min(_POLL_S, bound_s / 4)
        self._receive_available(wait_s)
        if time.monotonic() - began_s > wait_s + _OWN_PAUSE_S:
            self._resumed_s = time.monotonic()
        try:
            self._ranks.check_answers(bound_s + _NODE_MARGIN_S, self._resumed_s)
        except RanksLostError as error:
            self._lose_node(error)
        except RankError as error:
            self.fail(error)
        if not self.waits and self._ranks.awaited:
            self.fail(RankError("told to end while a node was lost; all ranks were ended"))
        self._look_at_early()

    def _silent_s(self, ranks: Collection[int], since_s: float) -> float:
        """Seconds without progress of any of these ranks, at most those since a time."""
        reported_s = max(self._ranks.board.position(rank).time_s for rank in ranks)
        return time.monotonic() - max(reported_s, since_s, self._resumed_s)

    def _look_at_early(self) -> None:
        """Detect early ranks that hang: no wait covers them, as they are not of the epoch."""
        now_s = time.monotonic()
        if not self.presence.early or now_s - self._looked_s < _EARLY_LOOK_S:
            return
        self._looked_s = now_s
        for rank in self.presence.early:
            if rank in self.presence.starting:
                since_s: float | None = self._started_s[rank]
            else:
                since_s = self.tickets.waits_since_s(rank)
            if since_s is not None and self._silent_s([rank], since_s) > self._timeout_s:
                self._drop(rank, partial(self._losses.hang, [rank], self._timeout_s))

    def _receive_available(self, timeout_s: float) -> None:
        """Receive what ranks send, and notice those that ended, for up to `timeout_s`."""
        channels = self._ranks.channels
        ready = {descriptor for descriptor, _ in self._poll.poll(1e3 * timeout_s)}
        for rank in [r for r, channel in enumerate(channels) if channel.fileno() in ready]:
            try:
                self._take(rank, channels[rank].receive())
            except BlockingIOError:  # it stopped in the middle of a message
                self.lose_hung(rank)
            except (EOFError, OSError):
                self.lose_dead(rank)
            except MessageError as error:
                text = f"rank {rank} sent an invalid message: {error}"
                self._lose_one(rank, partial(Loss, frozenset([rank]), text))
        try:
            self._ranks.read_news(ready)
        except RanksLostError as error:
            self._lose_node(error)
        except ExpertlaneError as error:
            self.fail(error)
        for rank in [*self._ranks.missing]:
            if rank in self.presence.early:
                self._drop(rank, partial(self._losses.death, rank, 0.0))
            self._ranks.missing.pop(rank, None)
        is_expecting = self._ranks.away or self._ranks.acceptor() in ready
        if is_expecting and self._ranks.has_connected():
            self.watch()

    def _take(self, rank: int, message: Message) -> None:
        if message.kind is not MessageKind.FAILURE:
            self._take_answer(rank, message)
        elif rank in self.presence.early:
            self._drop(rank, partial(self._losses.of_early, rank, message))
        elif not self._is_past(message):
            self.lose(partial(self._losses.failure, rank, message))

    def _is_past(self, message: Message) -> bool:
        """Whether a failure is a broken transfer of an older epoch; its rank then goes on."""
        if message.epoch == self.epoch:
            return False
        return Decoder(Failure).decode(message).kind is FailureKind.PEER

    def _take_answer(self, rank: int, message: Message) -> None:
        kind = message.kind
        if kind is MessageKind.READY and rank in self.presence.starting:
            ready = Decoder(Ready).decode(message)
            self.presence.is_up(rank)
            if self._ranks.node_of(rank) == 0:
                self._ranks.pids[rank] = ready.pid
        elif kind is not MessageKind.RESULT:
            raise MessageError(f"{kind.name} was not expected")
        elif message.epoch >= self.epoch:  # else of a command that was dropped
            self.tickets.take(rank, message)

    def lose_hung(self, rank: int) -> None:
        """Treat a rank that stopped within a message as hanging."""
        self._lose_one(rank, partial(self._losses.hang, [rank], self._timeout_s))

    def lose_dead(self, rank: int) -> None:
        """Handle the end of a rank's channel."""
        wait_s = (_EARLY_END_S,) if rank in self.presence.early else ()
        self._lose_one(rank, partial(self._losses.death, rank, *wait_s))

    def _lose_one(self, rank: int, find: Callable[[], Loss]) -> None:
        if rank in self.presence.early:
            self._drop(rank, find)
        else:
            self.lose(find)

    def lose(self, find: Callable[[], Loss]) -> None:
        """Record a loss and raise it, until the next epoch; without recovery end all ranks.

        Lost ranks that are not of this epoch are only dropped.

        Args:
            find: gives the loss; an error that it raises ends all ranks.
        """
        try:
            loss = find()
        except MessageError as error:
            loss = Loss(frozenset(), f"a rank sent an invalid message: {error}")
        except RanksLostError as error:  # with their node
            self.watch()
            loss = Loss(error.ranks, str(error))
        except ExpertlaneError as error:
            self.fail(error)
        early = loss.ranks & self.presence.early
        for rank in early:
            self._drop(rank, lambda: loss)
        if early and early == loss.ranks:
            return
        loss = loss._replace(ranks=loss.ranks - early).with_ended(self._losses.ended())
        if not self._ranks.recovers:
            self.fail(loss.error(recovers=False))
        self.loss = loss.with_others(self._replaced)
        raise self.loss.error(recovers=True) from None

    def _lose_node(self, error: RanksLostError) -> None:
        """Lose all ranks of a node, whether they are of the epoch or not."""
        self.watch()  # its connections are closed
        if ranks := error.ranks & (self.presence.present | self.presence.early):
            self.lose(lambda: Loss(ranks, str(error)))
        else:
            self.log(f"{error}; none of its ranks was in use")

    def _drop(self, rank: int, find: Callable[[], Loss]) -> None:
        """End a rank that is not of the epoch, and log the reason."""
        try:
            text = find().text
        except MessageError as error:
            text = f"rank {rank} sent an invalid message: {error}"
        except ExpertlaneError as error:
            self.fail(error)
        self._ranks.missing.pop(rank, None)
        if rank in self.presence.early:  # still: its node may have said it meanwhile
            self.end_early([rank], text)
            self.log(f"{text}; it was not in use yet")

    def end_early(self, ranks: Collection[int], why: str) -> None:
        """End ranks that are not of the epoch; their tickets are lost for that reason."""
        for rank in ranks:
            self.presence.drop(rank)
        self.tickets.lose_ranks(ranks, why)
        self.change(ends=ranks)

    def change(self, *, starts: Collection[int] = (), ends: Collection[int] = ()) -> None:
        """Start and end processes of ranks that are not of the epoch.

        Raises:
            CapacityError: no descriptors are left; nothing has begun.
        """
        self._started_s |= dict.fromkeys(starts, time.monotonic())
        try:
            self._ranks.change(starts=starts, ends=ends)
        except RankError as error:
            self.fail(error)
        self.watch()

    def fail(self, error: ExpertlaneError) -> NoReturn:
        """End all ranks, and raise the error."""
        with contextlib.suppress(TerminatedError):  # by a batch system, for the same reason
            self._end()
        raise error from None
