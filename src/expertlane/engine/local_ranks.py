"""Ranks of this machine: started through the fork server; none is left when they end."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import msgspec

from expertlane.comm.progress import ProgressBoard
from expertlane.comm.region import Region
from expertlane.engine.fork_server import RankSettings, ServerSettings, python_command
from expertlane.engine.messages import Channel
from expertlane.errors import CapacityError, RankError
from expertlane.ops.host import num_cores

MAX_RANKS_PER_CORE = 32
_KILL_TIMEOUT_S = 5.0
_SPIN_COUNT = "10000"  # some 0.2 ms


def check_num_ranks(num_ranks: int, *, oversubscribe: bool) -> None:
    """Refuse a number of local ranks that would only crawl.

    Raises:
        CapacityError: more than `MAX_RANKS_PER_CORE` a core, and not asked for explicitly.
    """
    limit = MAX_RANKS_PER_CORE * num_cores()
    if num_ranks > limit and not oversubscribe:
        raise CapacityError(
            f"{num_ranks} ranks are more than {MAX_RANKS_PER_CORE} × {num_cores()} cores; "
            f"use at most {limit}, or add --oversubscribe"
        )


class RunFiles:
    """Files of this run that its ranks share; those in memory have no name and leave nothing.

    Attributes:
        board: of the run's ranks, in the file `board_fd`.
        memory_fd: of the memory for messages; None where the system has no unnamed shared memory.
        wake_fds: [num_ranks]; eventfds, or none.
        store_path: the rendezvous file of local ranks; where it is in memory, they inherit its
            descriptor.

    Raises:
        CapacityError: there is no room for them.
    """

    def __init__(self, num_ranks: int) -> None:
        self._descriptors: list[int] = []
        self.store_fd: int | None = None
        self.memory_fd: int | None = None
        self.wake_fds: list[int] = []
        self.store_path = ""
        try:
            self.board_fd = self._unnamed_file()
            self.board = ProgressBoard(num_ranks, self.board_fd)
            if hasattr(os, "memfd_create"):
                self.store_fd = self._unnamed_file()
                self.store_path = f"/proc/self/fd/{self.store_fd}"
                self.memory_fd = self._unnamed_file()
                os.ftruncate(self.memory_fd, Region(num_ranks).num_bytes)
                for _ in range(num_ranks):
                    self.wake_fds.append(os.eventfd(0, os.EFD_NONBLOCK))
                    self._descriptors.append(self.wake_fds[-1])
            else:
                descriptor, self.store_path = tempfile.mkstemp(prefix="expertlane-")
                os.close(descriptor)
        except OSError as error:
            self.close()
            raise CapacityError(f"no room for temporary files: {error}") from None

    def _unnamed_file(self) -> int:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("expertlane")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        self._descriptors.append(descriptor)
        return descriptor

    def close(self) -> None:
        """Leave nothing behind; the board can still be read."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self.store_fd is None and self.store_path:
            Path(self.store_path).unlink(missing_ok=True)


class LocalRanks:
    """Ranks of this machine, children of a fork server that this process owns.

    Attributes:
        channels: one a rank.
        control: readable when a rank has ended.
        board: where the ranks report their progress.

    Raises:
        CapacityError: not enough file descriptors or temporary space for so many ranks.
    """

    def __init__(
        self,
        num_ranks: int,
        timeout_s: float,
        dtype: str | None,
        server_module: str = "expertlane.engine.fork_server",
    ) -> None:
        self._exit_codes: dict[int, int] = {}
        self._unread = b""
        self._files = RunFiles(num_ranks)
        self.board = self._files.board
        self.channels: list[Channel] = []
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._files.close)
            try:
                self._start(num_ranks, timeout_s, dtype, server_module)
            except OSError as error:
                raise CapacityError(f"cannot start {num_ranks} ranks: {error.strerror}") from error
            on_failure.pop_all()

    def _start(
        self, num_ranks: int, timeout_s: float, dtype: str | None, server_module: str
    ) -> None:
        pairs = [socket.socketpair() for _ in range(num_ranks)]
        self.control, control_of_server = socket.socketpair()
        files = self._files
        settings = ServerSettings(
            launcher_pid=os.getpid(),
            control_fd=control_of_server.fileno(),
            rank_fds=[theirs.fileno() for _, theirs in pairs],
            store_fd=files.store_fd,
            first_rank=RankSettings(
                rank=0,
                world_size=num_ranks,
                local_rank=0,
                num_local_ranks=num_ranks,
                board_fd=files.board_fd,
                memory_fd=files.memory_fd,
                wake_fds=files.wake_fds,
                store_path=files.store_path,
                timeout_s=timeout_s,
                dtype=dtype,
            ),
        )
        self._server = subprocess.Popen(
            python_command(server_module, [msgspec.json.encode(settings).decode()]),
            pass_fds=settings.descriptors(),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what libraries print in ranks must not mix with results
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the ranks
            env=_rank_environment(),
        )
        control_of_server.close()
        for ours, theirs in pairs:
            theirs.close()
            self.channels.append(Channel(ours, timeout_s))

    def read_exits(self) -> None:
        """Read what the fork server reports. Only when there is something.

        Raises:
            RankError: it has ended.
        """
        try:
            data = self.control.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            code = self._server.wait(_KILL_TIMEOUT_S)
            raise RankError(f"the fork server ended with exit code {code}; all ranks were ended")
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            rank, code = map(int, line.split())
            self._exit_codes[rank] = code

    def exit_code(self, rank: int, timeout_s: float) -> int | None:
        """How a rank ended, negative for a signal; None if the server does not say in time.

        Raises:
            RankError: the fork server has ended.
        """
        until_s = time.monotonic() + timeout_s
        while rank not in self._exit_codes and time.monotonic() < until_s:
            if wait([self.control], until_s - time.monotonic()):
                self.read_exits()
        return self._exit_codes.get(rank)

    def close(self) -> None:
        """End all ranks and the server; leaves nothing behind."""
        for channel in self.channels:
            channel.close()
        self.control.close()  # the server kills what is left when it sees this
        try:
            self._server.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(_KILL_TIMEOUT_S)
        self._files.close()


def _rank_environment() -> dict[str, str]:
    """The environment of local ranks.

    gloo goes over loopback, whatever the host's name resolves to. A thread of a parallel kernel
    waits a short while for the others, then sleeps: libgomp's own default keeps a core spinning for
    milliseconds, which other processes on it, the launcher first of all, need.
    """
    environment = dict(os.environ)
    environment.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    interfaces = {name for _, name in socket.if_nameindex()}
    for loopback in ("lo", "lo0"):
        if loopback in interfaces:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment
