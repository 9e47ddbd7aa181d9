"""Tickets of commands under way, queued for each rank until it answers."""

import time
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from typing import Any, Generic, TypeVar

from expertlane.engine.ranks.commands import Command, result_type
from expertlane.engine.ranks.messages import Decoder, Message, MessageError

ResultT = TypeVar("ResultT")
NEW_EPOCH = "a new epoch began"


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
