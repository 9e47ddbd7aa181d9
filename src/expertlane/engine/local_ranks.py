"""Ranks of this machine: started through the fork server, ended without a trace."""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from expertlane.engine.fork_server import ServerSettings
from expertlane.errors import CapacityError
from expertlane.parallel.progress import ProgressBoard

MAX_RANKS_PER_CORE = 32
_KILL_TIMEOUT_S = 5.0


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def bound_sends(connection: Connection, timeout_s: float) -> None:
    """Make a send to a rank that no longer reads fail after `timeout_s` instead of blocking."""
    whole, fraction = divmod(timeout_s, 1)
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.setsockopt(
            socket.SOL_SOCKET,
            socket.SO_SNDTIMEO,
            struct.pack("ll", int(whole), int(fraction * 1e6)),
        )


class LocalRanks:
    """Ranks of this machine, children of a fork server that this process owns.

    Attributes:
        connections: one a rank.
        control: readable when a rank has ended.
        board: where the ranks say what they do.
    """

    def __init__(self, num_ranks: int, timeout_s: float, dtype: str | None) -> None:
        self._folder = new_shared_folder()
        progress_path = self._folder / "progress"
        self.board = ProgressBoard(num_ranks, progress_path, create=True)
        pairs = [socket.socketpair() for _ in range(num_ranks)]
        self.control, control_of_server = socket.socketpair()
        settings = ServerSettings(
            control_fd=control_of_server.fileno(),
            rank_fds=[theirs.fileno() for _, theirs in pairs],
            sys_path=sys.path,
            progress_path=str(progress_path),
            store_path=str(self._folder / "store"),
            timeout_s=timeout_s,
            dtype=dtype,
        )
        self._server = subprocess.Popen(
            [sys.executable, "-m", "expertlane.engine.fork_server", settings.to_json()],
            pass_fds=[settings.control_fd, *settings.rank_fds],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the ranks
            env=_rank_environment(),
        )
        control_of_server.close()
        self.connections = [Connection(ours.detach()) for ours, _ in pairs]
        for _, theirs in pairs:
            theirs.close()
        for connection in self.connections:
            bound_sends(connection, timeout_s)
        self._exit_codes: dict[int, int] = {}
        self._unread = b""

    def read_control(self) -> None:
        """Take in what the fork server has said; only to be called when `control` is readable."""
        try:
            data = self.control.recv(65536)
        except ConnectionResetError:
            data = b""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            rank, code = map(int, line.split())
            self._exit_codes[rank] = code

    def exit_code(self, rank: int) -> int | None:
        """How a rank ended; negative for a signal; None while not known."""
        return self._exit_codes.get(rank)

    def close(self) -> None:
        """End all ranks and the server; leaves nothing behind."""
        for connection in self.connections:
            connection.close()
        self.control.close()  # the server kills what is left when it sees this
        try:
            self._server.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(_KILL_TIMEOUT_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def new_shared_folder() -> Path:
    """A folder of this run's own, in memory where the system has such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="expertlane-", dir=place))


def _rank_environment() -> dict[str, str]:
    """The environment of local ranks: gloo over loopback, whatever the host's name resolves to."""
    environment = dict(os.environ)
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
