"""The interface of transports: see `torch_transport`, `shared_memory` and `composed`."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.errors import RankError


class PeerLostError(RankError):
    """A transfer failed or timed out: some other rank is the cause."""


class EpochEndedError(RankError):
    """A later epoch has begun: the transfers and steps of this one are abandoned."""


class Work(Protocol):
    """A transfer in flight.

    Attributes:
        received: filled with the rows that come, after the wait; None where none are to be read.
    """

    received: Tensor | None = None

    def wait(self) -> None:
        """Block until the transfer is done.

        Raises:
            PeerLostError: another rank is gone, sent something else, or did not answer in time.
            EpochEndedError: a later epoch has begun.
        """
        ...

    def read(self, finish: Callable[[RowParts], Tensor]) -> Tensor:
        """The result of `finish` on the rows received, after the wait.

        The rows stay valid only until `finish` returns.
        """
        assert self.received is not None, "rows came, and in one piece"
        return finish(RowParts.of(self.received))

    def let_go(self) -> None:
        """Block until a send goes on without this rank, which may do something else for long.

        Raises:
            PeerLostError: another rank is gone, sent something else, or did not answer in time.
            EpochEndedError: a later epoch has begun.
        """
        ...


class AtOnce(Protocol):
    """A function that begins a transfer, and waits for it."""

    def __call__(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        *,
        same_for_all: bool = False,
        finish: Callable[[RowParts], Tensor] | None = None,
    ) -> Tensor:
        """Do an `all_to_all`, or an `all_gather` if rows are the same for all.

        Returns:
            [sum(receive), width], or the result of `finish` on it.
        """
        ...


class Link(Protocol):
    """Transfers among the ranks of one group; every rank of it begins them in the same order.

    Rows are contiguous, [num_rows, width]. Rows sent must not change until the wait is over.

    Attributes:
        pads: `padded_to` may give a number.
    """

    pads: bool = False

    @property
    def at_once(self) -> AtOnce | None:
        """The call that begins a transfer and waits for it; None where that is no cheaper."""
        return None

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """A buffer [num_rows, width] in the transport's memory, to be filled and sent once."""
        ...

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> Work:
        """Send `send[place]` rows to each place, and fill `received` in the order of places."""
        ...

    def all_to_all_parts(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Work:
        """`all_to_all` whose rows are read by `Work.read`, where the transport has them."""
        return self.all_to_all(rows, send, rows.new_empty(sum(receive), rows.shape[1]), receive)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> Work:
        """Send all rows to every place, and fill `received` in the order of places."""
        ...

    def padded_to(self, num_rows_of: Sequence[int], row_bytes: int) -> int | None:
        """Rows that each place's part is padded to in `all_gather` or `reduce_scatter`.

        None without padding. A sum that `Group` computes by `all_to_all` is never padded.
        """
        return None

    def reduce_scatter(
        self, rows: Tensor, num_rows_of: Sequence[int]
    ) -> tuple[Work, Tensor] | None:
        """Add up the rows of all, and give each place its part; None where `Group` has to do so.

        Returns:
            The work, and this place's part [num_rows_of[place], width], valid after its wait.
        """
        return None

    def send(self, rows: Tensor, to: int) -> Work:
        """Send all rows to one place."""
        ...

    def receive(self, rows: Tensor, source: int) -> Work:
        """Fill `rows` from one place."""
        ...


class Transport(Protocol):
    """Makes groups and their links, in one epoch."""

    def make(self, ranks: tuple[int, ...]) -> None:
        """Make a group; collective over *all* ranks of the epoch, in the same order.

        Raises:
            PeerLostError: another rank is gone, or did not come in time.
            EpochEndedError: a later epoch has begun.
        """
        ...

    def link(self, ranks: tuple[int, ...]) -> Link:
        """The link of a group that was made and has the caller in it."""
        ...

    def leave(self) -> None:
        """Abort the transfers under way, for other ranks too, and release all groups."""
        ...
