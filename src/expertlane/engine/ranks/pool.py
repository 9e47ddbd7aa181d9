"""The launcher's handle of all ranks: commands and answers, with a bound on every wait."""

import contextlib
import os
import select
import time
from collections.abc import Callable, Collection, Container, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from expertlane.engine.comm.progress import Position
from expertlane.engine.ranks.commands import Command, Ticket, Tickets
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.losses import Loss, Losses, Presence, Silence
from expertlane.engine.ranks.messages import (
    ANY_EPOCH,
    Decoder,
    Failure,
    FailureKind,
    Message,
    MessageError,
    MessageKind,
    Ready,
    encode,
)
from expertlane.errors import (
    CapacityError,
    ExpertlaneError,
    RankError,
    RanksLostError,
    TerminatedError,
)

_START_TIMEOUT_S = 120.0  # imports on a cold disk; no rank is in a step yet
_NUM_STARTS = 3  # epochs in which ranks may be lost before all have started
_POLL_S = 0.5
_PING_S = 1.0  # between questions to a node
_OWN_PAUSE_S = 1.0  # after a longer pause of this process, ranks get more time
_NODE_MARGIN_S = 2.0  # longer, so that a rank that hangs is named before its node
_EARLY_LOOK_S = 0.5  # between checks of ranks that are not of the epoch
_EARLY_END_S = 0.2  # to learn how one of these ended; the others wait meanwhile

ResultT = TypeVar("ResultT")


class RankPool:
    """Ranks that stay alive from one deployment to the next.

    Every wait has a bound: a rank that dies is noticed at once, and when no rank of a call has
    reported progress for `timeout_s`, the one that the others wait for is named. Either ends all
    ranks and raises, unless the ranks recover: then the others stay, and every method raises the
    same until `begin_epoch`. A rank number may be *absent*, without a process, and a process may be
    started *ahead*, for a later epoch: the loss of such a process is no loss of this epoch.

    Args:
        ranks: started ranks; the pool owns and closes them.
        timeout_s: the longest time without any progress.

    Attributes:
        epoch: the number of the current epoch, from 0.
        is_closed: whether the ranks are gone.

    Raises:
        RankError: from any method: a rank died, hung or raised, or a node's fork server did.
        RanksLostError: from any method: ranks died, hung or raised, and the others stay.
        UserError: from any method: a rank found a user's mistake.
    """

    def __init__(self, ranks: LocalRanks, timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._presence, self._tickets = Presence(len(ranks.channels)), Tickets()
        self._losses = Losses(ranks, self._presence, timeout_s, self._take_answer)
        self.epoch = 0
        self._loss: Loss | None = None
        self._replaced: frozenset[int] = frozenset()  # while an epoch begins
        self._waits = True  # for lost nodes
        self._log: Callable[[str], None] = lambda line: None
        self._resumed_s = 0.0  # when this process went on after it was stopped itself, as by Ctrl-Z
        self._asked_s = 0.0  # when nodes were asked last
        self._looked_s = 0.0  # time of the last check of early ranks
        self._checked_s = 0.0  # time of the last `check`
        self._started_s: dict[int, float] = {}  # start times of early ranks
        self.is_closed = False
        self._own_pid = os.getpid()
        try:
            self._watch()
            self._start()
        except BaseException:
            self.close(failed=True)
            raise

    def _start(self) -> None:
        """Wait until all ranks are up, and replace those that are lost meanwhile."""
        begin = partial(self._wait_until_up, max(self._timeout_s, _START_TIMEOUT_S))
        for _ in range(_NUM_STARTS):
            try:
                begin()
                return
            except RanksLostError as error:
                begin = partial(self.begin_epoch, error.ranks)
        assert self._loss is not None, "what was raised"
        raise self._loss.error(recovers=False)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error_type is not None)

    @property
    def num_ranks(self) -> int:
        """Number of this epoch's ranks, absent ones included."""
        return self._presence.num_ranks

    @property
    def present(self) -> frozenset[int]:
        """Ranks of this epoch."""
        return self._presence.present

    @property
    def absent(self) -> frozenset[int]:
        """Numbers below `num_ranks` without a process."""
        return self._presence.absent

    @property
    def away(self) -> frozenset[int]:
        """Ranks of nodes that are lost; `start` must not be called for them."""
        return self._ranks.away

    @property
    def starting(self) -> frozenset[int]:
        """Ranks that `start` has begun to start, and that are not up yet."""
        return self._presence.early & self._presence.starting

    @property
    def ahead(self) -> frozenset[int]:
        """Ranks that `start` has started, that are up, and are not of this epoch."""
        return self._presence.ahead

    def pid(self, rank: int) -> int | None:
        """The process of a rank on this machine; None for another node's."""
        return self._ranks.pids.get(rank)

    def position(self, rank: int) -> Position:
        """A rank's last report."""
        return self._ranks.board.position(rank)

    def close(self, *, failed: bool = False) -> None:
        """End all ranks; may be called again.

        Args:
            failed: whether supervisors end with an error, so that torchrun sees one on all nodes.
        """
        if not self.is_closed and os.getpid() == self._own_pid:  # not for a process forked from it
            self.is_closed = True
            try:
                self._ranks.close(failed=failed)
            except (KeyboardInterrupt, TerminatedError):
                self._ranks.close(failed=True)  # a signal came in between: not before all is clean
                raise

    def stop_waiting(self) -> None:
        """Stop waiting for lost nodes; their loss then ends all ranks. For any thread."""
        self._waits = False

    @property
    def most_ranks(self) -> int:
        """The most ranks that `begin_epoch` can start; on several nodes the number is fixed."""
        return self.num_ranks if self.is_of_nodes else self._ranks.board.num_lines

    @property
    def is_of_nodes(self) -> bool:
        """Whether the ranks are on several nodes."""
        return len(self._ranks.nodes) > 1

    def begin_epoch(
        self,
        lost: Collection[int],
        on_fenced: Callable[[], None] = lambda: None,
        num_ranks: int | None = None,
        *,
        replaces: bool = True,
        joining: Collection[int] | None = None,
    ) -> None:
        """Begin an epoch in which lost ranks are replaced or absent; returns when all are up.

        All commands under way are dropped, except those that need no epoch: the other ranks
        abandon them at once where they wait for ranks, else when they are done. No lost rank is
        alive on return, and messages of lost ranks are refused.

        Args:
            lost: ranks that are lost, absent ones allowed; empty to begin a new epoch after
                transfers broke without a lost rank.
            on_fenced: called when no lost rank is alive any more, before others are up.
            num_ranks: the number of ranks from then on, up to `most_ranks`: the last ones end, or
                more start; as many as before if None.
            replaces: start ranks for `lost` and for additional numbers; else they are absent.
            joining: ranks of `ahead` and `starting`, below `num_ranks`, that join this epoch. If
                None, all that are ahead join, and with `replaces` all that are starting too. The
                others stay as they are, also above `num_ranks`.

        Raises:
            RanksLostError: more ranks were lost meanwhile; it names all that are to be replaced.
            ValueError: a rank of `joining` cannot join.
        """
        self._check_open()
        num_ranks = self.num_ranks if num_ranks is None else num_ranks
        lost = self._replaced | frozenset(lost)  # with those of an epoch that has not begun wholly
        change = self._presence.begin_epoch(lost, num_ranks, replaces=replaces, joining=joining)
        self.epoch += 1
        self._loss, self._replaced = None, change.starts
        self._tickets.lose_epoch()
        self._tickets.lose_ranks(change.starts | change.ends, "a rank was lost")
        try:
            self._ranks.begin_epoch(self.epoch, change.ends, change.starts, num_ranks)
        except ExpertlaneError as error:
            self._fail(error)
        self._watch()
        while self._ranks.is_beginning:
            self._wait_once(self._timeout_s)
        on_fenced()
        self._wait_until_up(self._timeout_s)  # there is nothing to import
        self._replaced = frozenset()

    def start(self, ranks: Collection[int]) -> None:
        """Begin to start ranks that are absent, or additional ones; does not wait for them.

        They are `starting`, then `ahead`, and take commands that need no epoch. One that is lost is
        absent again, and the function of `on_early_end` is called.

        Raises:
            CapacityError: no descriptors are left; nothing has begun.
            ValueError: a number has a process, or is not below `most_ranks`.
        """
        self._check_usable()
        self._presence.start(ranks, self.most_ranks)
        try:
            self._change(starts=ranks)
        except CapacityError:
            for rank in ranks:
                self._presence.drop(rank)
            raise

    def end(self, ranks: Collection[int]) -> None:
        """End those of the ranks that are ahead or starting."""
        self._check_usable()
        self._end_early(self._presence.early & frozenset(ranks), "it was ended")

    def on_early_end(self, log: Callable[[str], None]) -> None:
        """Set the function that is called with a line for each rank ahead that is lost."""
        self._log = log

    def call(
        self, command: Command[ResultT], *, ranks: Sequence[int] | None = None
    ) -> list[ResultT]:
        """Run a command on some ranks, all by default; results in rank order."""
        return self.collect(self.submit(command, ranks=ranks))

    def submit(
        self, command: Command[ResultT], *, ranks: Sequence[int] | None = None
    ) -> Ticket[ResultT]:
        """Begin a command on some ranks, all of the epoch by default; each takes them in order."""
        return self.submit_each([(command, sorted(self.present) if ranks is None else ranks)])

    def submit_each(
        self, commands: Sequence[tuple[Command[ResultT], Sequence[int]]]
    ) -> Ticket[ResultT]:
        """Begin commands of one type, each on its own ranks, under one ticket.

        Raises:
            ValueError: a rank is absent, or not of the epoch that the commands need.
        """
        self._check_usable()
        needs_epoch = commands[0][0].needs_epoch
        ranks = sorted(rank for _, of_command in commands for rank in of_command)
        if wrong := {*ranks} - self.present - (frozenset() if needs_epoch else self.ahead):
            raise ValueError(f"ranks {sorted(wrong)} take no {type(commands[0][0]).__name__}")
        ticket = self._tickets.new(commands[0][0], ranks)
        for command, of_command in commands:
            epoch = self.epoch if needs_epoch else ANY_EPOCH
            encoded = encode(MessageKind.COMMAND, command, epoch)  # once for all
            for rank in of_command:
                try:
                    self._ranks.channels[rank].send(encoded)
                except BlockingIOError:
                    self._lose_hung(rank)
                except OSError:
                    self._lose_dead(rank)
        return ticket

    def _check_usable(self) -> None:
        self._check_open()
        self._check_whole()

    def _check_open(self) -> None:
        if self.is_closed:
            raise RankError("the ranks are gone; start new ones")
        if os.getpid() != self._own_pid:
            raise RankError("the ranks belong to the process that this one was forked from")

    def first_done(self, tickets: Sequence[Ticket[ResultT]]) -> Ticket[ResultT]:
        """Wait until one of the tickets is done, and give it.

        Raises:
            RankError: a ticket is lost: it will never be done.
        """
        bound_s = self._timeout_s
        while not (done := [ticket for ticket in tickets if ticket.is_done]):
            self._check_whole()
            if lost := next((ticket for ticket in tickets if ticket.is_lost), None):
                raise RankError(f"a command was dropped because {lost.why_lost}")
            self._wait_once(bound_s)
            old_s = time.monotonic() - bound_s
            for ticket in tickets:
                if ticket.is_done or ticket.submitted_s > old_s:
                    continue
                if self._silence_of(ticket) > bound_s:
                    self._lose(partial(self._losses.hang, ticket.busy, bound_s))
        return done[0]

    def collect(self, ticket: Ticket[ResultT]) -> list[ResultT]:
        """Wait for a ticket, and give its results in rank order.

        Raises:
            RankError: the ticket is lost: it will never be done.
        """
        self.first_done([ticket])
        return [ticket.results[rank] for rank in ticket.ranks]

    def lose(self, loss: Loss) -> NoReturn:
        """Treat ranks as lost although they answer, since their answers have shown an error."""
        self._lose(lambda: loss)
        raise AssertionError("they are ranks of the epoch")

    def on_told_to_end(self, react: Callable[[], None]) -> None:
        """Set the function that is called when a node is told to end; else all end at once."""
        self._ranks.on_told_to_end = react

    def check(self) -> None:
        """Handle messages and losses that have arrived; does not wait.

        To be called once a second while nothing is waited for: ranks that hang then are noticed.
        """
        self._check_whole()
        now_s = time.monotonic()
        if now_s - self._checked_s > _PING_S + _OWN_PAUSE_S:
            self._resumed_s = now_s  # else all that was not waited for would be silence
        self._checked_s = now_s
        if now_s - self._asked_s >= _PING_S:
            self._ask_nodes()
        self._receive_available(0)
        self._look_at_early()
        for ticket in self._tickets.waiting():
            if ticket.needs_epoch and self._silence_of(ticket) > self._timeout_s:
                self._lose(partial(self._losses.hang, ticket.busy, self._timeout_s))

    def silence(self) -> Silence | None:
        """The longest silence of ranks that have a command of the epoch; for any thread.

        It is what `timeout_s` bounds: a rank that is waited for so long is lost.

        Returns:
            None where no rank has a command.
        """
        found = [
            (self._silence_of(ticket), busy)
            for ticket in self._tickets.waiting()
            if ticket.needs_epoch and (busy := ticket.busy)
        ]
        if not found:
            return None
        seconds, busy = max(found)
        return self._losses.silence(busy, seconds)

    def _silence_of(self, ticket: Ticket[Any]) -> float:
        return self._silent_s(ticket.ranks, ticket.submitted_s)

    def _watch(self) -> None:
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

    def _check_whole(self) -> None:
        """Raise the loss of this epoch, if there is one."""
        if self._loss is not None:
            raise self._loss.error(recovers=True)

    def _wait_until_up(self, bound_s: float) -> None:
        """Wait until no rank of the epoch is starting."""
        presence, since_s = self._presence, time.monotonic()
        while starting := presence.starting & presence.present:
            self._check_whole()
            self._wait_once(bound_s)
            if self._ranks.awaited:  # for longer
                since_s = time.monotonic()
            still = presence.starting & starting
            stopped = still & self._ranks.stopped
            if stopped and self._silent_s(stopped, since_s) > self._timeout_s:
                self._lose(partial(self._losses.hang, sorted(stopped), self._timeout_s))
            if still and self._silent_s(starting, since_s) > bound_s:
                self._lose(partial(self._losses.hang, sorted(still), bound_s))

    def _wait_once(self, bound_s: float) -> None:
        """Wait for messages of ranks and nodes, for a limited time."""
        began_s, wait_s = time.monotonic(), min(_POLL_S, bound_s / 4)
        is_due = began_s - self._asked_s >= _PING_S
        if is_due:
            self._ask_nodes()
        self._receive_available(wait_s)
        if time.monotonic() - began_s > wait_s + _OWN_PAUSE_S:
            self._resumed_s = time.monotonic()
        if is_due:
            self._check_answers(bound_s)
        if not self._waits and self._ranks.awaited:
            self._fail(RankError("told to end while a node was lost; all ranks were ended"))
        self._look_at_early()

    def _ask_nodes(self) -> None:
        self._asked_s = time.monotonic()
        self._ranks.ping()

    def _check_answers(self, bound_s: float) -> None:
        """Detect nodes that do not answer."""
        try:
            self._ranks.check_answers(bound_s + _NODE_MARGIN_S, self._resumed_s)
        except RanksLostError as error:
            self._lose_node(error)
        except RankError as error:
            self._fail(error)

    def _silent_s(self, ranks: Collection[int], since_s: float) -> float:
        """Seconds without progress of any of these ranks, at most those since a time."""
        reported_s = max(self._ranks.board.position(rank).time_s for rank in ranks)
        return time.monotonic() - max(reported_s, since_s, self._resumed_s)

    def _look_at_early(self) -> None:
        """Detect early ranks that hang: no wait covers them, as they are not of the epoch."""
        now_s = time.monotonic()
        if not self._presence.early or now_s - self._looked_s < _EARLY_LOOK_S:
            return
        self._looked_s = now_s
        for rank in self._presence.early:
            if rank in self._presence.starting:
                since_s: float | None = self._started_s[rank]
            else:
                since_s = self._tickets.waits_since_s(rank)
            if since_s is not None and self._silent_s([rank], since_s) > self._timeout_s:
                self._lose_hung(rank)

    def _receive_available(self, timeout_s: float) -> None:
        """Receive what ranks send, and notice those that ended, for up to `timeout_s`."""
        channels = self._ranks.channels
        ready = {descriptor for descriptor, _ in self._poll.poll(1e3 * timeout_s)}
        for rank in [r for r, channel in enumerate(channels) if channel.fileno() in ready]:
            ready.discard(channels[rank].fileno())
            try:
                self._take(rank, channels[rank].receive())
            except BlockingIOError:  # it stopped in the middle of a message
                self._lose_hung(rank)
            except (EOFError, OSError):
                self._lose_dead(rank)
            except MessageError as error:
                text = f"rank {rank} sent an invalid message: {error}"
                self._lose(partial(Loss, frozenset([rank]), text))
        if ready or self._ranks.accepts:
            self._read_news(ready)
        for rank in [*self._ranks.missing]:
            if rank in self._presence.early:
                self._lose(partial(self._losses.death, rank, 0.0))
            self._ranks.missing.pop(rank, None)
        if self._ranks.accepts:
            is_expecting = self._ranks.away or self._ranks.acceptor() in ready
            if is_expecting and self._ranks.has_connected():
                self._watch()

    def _read_news(self, ready: Container[int]) -> None:
        """Take in what nodes send."""
        try:
            self._ranks.read_news(ready)
        except RanksLostError as error:
            self._lose_node(error)
        except ExpertlaneError as error:
            self._fail(error)

    def _take(self, rank: int, message: Message) -> None:
        if message.kind is not MessageKind.FAILURE:
            self._take_answer(rank, message)
        elif rank in self._presence.early:
            loss = self._losses.of_early(rank, message)
            self._lose(lambda: loss)
        elif not self._is_past(message):
            self._lose(partial(self._losses.failure, rank, message))

    def _is_past(self, message: Message) -> bool:
        """Whether a failure is a broken transfer of an older epoch; its rank then goes on."""
        if message.epoch == self.epoch:
            return False
        return Decoder(Failure).decode(message).kind is FailureKind.PEER

    def _take_answer(self, rank: int, message: Message) -> None:
        kind = message.kind
        if kind is MessageKind.READY and rank in self._presence.starting:
            ready = Decoder(Ready).decode(message)
            self._presence.is_up(rank)
            if self._ranks.node_of(rank) == 0:
                self._ranks.pids[rank] = ready.pid
        elif kind is not MessageKind.RESULT:
            raise MessageError(f"{kind.name} was not expected")
        elif message.epoch >= self.epoch:  # else of a command that was dropped
            self._tickets.take(rank, message)

    def _lose_hung(self, rank: int) -> None:
        """Treat a rank that made no progress, or stopped within a message, as hanging."""
        self._lose(partial(self._losses.hang, [rank], self._timeout_s))

    def _lose_dead(self, rank: int) -> None:
        """Handle the end of a rank's channel."""
        wait_s = (_EARLY_END_S,) if rank in self._presence.early else ()
        self._lose(partial(self._losses.death, rank, *wait_s))

    def _lose(self, find: Callable[[], Loss]) -> None:
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
            self._lose_node(error)
            return
        except ExpertlaneError as error:
            self._fail(error)
        early = loss.ranks & self._presence.early
        for rank in early:
            self._drop(rank, loss.text)
        if early and early == loss.ranks:
            return
        loss = loss._replace(ranks=loss.ranks - early).with_ended(self._losses.ended())
        if not self._ranks.recovers:
            self._fail(loss.error(recovers=False))
        self._loss = loss.with_others(self._replaced)
        raise self._loss.error(recovers=True) from None

    def _lose_node(self, error: RanksLostError) -> None:
        """Lose all ranks of a node, whether they are of the epoch or not."""
        self._watch()  # its connections are closed
        if ranks := error.ranks & (self._presence.present | self._presence.early):
            self._lose(lambda: Loss(ranks, str(error)))
        else:
            self._log(f"{error}; none of its ranks was in use")

    def _drop(self, rank: int, why: str) -> None:
        """End a rank that is not of the epoch, and log the reason."""
        self._ranks.missing.pop(rank, None)
        self._end_early([rank], why)
        self._log(f"{why}; it was not in use yet")

    def _end_early(self, ranks: Collection[int], why: str) -> None:
        """End ranks that are not of the epoch; their tickets are lost for that reason."""
        for rank in ranks:
            self._presence.drop(rank)
        self._tickets.lose_ranks(ranks, why)
        self._change(ends=ranks)

    def _change(self, *, starts: Collection[int] = (), ends: Collection[int] = ()) -> None:
        """Start and end processes of ranks that are not of the epoch.

        Raises:
            CapacityError: no descriptors are left; nothing has begun.
        """
        self._started_s |= dict.fromkeys(starts, time.monotonic())
        try:
            self._ranks.change(starts=starts, ends=ends)
        except RankError as error:
            self._fail(error)
        self._watch()

    def _fail(self, error: ExpertlaneError) -> NoReturn:
        """End all ranks, and raise the error."""
        with contextlib.suppress(TerminatedError):  # by a batch system, for the same reason
            self.close(failed=True)
        raise error from None
