"""Settings that ranks, and the processes that fork them, get at their start."""

import os
from dataclasses import dataclass

from expertlane.engine.ranks.rendezvous import Meeting, Place
from expertlane.engine.ranks.run_files import RunFiles


@dataclass(frozen=True)
class RankSettings:
    """What a rank gets at its start.

    Attributes:
        board_fd: of the file with the node's progress board.
        memory_fd: of the memory that the node's ranks share for their messages; None where the
            system has none.
        wake_fds: eventfds for ranks that share it, one for each that there may be.
        store_path: the rendezvous file of ranks that are all on this node.
        meeting: where ranks of several nodes meet; None where all are on this one.
        timeout_s: the bound on any wait for other ranks.
        epoch: that it is started in; what it inherits belongs to that.
        is_ahead: it is not of that epoch, but of a later one, and inherits nothing of it.
    """

    rank: int
    world_size: int
    local_rank: int
    num_local_ranks: int
    board_fd: int
    memory_fd: int | None
    wake_fds: list[int]
    store_path: str
    meeting: Meeting | None
    timeout_s: float
    dtype: str | None
    epoch: int = 0
    is_ahead: bool = False

    @classmethod
    def of_first(
        cls,
        node: int,
        num_ranks: int,
        files: RunFiles,
        meeting: Meeting | None,
        timeout_s: float,
        dtype: str | None,
    ) -> "RankSettings":
        """Of the first of a node's ranks, for the first epoch.

        Args:
            num_ranks: of each node.
        """
        return cls(
            rank=node * num_ranks,
            world_size=num_ranks * (meeting.num_nodes if meeting else 1),
            local_rank=0,
            num_local_ranks=num_ranks,
            board_fd=files.board_fd,
            memory_fd=files.memory_fd,
            wake_fds=files.wake_fds,
            store_path=files.store_path,
            meeting=meeting,
            timeout_s=timeout_s,
            dtype=dtype,
        )


@dataclass(frozen=True)
class ServerSettings:
    """What the server needs to start the ranks of its node.

    Attributes:
        parent_pid: the server ends with this process; None where its parent does not matter.
        control_fd: socket to the launcher; its end of file ends everything.
        rank_fds: a socket to the launcher for each rank.
        store_fd: of the ranks' rendezvous file; None where it has a name.
        first_rank: settings of the node's first rank; the others' are like them.
        launcher: to be told to other nodes; None where there are none, and on the others.
    """

    parent_pid: int | None
    control_fd: int
    rank_fds: list[int]
    store_fd: int | None
    first_rank: RankSettings
    launcher: Place | None = None

    def descriptors(self) -> list[int]:
        """All file descriptors that the server inherits from the launcher."""
        first = self.first_rank
        own = [self.control_fd, *self.rank_fds, *first.wake_fds, first.board_fd]
        shared = first.memory_fd, self.store_fd
        return own + [descriptor for descriptor in shared if descriptor is not None]

    def is_parent_alive(self) -> bool:
        """Whether the parent process is still alive."""
        return self.parent_pid is None or os.getppid() == self.parent_pid
