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
from expertlane.engine.host import num_cores
from expertlane.errors import CapacityError
from expertlane.parallel.progress import ProgressBoard

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


def bound_sends(connection: Connection, timeout_s: float) -> None:
    """Make a send to a rank that no longer reads fail after `timeout_s` instead of blocking."""
    whole, fraction = divmod(timeout_s, 1)
    bound = struct.pack("ll", int(whole), int(fraction * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)


class SharedFolder:
    """A folder of this run's own, in memory where the system has such a place.

    Attributes:
        board: of the run's ranks, in the file `progress_path`.

    Raises:
        CapacityError: there is no room for it.
    """

    def __init__(self, num_ranks: int) -> None:
        places = ["/dev/shm"] if os.access("/dev/shm", os.W_OK) else []
        for place in [*places, None]:
            try:
                self.path = Path(tempfile.mkdtemp(prefix="expertlane-", dir=place))
                self.progress_path = self.path / "progress"
                self.board = ProgressBoard(num_ranks, self.progress_path, create=True)
                return
            except OSError as error:
                failure = error
        raise CapacityError(f"no room for a folder of temporary files: {failure}")

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.path, ignore_errors=True)


class LocalRanks:
    """Ranks of this machine, children of a fork server that this process owns.

    Attributes:
        connections: one a rank.
        control: readable when a rank has ended.
        board: where the ranks say what they do.

    Raises:
        CapacityError: not enough file descriptors or temporary space for so many ranks.
    """

    reports_exits = True

    def __init__(self, num_ranks: int, timeout_s: float, dtype: str | None) -> None:
        self._exit_codes: dict[int, int] = {}
        self._unread = b""
        self._folder = SharedFolder(num_ranks)
        self.board = self._folder.board
        self.connections: list[Connection] = []
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._folder.remove)
            try:
                self._start(num_ranks, timeout_s, dtype)
            except OSError as error:
                raise CapacityError(f"cannot start {num_ranks} ranks: {error.strerror}") from error
            on_failure.pop_all()

    def _start(self, num_ranks: int, timeout_s: float, dtype: str | None) -> None:
        pairs = [socket.socketpair() for _ in range(num_ranks)]
        self.control, control_of_server = socket.socketpair()
        settings = ServerSettings(
            control_fd=control_of_server.fileno(),
            rank_fds=[theirs.fileno() for _, theirs in pairs],
            sys_path=sys.path,
            folder=str(self._folder.path),
            progress_path=str(self._folder.progress_path),
            timeout_s=timeout_s,
            dtype=dtype,
        )
        self._server = subprocess.Popen(
            [sys.executable, "-m", "expertlane.engine.fork_server", settings.to_json()],
            pass_fds=[settings.control_fd, *settings.rank_fds],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what libraries print in ranks must not mix with results
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the ranks
            env=_rank_environment(),
        )
        control_of_server.close()
        for ours, theirs in pairs:
            theirs.close()
            connection = Connection(ours.detach())
            bound_sends(connection, timeout_s)
            self.connections.append(connection)

    def read_control(self) -> str | None:
        """Take in what the fork server says; a line if it has ended. Only when readable."""
        try:
            data = self.control.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            code = self._server.wait(_KILL_TIMEOUT_S)
            return f"the fork server ended with exit code {code}; all ranks were ended"
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            rank, code = map(int, line.split())
            self._exit_codes[rank] = code
        return None

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
        self._folder.remove()


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
