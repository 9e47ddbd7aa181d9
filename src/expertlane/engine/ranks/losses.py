"""Ranks that have a process, ranks that are lost, and causes.

The cause is sought behind an ended, silent or failed rank, which may only show it.
"""

import contextlib
import select
import signal
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import wait
from typing import NamedTuple

from expertlane.engine.comm.progress import Position
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.messages import (
    Channel,
    Decoder,
    Failure,
    FailureKind,
    Message,
    MessageError,
    MessageKind,
)
from expertlane.engine.ranks.processes import is_stopped
from expertlane.errors import RankError, RanksLostError, UserError
from expertlane.spec.names import Stage

_POLL_S = 0.5
_BLAME_WINDOW_S = 2.0  # how long to look for the cause after a symptom was reported
_FAILURE_WAIT_S = 0.5  # for a user's mistake that another rank has found


class Change(NamedTuple):
    """Processes that end and start.

    Attributes:
        ends: numbers whose processes end and are not replaced.
        starts: numbers that get a new process; one that they may have ends.
    """

    ends: frozenset[int]
    starts: frozenset[int]


class Presence:
    """The state of each rank number: of this epoch, ahead of it, or without a process.

    Attributes:
        num_ranks: how many numbers this epoch has, those without a process included.
        present: ranks of this epoch.
        early: ranks started for a later epoch; below `num_ranks` or above.
        starting: ranks of both kinds whose processes are not up yet.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.present = frozenset(range(num_ranks))
        self.early: frozenset[int] = frozenset()
        self.starting = self.present

    @property
    def absent(self) -> frozenset[int]:
        """Numbers below `num_ranks` without a process."""
        return frozenset(range(self.num_ranks)) - self.present - self.early

    @property
    def ahead(self) -> frozenset[int]:
        """Ranks that are up and not of this epoch."""
        return self.early - self.starting

    def begin_epoch(
        self,
        lost: Collection[int],
        num_ranks: int,
        *,
        replaces: bool = True,
        joining: Collection[int] | None = None,
    ) -> Change:
        """Begin another epoch; for the arguments see `RankPool.begin_epoch`.

        Raises:
            ValueError: a number cannot join: it has no process ahead, or is not of the epoch.
        """
        new = frozenset(range(self.num_ranks, num_ranks))
        if joining is None:
            able = self.early if replaces else self.ahead
            joining = [rank for rank in able if rank < num_ranks]
        elif wrong := [r for r in joining if r not in self.early or r >= num_ranks]:
            raise ValueError(f"ranks {sorted(wrong)} are not ahead of an epoch of {num_ranks}")
        lost, joined = frozenset(lost), frozenset(joining) - frozenset(lost)
        starts: frozenset[int] = frozenset()
        if replaces:
            starts = frozenset(r for r in lost if r < num_ranks) | (new - self.early)
        stay = frozenset(r for r in self.present if r < num_ranks) - lost
        ends = (self.present - stay) | (self.early & lost)
        self.num_ranks = num_ranks
        self.present = stay | joined | starts
        self.early = self.early - lost - joined
        self.starting = (self.starting - ends) & (self.present | self.early) | starts
        return Change(ends - starts, starts)

    def start(self, ranks: Collection[int], most: int) -> None:
        """Register processes that begin to start.

        Raises:
            ValueError: a number has a process, or is not below `most`.
        """
        taken = self.present | self.early
        if wrong := [rank for rank in ranks if rank in taken or not 0 <= rank < most]:
            raise ValueError(f"ranks {sorted(wrong)} have a process, or are not below {most}")
        self.early |= frozenset(ranks)
        self.starting |= frozenset(ranks)

    def is_up(self, rank: int) -> None:
        """Register that a rank is up."""
        self.starting -= {rank}

    def drop(self, rank: int) -> None:
        """Register the end of an early rank's process."""
        self.early -= {rank}
        self.starting -= {rank}


class Loss(NamedTuple):
    """Ranks that are dead, hung or failed.

    Attributes:
        ranks: the lost ranks; empty where transfers broke and no rank was found to be the cause.
        text: one line, about one of them.
        remedy: advice to the user, if there is any.
        details: the traceback of a bug.
    """

    ranks: frozenset[int]
    text: str
    remedy: str = ""
    details: str = ""

    def error(self, *, recovers: bool) -> RankError:
        """The error of the loss.

        Args:
            recovers: whether the other ranks stay; else all were ended.
        """
        error = (
            RanksLostError(f"{self.text}{self.remedy}", self.ranks)
            if recovers
            else RankError(f"{self.text}; all ranks were ended{self.remedy}")
        )
        if self.details:
            error.add_note(self.details)
        return error

    def with_others(self, ranks: frozenset[int]) -> "Loss":
        """The loss with these ranks added."""
        return self._replace(ranks=self.ranks | ranks)

    def with_ended(self, ranks: frozenset[int]) -> "Loss":
        """The loss with these ranks added, and their number in the text."""
        more = len(ranks - self.ranks)
        also = f"; {more} other rank{'s' * (more > 1)} ended too" if more else ""
        return self.with_others(ranks)._replace(text=f"{self.text}{also}")


class Silence(NamedTuple):
    """Ranks that have a command and report no progress.

    Attributes:
        seconds: since the last report of any of them.
        rank: the likeliest cause, and `position` its last report.
        is_stopped: whether its process is stopped.
    """

    seconds: float
    rank: int
    position: Position
    is_stopped: bool

    def __str__(self) -> str:
        why = " (its process is stopped)" if self.is_stopped else ""
        where = f"in {self.position}"
        return f"rank {self.rank}{why} has reported nothing for {self.seconds:.0f} s, {where}"


class Losses:
    """Finds which ranks are lost.

    Args:
        presence: gives the ranks of the epoch, as only they can be the cause of another's failure.
        timeout_s: the pool's.
        take: takes other messages of ranks that arrive while the cause of a failure is sought.
    """

    def __init__(
        self,
        ranks: LocalRanks,
        presence: Presence,
        timeout_s: float,
        take: Callable[[int, Message], None],
    ) -> None:
        self._ranks, self._presence = ranks, presence
        self._timeout_s, self._take = timeout_s, take

    def _connected(self) -> dict[int, Channel]:
        """Channels of ranks of the epoch."""
        connected = self._ranks.connected()
        return {r: channel for r, channel in connected.items() if r in self._presence.present}

    def failure(self, rank: int, message: Message) -> Loss:
        """The loss behind a failure: a broken transfer is only a symptom of another rank's end.

        Raises:
            UserError: this rank, or another, found a user's mistake.
            ExpertlaneError: a node could not go on.
            MessageError: the message holds no failure.
        """
        failure = self._read(rank, message)
        bug = self._bug(rank, failure) if failure.kind is FailureKind.BUG else None
        until = time.monotonic() + (_FAILURE_WAIT_S if bug else _BLAME_WINDOW_S)
        others = {r: channel for r, channel in self._connected().items() if r != rank}
        while others and time.monotonic() < until:
            ready = wait([channel.fileno() for channel in others.values()], _POLL_S)
            for other in [r for r, channel in others.items() if channel.fileno() in ready]:
                try:
                    message = others[other].receive()
                except (EOFError, OSError, MessageError):
                    return self.death(other).with_others(bug.ranks if bug else frozenset())
                if message.kind is not MessageKind.FAILURE:
                    with contextlib.suppress(MessageError):
                        self._take(other, message)
                    continue
                also = self._read(other, message)
                if also.kind is FailureKind.BUG:
                    if bug is None:
                        return self._bug(other, also)
                    bug = bug.with_others(frozenset([other]))
                del others[other]
        return bug or Loss(
            frozenset(), f"rank {rank} lost its peers in {self._position(rank)}: {failure.text}"
        )

    def _read(self, rank: int, message: Message) -> Failure:
        failure = Decoder(Failure).decode(message)
        if failure.line is not None:
            self._ranks.board.update(rank, failure.line)
        if failure.kind is FailureKind.USER:
            raise UserError(failure.text)
        return failure

    def _bug(self, rank: int, failure: Failure) -> Loss:
        text = f"rank {rank} failed in {self._position(rank)}: {failure.text}"
        return Loss(frozenset([rank]), text, details=failure.details)

    def of_early(self, rank: int, message: Message) -> Loss:
        """The loss behind a failure of a rank that is not of the epoch, which is its own cause.

        Raises:
            MessageError: the message holds no failure.
        """
        failure = Decoder(Failure).decode(message)
        if failure.line is not None:
            self._ranks.board.update(rank, failure.line)
        return self._bug(rank, failure)

    def death(self, rank: int, wait_s: float = _BLAME_WINDOW_S) -> Loss:
        """The loss of a rank whose channel has been closed.

        Args:
            wait_s: how long to wait for its node's report of its exit code.

        Raises:
            ExpertlaneError: its node could not go on.
        """
        code = self._ranks.exit_code(rank, wait_s)
        if rank in self._ranks.missing:
            how = f"could not be started ({self._ranks.missing[rank]})"
        elif code is None:
            how = "is gone"
        elif code == -signal.SIGKILL:
            how = "was killed by SIGKILL (by someone, or by the system for lack of memory)"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return Loss(frozenset([rank]), f"rank {rank} {how} in {self._position(rank)}")

    def hang(self, busy: Sequence[int], bound_s: float) -> Loss:
        """The loss behind ranks that have made no progress.

        The lost ranks are those whose processes are stopped; else the one of `_silent`.

        Args:
            busy: ranks that have not answered.
            bound_s: the time without progress.

        Raises:
            ExpertlaneError: a node is silent.
        """
        self._ranks.check_nodes_of(busy, bound_s)
        stopped = [rank for rank in busy if self._is_stopped(rank)]
        rank = stopped[0] if stopped else self._silent(busy)
        why = " (its process is stopped)" if stopped else ""
        can_wait_longer = not stopped and bound_s == self._timeout_s
        return Loss(
            frozenset(stopped or [rank]),
            f"rank {rank} hung in {self._position(rank)}{why}: no progress for {bound_s:g} s",
            "; if it was only slow, raise --timeout-s" if can_wait_longer else "",
        )

    def silence(self, busy: Sequence[int], seconds: float) -> Silence:
        """Which of the ranks keeps the others waiting, as far as it can be seen; for any thread.

        Args:
            busy: ranks that have not answered, at least one.
            seconds: the time without progress.
        """
        stopped = next((rank for rank in busy if self._is_stopped(rank)), None)
        rank = self._silent(busy) if stopped is None else stopped
        position = self._ranks.board.position(rank)
        return Silence(seconds, rank, position, stopped is not None)

    def _silent(self, busy: Sequence[int]) -> int:
        """The rank that computes while others wait; else the one that has been silent longest."""

        def order(rank: int) -> tuple[bool, float]:
            position = self._ranks.board.position(rank)
            return position.waiting or position.stage is Stage.IDLE, position.time_s

        return min(busy, key=order)

    def _is_stopped(self, rank: int) -> bool:
        pid = self._ranks.pids.get(rank)
        return rank in self._ranks.stopped if pid is None else is_stopped(pid)

    def ended(self) -> frozenset[int]:
        """Ranks of the epoch that have ended by now, as far as can be seen at once."""
        poll, rank_of = select.poll(), {}
        for rank, channel in self._connected().items():
            poll.register(channel.fileno(), getattr(select, "POLLRDHUP", select.POLLHUP))
            rank_of[channel.fileno()] = rank
        return frozenset(rank_of[descriptor] for descriptor, _ in poll.poll(0))

    def _position(self, rank: int) -> str:
        return str(self._ranks.board.position(rank))
