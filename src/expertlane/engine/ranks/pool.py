"""The launcher's handle of all ranks: commands and answers, with a bound on every wait."""

import os
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn, TypeVar

from expertlane.engine.comm.progress import Position
from expertlane.engine.ranks.commands import Command
from expertlane.engine.ranks.inbox import Inbox, Ticket
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.losses import Loss
from expertlane.engine.ranks.messages import ANY_EPOCH, MessageKind, encode
from expertlane.errors import CapacityError, RankError, RanksLostError, TerminatedError

_START_TIMEOUT_S = 120.0  # imports on a cold disk; no rank is in a step yet
_NUM_STARTS = 3  # epochs in which ranks may be lost before all have started

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
        is_closed: whether the ranks are gone.

    Raises:
        RankError: from any method: a rank died, hung or raised, or a node's fork server did.
        RanksLostError: from any method: ranks died, hung or raised, and the others stay.
        UserError: from any method: a rank found a user's mistake.
    """

    def __init__(self, ranks: LocalRanks, timeout_s: float) -> None:
        self._ranks = ranks
        self._inbox = Inbox(ranks, timeout_s, lambda: self.close(failed=True))
        self._presence = self._inbox.presence
        self._start_s = max(timeout_s, _START_TIMEOUT_S)
        self.is_closed = False
        self._own_pid = os.getpid()
        try:
            self._start()
        except BaseException:
            self.close(failed=True)
            raise

    def _start(self) -> None:
        """Wait until all ranks are up, and replace those that are lost meanwhile."""
        try:
            self._inbox.wait_until_up(self._start_s)
            return
        except RanksLostError as error:
            lost = error
        for _ in range(_NUM_STARTS - 1):
            try:
                self.begin_epoch(lost.ranks)
                return
            except RanksLostError as error:
                lost = error
        assert self._inbox.loss is not None, "what was raised"
        raise self._inbox.loss.error(recovers=False)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error_type is not None)

    @property
    def epoch(self) -> int:
        """The number of the current epoch, from 0."""
        return self._inbox.epoch

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
        self._inbox.waits = False

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
        num = self.num_ranks if num_ranks is None else num_ranks
        self._inbox.begin_epoch(lost, on_fenced, num, replaces=replaces, joining=joining)

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
            self._inbox.change(starts=ranks)
        except CapacityError:
            for rank in ranks:
                self._presence.drop(rank)
            raise

    def end(self, ranks: Collection[int]) -> None:
        """End those of the ranks that are ahead or starting."""
        self._check_usable()
        self._inbox.end_early(self._presence.early & frozenset(ranks), "it was ended")

    def on_early_end(self, log: Callable[[str], None]) -> None:
        """Set the function that is called with a line for each rank ahead that is lost."""
        self._inbox.log = log

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
        ticket = self._inbox.tickets.new(commands[0][0], ranks)
        for command, of_command in commands:
            epoch = self.epoch if needs_epoch else ANY_EPOCH
            encoded = encode(MessageKind.COMMAND, command, epoch)  # once for all
            for rank in of_command:
                try:
                    self._ranks.channels[rank].send(encoded)
                except BlockingIOError:
                    self._inbox.lose_hung(rank)
                except OSError:
                    self._inbox.lose_dead(rank)
        return ticket

    def _check_usable(self) -> None:
        self._check_open()
        self._inbox.check_whole()

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
        self._inbox.wait_for(tickets)
        return next(ticket for ticket in tickets if ticket.is_done)

    def collect(self, ticket: Ticket[ResultT]) -> list[ResultT]:
        """Wait for a ticket, and give its results in rank order.

        Raises:
            RankError: the ticket is lost: it will never be done.
        """
        self._inbox.wait_for([ticket])
        return [ticket.results[rank] for rank in ticket.ranks]

    def lose(self, loss: Loss) -> NoReturn:
        """Treat ranks as lost although they answer, since their answers have shown an error."""
        self._inbox.lose(lambda: loss)
        raise AssertionError("they are ranks of the epoch")

    def on_told_to_end(self, react: Callable[[], None]) -> None:
        """Set the function that is called when a node is told to end; else all end at once."""
        self._ranks.on_told_to_end = react

    def check(self) -> None:
        """Handle messages and losses that have arrived; does not wait."""
        self._inbox.check_whole()
        self._inbox.look()
