"""Forks local ranks from one process that has imported torch and never computes in it.

Sixteen ranks share one copy of torch's pages so, and no `__main__` guard is needed in the program
that started them. The server tells the launcher of every rank that ends, and ends all ranks when
the launcher goes away, whatever the reason.

Run as `python -m expertlane.engine.fork_server SETTINGS`; SETTINGS is `ServerSettings` as JSON.
"""

import ctypes
import gc
import json
import os
import select
import shutil
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from expertlane.engine.messages import RankSettings

_POLL_MS = 50
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ServerSettings:
    """What the server needs to start its ranks.

    Attributes:
        control_fd: socket to the launcher; its end of file ends everything.
        rank_fds: one socket a rank.
        sys_path: the launcher's module search path, so that functions are found by name.
        folder: the run's own; removed at the end, for a launcher that cannot do it any more.
    """

    control_fd: int
    rank_fds: list[int]
    sys_path: list[str]
    folder: str
    progress_path: str
    timeout_s: float
    dtype: str | None

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    def of_rank(self, rank: int) -> RankSettings:
        """What one rank is told."""
        world_size = len(self.rank_fds)
        return RankSettings(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            num_local_ranks=world_size,
            progress_path=self.progress_path,
            store_path=f"{self.folder}/store",
            timeout_s=self.timeout_s,
            dtype=self.dtype,
        )


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run_rank(settings: ServerSettings, rank: int) -> None:
    code = 1
    try:
        from expertlane.engine.worker import serve

        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(settings.control_fd)
        for other, fd in enumerate(settings.rank_fds):
            if other != rank:
                os.close(fd)
        code = serve(Connection(settings.rank_fds[rank]), settings.of_rank(rank))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # no clean-up that belongs to the server


def _watch(control_fd: int, rank_of_pid: dict[int, int]) -> None:
    """Report ranks that end, until the launcher closes its side."""
    poll = select.poll()
    poll.register(control_fd, select.POLLIN)
    while True:
        if poll.poll(_POLL_MS) and not os.read(control_fd, 4096):
            return
        while rank_of_pid:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            rank = rank_of_pid.pop(pid)
            os.write(control_fd, f"{rank} {os.waitstatus_to_exitcode(status)}\n".encode())


def main() -> None:
    """Start the ranks, watch them, and end them."""
    settings = ServerSettings(**json.loads(sys.argv[1]))
    sys.path[:] = settings.sys_path
    # Imports torch, and what ranks run, once for all ranks.
    import expertlane.engine.deployed_stage  # noqa: F401

    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the shared pages
    rank_of_pid: dict[int, int] = {}
    for rank in range(len(settings.rank_fds)):
        pid = os.fork()
        if pid == 0:
            _run_rank(settings, rank)
        rank_of_pid[pid] = rank
    for fd in settings.rank_fds:
        os.close(fd)
    try:
        _watch(settings.control_fd, rank_of_pid)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the launcher is gone
    finally:
        for pid in rank_of_pid:
            os.kill(pid, signal.SIGKILL)
        for pid in rank_of_pid:
            os.waitpid(pid, 0)
        shutil.rmtree(settings.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
