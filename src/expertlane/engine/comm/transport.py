"""What groups of ranks need of a transport; `torch_transport` and `shared_memory` provide it."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from expertlane.engine.ops.row_parts import RowParts
from expertlane.errors import RankError


class PeerLostError(RankError):
    """A transfer failed or timed out: some other rank is the cause."""


class EpochEndedError(RankError):
    """A later epoch has begun: what was under way in this one comes to nothing."""


class Work(Protocol):
    """A transfer in flight."""

    def wait(self) -> None:
        """Block until it is done.

        Raises:
            PeerLostError: another rank is gone, sent something else, or did not answer in time.
            EpochEndedError: a later epoch has begun.
        """
        ...

    def read(self, finish: Callable[[RowParts], Tensor]) -> Tensor:
        """`finish` of what came, after the wait: it stays where it is until that returns."""
        ...

    def let_go(self) -> None:
        """Block until a send goes on without this rank, which may do something else for long.

        Raises:
            PeerLostError, EpochEndedError: as `wait`.
        """
        ...


class AtOnce(Protocol):
    """Begins a transfer, and waits for it."""

    def __call__(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        *,
        same_for_all: bool = False,
        finish: Callable[[RowParts], Tensor] | None = None,
    ) -> Tensor:
        """`all_to_all`, or `all_gather` of what is the same for all.

        Returns:
            [sum(receive), width], or what `finish` makes of it.
        """
        ...


class Link(Protocol):
    """Transfers among the ranks of one group; every rank of it begins them in the same order.

    Rows are contiguous, [num_rows, width]. What is sent must stay as it is until the wait is over.

    """

    @property
    def at_once(self) -> AtOnce | None:
        """None where that is no cheaper."""
        ...

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Room for rows where the transport would have them: to be filled, sent once, let alone."""
        ...

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> Work:
        """Send `send[place]` rows to each place, and fill `received` in the order of places."""
        ...

    def all_to_all_parts(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Work:
        """`all_to_all` of what the work's `read` makes something else of."""
        ...

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> Work:
        """Send all rows to every place, and fill `received` in the order of places."""
        ...

    def padded_to(self, num_rows_of: Sequence[int], row_bytes: int) -> int | None:
        """How many rows every place sends in a gather, or gets in a sum; None for its own number.

        Those that a sum of the group's own sends are never padded.
        """
        ...

    def reduce_scatter(
        self, rows: Tensor, num_rows_of: Sequence[int]
    ) -> tuple[Work, Tensor] | None:
        """Add up the rows of all, and give each place its part; None where the group is to do so.

        Returns:
            What to wait for, and [num_rows_of[place], width], which is there then.
        """
        ...

    def send(self, rows: Tensor, to: int) -> Work:
        """Send all rows to one place."""
        ...

    def receive(self, rows: Tensor, source: int) -> Work:
        """Fill `rows` from one place."""
        ...


class Transport(Protocol):
    """Makes the links of groups, in one epoch."""

    def make(self, ranks: tuple[int, ...]) -> None:
        """Make a group; collective over *all* ranks that may ever talk, in the same order.

        Raises:
            PeerLostError, EpochEndedError: as a wait for others.
        """
        ...

    def link(self, ranks: tuple[int, ...]) -> Link:
        """Of a group that was made and has the caller in it."""
        ...

    def leave(self) -> None:
        """End what is under way, for others too, and let go of all groups."""
        ...
