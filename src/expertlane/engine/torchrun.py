"""Ranks that torchrun (or anything that sets its variables) has started.

Every process runs the same command. The one with RANK 0 becomes the launcher and starts a child
for its rank; the others become their rank. They find the launcher through torchrun's own store.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from expertlane.engine.local_ranks import SharedFolder, bound_sends
from expertlane.engine.messages import RankSettings
from expertlane.errors import RankError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_TOKEN_BYTES = 32
_RANK_BYTES = 4
_MEET_TIMEOUT_S = 120.0
_KILL_TIMEOUT_S = 5.0
_KEY = "launcher"
_LAUNCHER = "EXPERTLANE_LAUNCHER"  # in the environment, which other users cannot read


def is_under_torchrun() -> bool:
    """Whether ranks are already there."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def own_rank() -> int:
    """This process's rank."""
    return int(os.environ["RANK"])


class TorchrunRanks:
    """The launcher's side, in the process with RANK 0; the same face as `LocalRanks`.

    Raises:
        RankError: not all ranks came in time.
    """

    reports_exits = False  # torchrun knows how its processes end, this one does not

    def __init__(self, timeout_s: float, dtype: str | None) -> None:
        num_ranks = int(os.environ["WORLD_SIZE"])
        self._folder = SharedFolder(num_ranks)
        self.board = self._folder.board
        self.connections: list[Connection] = []
        self.control, self._other_end = socket.socketpair()  # never readable: no fork server here
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        with closing(socket.create_server(("", 0), backlog=num_ranks)) as server:
            port = server.getsockname()[1]
            launcher = f"{token} {port} {self._folder.progress_path}"
            self._child = subprocess.Popen(
                [sys.executable, "-m", "expertlane.engine.torchrun", str(timeout_s), dtype or ""],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=os.environ | {_LAUNCHER: launcher},
            )
            try:
                by_rank = self._accept_all(server, token.encode(), num_ranks)
            except BaseException:
                self.close()
                raise
        self.connections += [by_rank[rank] for rank in range(num_ranks)]
        for connection in self.connections:
            bound_sends(connection, timeout_s)

    def _accept_all(
        self, server: socket.socket, token: bytes, num_ranks: int
    ) -> dict[int, Connection]:
        server.settimeout(_MEET_TIMEOUT_S)
        by_rank: dict[int, Connection] = {}
        while len(by_rank) < num_ranks:
            try:
                peer, _ = server.accept()
                peer.settimeout(_MEET_TIMEOUT_S)
                said = peer.recv(_TOKEN_BYTES + _RANK_BYTES, socket.MSG_WAITALL)
            except TimeoutError:
                missing = sorted(set(range(num_ranks)) - set(by_rank))
                raise RankError(
                    f"ranks {missing} did not come within {_MEET_TIMEOUT_S:g} s"
                ) from None
            if not secrets.compare_digest(said[:_TOKEN_BYTES], token):
                peer.close()  # a stranger
                continue
            peer.setblocking(True)
            by_rank[int.from_bytes(said[_TOKEN_BYTES:])] = Connection(peer.detach())
        return by_rank

    def read_control(self) -> str | None:
        """Nothing to read: torchrun watches its own processes."""
        return None

    def exit_code(self, rank: int) -> int | None:
        """How rank 0's child ended."""
        return self._child.poll() if rank == 0 else None

    def close(self) -> None:
        """Let go of all ranks: each ends when its connection does."""
        for connection in self.connections:
            connection.close()
        self.control.close()
        self._other_end.close()
        self._end_child()
        self._folder.remove()

    def _end_child(self) -> None:
        try:
            self._child.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def follow(timeout_s: float, dtype: str | None) -> int:
    """Be this process's rank until the launcher is done; returns the exit code.

    Rank 0's child knows the launcher from its environment and tells the others.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    from expertlane.engine.worker import serve

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to answer
    rank, world_size = own_rank(), int(os.environ["WORLD_SIZE"])
    store = PrefixStore(
        f"expertlane-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}",
        _torchrun_store(rank, world_size),
    )
    launcher = os.environ.get(_LAUNCHER)
    if launcher is not None:
        store.set(_KEY, launcher)
    token, port, progress_path = store.get(_KEY).decode().split(" ", 2)
    host = "127.0.0.1" if launcher is not None else os.environ["MASTER_ADDR"]
    connection = socket.create_connection((host, int(port)), timeout=_MEET_TIMEOUT_S)
    connection.sendall(token.encode() + rank.to_bytes(_RANK_BYTES))
    connection.setblocking(True)
    settings = RankSettings(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        progress_path=progress_path,
        store_path=None,
        timeout_s=timeout_s,
        dtype=dtype,
    )
    return serve(Connection(connection.detach()), settings, PrefixStore("ranks", store))


def _torchrun_store(rank: int, world_size: int) -> "Store":
    """The store that torchrun's agent hosts, or else rank 0 does."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not agent_hosts,
        timeout=timedelta(seconds=_MEET_TIMEOUT_S),
    )


if __name__ == "__main__":
    from expertlane.engine.fork_server import die_with_parent

    die_with_parent()
    sys.exit(follow(float(sys.argv[1]), sys.argv[2] or None))
