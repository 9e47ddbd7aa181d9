"""Environment, shared files and settings of ranks and their fork server.

Shared files are unnamed ones in memory, so that none is left behind.
"""

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from expertlane.engine.comm.progress import ProgressBoard, Region
from expertlane.engine.ops.host import asked_backend, num_cores
from expertlane.engine.ranks.rendezvous import Meeting, Place
from expertlane.errors import CapacityError, UserError, no_room
from expertlane.spec.names import CpuIsa

MAX_RANKS_PER_CORE = 32
_SPIN_COUNT = "10000"  # some 0.2 ms
_MOST_LINES = 1024  # of the board, or as many as ranks at first: with room for later ranks


def check_num_ranks(num_ranks: int, *, oversubscribe: bool) -> None:
    """Refuse a number of local ranks that is far too large for the cores.

    Raises:
        CapacityError: more than `MAX_RANKS_PER_CORE` for each core, without `oversubscribe`.
    """
    limit = MAX_RANKS_PER_CORE * num_cores()
    if num_ranks > limit and not oversubscribe:
        raise CapacityError(
            f"{num_ranks} ranks are more than {MAX_RANKS_PER_CORE} × {num_cores()} cores; "
            f"use at most {limit}, or start with --oversubscribe"
        )


def check_cpu_isa(cpu_isa: CpuIsa | None) -> None:
    """Refuse a choice of our kernels where the environment asks for torch's.

    Raises:
        UserError: both are asked for, or the environment's backend is not valid.
    """
    if cpu_isa is not None and asked_backend() == "torch":
        raise UserError(
            f"--cpu-isa (or EXPERTLANE_CPU_ISA) {cpu_isa} is for kernels that "
            "EXPERTLANE_BACKEND=torch leaves out; give one of the two"
        )


def rank_environment(cpu_isa: CpuIsa | None, *, on_one_node: bool) -> dict[str, str]:
    """The environment variables of ranks.

    They choose the kernels, since every process that computes chooses for itself. On one node, gloo
    uses loopback, whatever the host's name resolves to. A thread of a parallel kernel spins for the
    others for a short time, then sleeps: libgomp's default spins for milliseconds, on a core that
    other processes need, above all the launcher.
    """
    environment = dict(os.environ)
    environment.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if cpu_isa is not None:
        environment["EXPERTLANE_CPU_ISA"] = cpu_isa
    interfaces = {name for _, name in socket.if_nameindex()} if on_one_node else ()
    for loopback in ("lo", "lo0"):
        if loopback in interfaces:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment


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

    def leave_to_server(self, *, is_this_process: bool = False) -> None:
        """Leave the files of the first epoch to the ranks' server, which has inherited them.

        Args:
            is_this_process: the server runs in this process; else they are closed here.
        """
        for descriptor in (self.memory_fd, self.store_fd):
            if descriptor is not None:
                self._descriptors.remove(descriptor)
                if not is_this_process:
                    os.close(descriptor)

    def close(self) -> None:
        """Close and remove the files; the board can still be read."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self.store_fd is None and self.store_path:
            Path(self.store_path).unlink(missing_ok=True)


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
