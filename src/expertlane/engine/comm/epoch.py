"""The epoch of a run: 0 at its start, one more after each loss of ranks.

Ranks of one epoch talk to no other: it has memory, process groups and a store of its own.
"""

import os

from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.transport import EpochEndedError

LOOK_S = 0.05  # between looks at the board, during a wait for other ranks


class Epoch:
    """One of them, as a rank that is in it sees it.

    Args:
        board: of this rank's node; the fork server writes there that another one has begun.
        number: which epoch it is.
    """

    def __init__(self, board: ProgressBoard, number: int) -> None:
        self._board, self.number = board, number

    @property
    def has_ended(self) -> bool:
        """Whether a later one has begun."""
        return self._board.epoch > self.number

    def check(self) -> None:
        """Go on only in the latest epoch.

        Raises:
            EpochEndedError: a later one has begun.
        """
        if self.has_ended:
            raise EpochEndedError(f"epoch {self.number} has ended")

    def open_memory(self) -> int:
        """A descriptor of the memory that the node's ranks share in this epoch.

        Raises:
            EpochEndedError: a later one has begun.
        """
        files = self._board.files(self.number)
        return self._open(files.server_pid, files.memory_fd)

    def open_store(self) -> int | None:
        """A descriptor of the file in which the node's ranks meet in this epoch; None without.

        Raises:
            EpochEndedError: a later one has begun.
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
