"""Start settings of ranks, and of the processes that fork them."""

import os
from dataclasses import dataclass

from expertlane.engine.ranks.rendezvous import Meeting, Place
from expertlane.engine.ranks.run_files import RunFiles


@dataclass(frozen=True)
class RankSettings:
    """The start settings of a rank.

    Attributes:
        board_fd: descriptor of the node's progress board.
        memory_fd: descriptor of the memory that the node's ranks share for their messages; None
            where the system has no such memory.
        store_path: the rendezvous file of ranks that are all on this node.
        meeting: the rendezvous of several nodes; None where all ranks are on this one.
        timeout_s: the bound on any wait for other ranks.
        epoch: the epoch in which it is started, to which the inherited files belong.
        is_ahead: it is not of that epoch, but of a later one, and inherits no files of it.
    """

    rank: int
    world_size: int
    local_rank: int
    num_local_ranks: int
    board_fd: int
    memory_fd: int | None
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
        """Settings of a node's first rank in the first epoch.

        Args:
            num_ranks: ranks of each node.
        """
        return cls(
            rank=node * num_ranks,
            world_size=num_ranks * (meeting.num_nodes if meeting else 1),
            local_rank=0,
            num_local_ranks=num_ranks,
            board_fd=files.board_fd,
            memory_fd=files.memory_fd,
            store_path=files.store_path,
            meeting=meeting,
            timeout_s=timeout_s,
            dtype=dtype,
        )


@dataclass(frozen=True)
class ServerSettings:
    """The start settings of a node's fork server.

    Attributes:
        parent_pid: the server ends with this process; None where its parent does not matter.
        control_fd: socket to the launcher; its end of file ends the server and all ranks.
        rank_fds: a socket to the launcher for each rank.
        store_fd: descriptor of the ranks' rendezvous file; None where the file has a name.
        first_rank: settings of the node's first rank; those of the others follow from them.
        launcher: the launcher's place, to be published to other nodes; None without any, and on
            the others.
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
        own = [self.control_fd, *self.rank_fds, first.board_fd]
        shared = first.memory_fd, self.store_fd
        return own + [descriptor for descriptor in shared if descriptor is not None]

    def is_parent_alive(self) -> bool:
        """Whether the parent process is still alive."""
        return self.parent_pid is None or os.getppid() == self.parent_pid
