"""Ranks that torchrun, or anything that sets its variables, has started.

Every process runs the same command. The one with RANK 0 becomes the launcher and starts a child
for its rank; the others become their rank. They find the launcher through torchrun's own store.
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from expertlane.engine.fork_server import RankSettings, end_with_parent, python_command
from expertlane.engine.local_ranks import RunFiles
from expertlane.engine.messages import Channel
from expertlane.engine.rendezvous import (
    CONNECT_TIMEOUT_S,
    RankAcceptor,
    handshake,
    hash_of,
    listen,
    new_secret,
)

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_KILL_TIMEOUT_S = 5.0
_PARENT = os.getppid()  # as early as can be: it may end at any time
_LAUNCHER = "launcher"  # the key of its address in the store
_FIRST_RANK = "EXPERTLANE_FIRST_RANK"  # a variable: other users cannot read the environment


def is_under_torchrun() -> bool:
    """Whether ranks are already there."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def own_rank() -> int:
    """This process's rank."""
    return int(os.environ["RANK"])


def _is_child_of_torchrun() -> bool:
    """Whether the parent is torchrun's agent, which outlives its ranks unless it is killed."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class _Launcher(msgspec.Struct):
    """Where the launcher listens; published through the store.

    Attributes:
        host: identifies the machine and the process namespace.
        pid, board_fd: the progress board's file, for ranks of that host.
    """

    address: str
    port: int
    host: str
    pid: int
    board_fd: int


class _FirstRank(msgspec.Struct):
    """What the launcher's own child gets, in the environment.

    Attributes:
        secret: authenticates it.
    """

    launcher: _Launcher
    secret: bytes


class TorchrunRanks:
    """The launcher's side, in the process with RANK 0; the same interface as `LocalRanks`.

    Raises:
        RankError: not all ranks connected in time.
        UserError: ranks cannot reach this host by MASTER_ADDR.
    """

    def __init__(self, timeout_s: float, dtype: str | None) -> None:
        num_ranks = int(os.environ["WORLD_SIZE"])
        num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        self._files = RunFiles(num_ranks)
        self.board = self._files.board
        self.channels: list[Channel] = []
        self.control, self._other_end = socket.socketpair()  # never readable: no fork server here
        self._child: subprocess.Popen[bytes] | None = None
        several_nodes = num_local_ranks < num_ranks
        try:
            listener = listen(os.environ["MASTER_ADDR"], num_ranks, several_nodes=several_nodes)
            with closing(listener):
                connections = self._connect(listener, num_ranks, timeout_s, dtype)
        except BaseException:
            self.close()
            raise
        self.channels += [Channel(connection, timeout_s) for connection in connections]

    def _connect(
        self, listener: socket.socket, num_ranks: int, timeout_s: float, dtype: str | None
    ) -> list[socket.socket]:
        address, port = listener.getsockname()[:2]
        launcher = _Launcher(address, port, _host(), os.getpid(), self._files.board_fd)
        secret = new_secret()
        first_rank = msgspec.json.encode(_FirstRank(launcher, secret)).decode()
        self._child = subprocess.Popen(
            python_command("expertlane.engine.torchrun", [str(timeout_s), dtype or ""]),
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=os.environ | {_FIRST_RANK: first_rank},
        )

        def report(line: str) -> None:
            print(f"expertlane: {line}", file=sys.stderr, flush=True)

        def has_parent_ended() -> bool:
            return _is_child_of_torchrun() and os.getppid() != _PARENT

        acceptor = RankAcceptor(listener, num_ranks, secret, report, has_parent_ended)
        return acceptor.accept_all()

    def read_exits(self) -> None:
        """Nothing to read: torchrun watches its own processes."""

    def exit_code(self, rank: int, timeout_s: float) -> int | None:
        """How rank 0's child ended; of others nothing is known, however long one waits."""
        return self._child.poll() if rank == 0 and self._child is not None else None

    def close(self) -> None:
        """Close all connections: each rank ends when its own is closed."""
        for channel in self.channels:
            channel.close()
        self.control.close()
        self._other_end.close()
        if self._child is not None:
            self._end(self._child)
        self._files.close()

    def _end(self, child: "subprocess.Popen[bytes]") -> None:
        try:
            child.wait(_KILL_TIMEOUT_S if self.channels else 0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _host() -> str:
    """The boot id of this machine and the process namespace; empty where not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _open_board(launcher: _Launcher) -> int | None:
    """The launcher's progress board; None on another host."""
    if not launcher.host or launcher.host != _host():
        return None
    try:
        return os.open(f"/proc/{launcher.pid}/fd/{launcher.board_fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # a user's processes may be hidden from each other
        return None


def run_torchrun_rank(timeout_s: float, dtype: str | None) -> int:
    """Be this process's rank until the launcher is done; returns the exit code.

    Rank 0's child finds the launcher in its environment and publishes it for the others.
    """
    if _is_child_of_torchrun():
        end_with_parent(_PARENT)  # it would wait minutes for a store that is gone
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    from expertlane.engine.stage import HANDLERS
    from expertlane.engine.worker import run_rank

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    rank, world_size = own_rank(), int(os.environ["WORLD_SIZE"])
    store = PrefixStore(
        f"expertlane-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}",
        _torchrun_store(rank, world_size),
    )
    first = os.environ.pop(_FIRST_RANK, None)
    if first is not None:
        own = msgspec.json.decode(first, type=_FirstRank)
        launcher, secret = own.launcher, own.secret
        store.set(_LAUNCHER, msgspec.json.encode(launcher).decode())
    else:
        secret = new_secret()
        store.set(f"rank {rank}", hash_of(secret).hex())
        launcher = msgspec.json.decode(store.get(_LAUNCHER), type=_Launcher)
    place = launcher.address, launcher.port
    connection = socket.create_connection(place, timeout=CONNECT_TIMEOUT_S)
    connection.sendall(handshake(rank, secret))
    if first is not None:
        hashes = [store.get(f"rank {other}").decode() for other in range(1, world_size)]
        connection.sendall(bytes.fromhex("".join(hashes)))
    settings = RankSettings(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        board_fd=_open_board(launcher),
        memory_fd=None,
        wake_fds=[],
        store_path=None,
        timeout_s=timeout_s,
        dtype=dtype,
    )
    return run_rank(Channel(connection), settings, HANDLERS, PrefixStore("ranks", store))


def _torchrun_store(rank: int, world_size: int) -> "Store":
    """The store that torchrun's agent hosts, or else rank 0 does."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not agent_hosts,
        timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
    )


def main() -> None:
    """The first rank: a child of the launcher."""
    end_with_parent(_PARENT)
    sys.exit(run_torchrun_rank(float(sys.argv[1]), sys.argv[2] or None))
