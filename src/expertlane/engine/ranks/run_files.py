"""Files that the ranks of a node share: unnamed ones in memory, so that none is left behind."""

import os
import tempfile
from pathlib import Path

from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.region import Region
from expertlane.errors import CapacityError, no_room


def unnamed_file() -> int:
    """A new, empty file in memory, as a descriptor.

    Raises:
        OSError: no descriptors are left.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("expertlane")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def memory_file(num_local_ranks: int) -> int:
    """A file for the messages of a node's ranks; pages that are not touched take no memory.

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


_MOST_LINES = 1024  # of the board, or as many as ranks at first: with room for later ranks


class RunFiles:
    """The files that the ranks of a node start with; in memory they have no name.

    The board has room for more ranks, which later epochs may have.

    Attributes:
        board: progress board of the run's ranks, in the file `board_fd`; ranks of this node write
            to it.
        memory_fd: descriptor of the memory for messages; None where the system has no unnamed
            shared memory.
        store_path: the rendezvous file of ranks that are all on this node; a file in memory is
            inherited as a descriptor.

    Raises:
        CapacityError: there are too few descriptors, or there is no room for them.
    """

    def __init__(self, world_size: int, num_local_ranks: int) -> None:
        self._descriptors: list[int] = []
        self.store_fd: int | None = None
        self.memory_fd: int | None = None
        self.store_path = ""
        try:
            self.board_fd = self._own(unnamed_file())
            self.board = ProgressBoard(max(world_size, _MOST_LINES), self.board_fd)
            if hasattr(os, "memfd_create"):
                self.store_fd = self._own(unnamed_file())
                self.store_path = f"/proc/self/fd/{self.store_fd}"
                self.memory_fd = self._own(memory_file(num_local_ranks))
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
        """Close the files of the first epoch, once the ranks' server has inherited them."""
        for descriptor in (self.memory_fd, self.store_fd):
            if descriptor is not None:
                self._descriptors.remove(descriptor)
                os.close(descriptor)

    def are_servers(self) -> None:
        """Leave the files of the first epoch to the server, which runs in this process."""
        for descriptor in (self.memory_fd, self.store_fd):
            if descriptor is not None:
                self._descriptors.remove(descriptor)

    def close(self) -> None:
        """Close and remove the files; the board can still be read."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self.store_fd is None and self.store_path:
            Path(self.store_path).unlink(missing_ok=True)
