"""Files that the ranks of a node share: unnamed ones in memory, so that none can be left over."""

import os
import tempfile
from pathlib import Path

from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.region import Region
from expertlane.errors import CapacityError, no_room


def unnamed_file() -> int:
    """A new, empty file in memory, as a descriptor.

    Raises:
        OSError: there are too many.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("expertlane")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def memory_file(num_local_ranks: int) -> int:
    """A file for the messages of a node's ranks; what they do not touch takes no memory.

    Raises:
        OSError: there is no room.
    """
    descriptor = unnamed_file()
    try:
        os.ftruncate(descriptor, Region(num_local_ranks).num_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# Room for ranks that come later; or for as many as there are at first.
_MOST_LINES = 1024
MOST_UNCOMPILED = 64  # that can wake each other


class RunFiles:
    """Files that the ranks of a node begin with; those in memory have no name and leave nothing.

    They have room for more ranks, which later epochs may have.

    Attributes:
        board: of the run's ranks, in the file `board_fd`; those of this node write to it.
        memory_fd: of the memory for messages; None where the system has no unnamed shared memory.
        wake_fds: eventfds, one a local rank; or none.
        store_path: the rendezvous file of ranks that are all on this node; where it is in memory,
            they inherit its descriptor.

    Raises:
        CapacityError: there are too few descriptors, or there is no room for them.
    """

    def __init__(self, world_size: int, num_local_ranks: int) -> None:
        self._descriptors: list[int] = []
        self.store_fd: int | None = None
        self.memory_fd: int | None = None
        self.wake_fds: list[int] = []
        self.store_path = ""
        try:
            self.board_fd = self._own(unnamed_file())
            self.board = ProgressBoard(max(world_size, _MOST_LINES), self.board_fd)
            if hasattr(os, "memfd_create"):
                self.store_fd = self._own(unnamed_file())
                self.store_path = f"/proc/self/fd/{self.store_fd}"
                self.memory_fd = self._own(memory_file(num_local_ranks))
                for _ in range(max(num_local_ranks, MOST_UNCOMPILED)):
                    self.wake_fds.append(self._own(os.eventfd(0, os.EFD_NONBLOCK)))
            else:
                descriptor, self.store_path = tempfile.mkstemp(prefix="expertlane-")
                os.close(descriptor)
        except OSError as error:
            self.close()
            raise CapacityError(f"cannot start the ranks: {no_room(error)}") from None

    def _own(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def leave_to_server(self) -> None:
        """Close what later epochs do not use, once the ranks' server has it."""
        for descriptor in (self.memory_fd, self.store_fd):
            if descriptor is not None:
                self._descriptors.remove(descriptor)
                os.close(descriptor)

    def are_servers(self) -> None:
        """What epochs renew is closed by the server of this process's ranks."""
        for descriptor in (self.memory_fd, self.store_fd):
            if descriptor is not None:
                self._descriptors.remove(descriptor)

    def close(self) -> None:
        """Leave nothing behind; the board can still be read."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self.store_fd is None and self.store_path:
            Path(self.store_path).unlink(missing_ok=True)
