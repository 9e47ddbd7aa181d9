"""The epoch of a run: 0 at its start, one more after each loss of ranks.

Each epoch has shared memory, process groups and a store of its own, so its ranks exchange nothing
with those of another.
"""

import os
import time
from typing import Protocol

from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.transport import EpochEndedError, PeerLostError

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
