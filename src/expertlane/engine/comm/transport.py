"""The epoch of a run, and the interface of transports: see `torch_transport` and `shared_memory`.

The epoch is 0 at the start of a run, and one more after each loss of ranks. Each has shared memory,
process groups and a store of its own, so its ranks exchange nothing with those of another.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from expertlane.engine.comm.progress import ProgressBoard
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


LOOK_S = 0.05  # between polls of the board, during a wait for other ranks


class Epoch:
    """An epoch that a rank is in.

    Args:
        board: the progress board of this rank's node; the fork server writes there that a later
            epoch has begun.
        number: the epoch's.
    """

    def __init__(self, board: ProgressBoard, number: int) -> None:
        self._board, self.number = board, number

    @property
    def has_ended(self) -> bool:
        """True if a later epoch has begun."""
        return self._board.epoch > self.number

    def check(self) -> None:
        """Raise if the epoch has ended.

        Raises:
            EpochEndedError: a later epoch has begun.
        """
        if self.has_ended:
            raise EpochEndedError(f"epoch {self.number} has ended")

    def open_memory(self) -> int:
        """Open the memory that the node's ranks share in this epoch; gives its descriptor.

        Raises:
            EpochEndedError: a later epoch has begun.
        """
        files = self._board.files(self.number)
        return self._open(files.server_pid, files.memory_fd)

    def open_store(self) -> int | None:
        """Open the rendezvous file of the node's ranks; gives its descriptor, None without one.

        Raises:
            EpochEndedError: a later epoch has begun.
        """
        files = self._board.files(self.number)
        return None if files.store_fd < 0 else self._open(files.server_pid, files.store_fd)

    def _open(self, pid: int, number: int) -> int:
        try:
            descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self.check()  # the server has closed it
            raise
        if self.has_ended:  # its number may be that of another file now
            os.close(descriptor)
            self.check()
        return descriptor


_SPIN_S = 1e-3  # polls without a pause: a wait is mostly over by then, or takes far longer
_NAP_S = 5e-5  # between later polls


class Event(Protocol):
    """An event on a stream, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """True if the stream has passed it; does not block."""
        ...


def await_event(event: Event, epoch: Epoch, timeout_s: float) -> None:
    """Block the host until the device, whose work may wait for lost ranks, has passed an event.

    Raises:
        EpochEndedError: a later epoch has begun, even if the event has passed: nccl's kernels end
            with any values when they are aborted.
        PeerLostError: it took longer than `timeout_s`.
    """
    began_s = time.monotonic()
    while not event.query():
        epoch.check()
        waited_s = time.monotonic() - began_s
        if waited_s >= timeout_s:
            raise PeerLostError(f"waited {timeout_s:g} s for the GPU, or for ranks it waits for")
        time.sleep(0.0 if waited_s < _SPIN_S else _NAP_S)  # other threads go on meanwhile
    epoch.check()
