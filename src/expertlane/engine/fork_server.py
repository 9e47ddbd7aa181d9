"""Forks local ranks from one process that has imported torch and never computes in it.

So all ranks share one copy of torch's pages, and the program that starts them needs no `__main__`
guard. The server reports every rank that ends to the launcher. It ends all ranks when the launcher
has ended, for whatever reason: it watches the control socket and also its own parent, since a
process that the launcher has forked may hold the other end of the socket.
"""

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from expertlane.engine.messages import Channel

if TYPE_CHECKING:
    from expertlane.engine.worker import Handlers

_POLL_MS = 50
_PARENT_CHECK_S = 0.5
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankSettings:
    """What a rank gets at its start.

    Attributes:
        board_fd: of the progress board's file; None where it is not shared.
        memory_fd: of the memory that all ranks share for their messages; None where there is none.
        wake_fds: an eventfd for each rank that shares it.
        store_path: the rendezvous file of local ranks; None under torchrun.
        timeout_s: the bound on any wait for other ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    num_local_ranks: int
    board_fd: int | None
    memory_fd: int | None
    wake_fds: list[int]
    store_path: str | None
    timeout_s: float
    dtype: str | None


@dataclass(frozen=True)
class ServerSettings:
    """What the server needs to start its ranks.

    Attributes:
        launcher_pid: the server's parent.
        control_fd: socket to the launcher; its end of file ends everything.
        rank_fds: one socket a rank.
        store_fd: of the ranks' rendezvous file; None where it has a name.
        first_rank: settings of rank 0; the others' are like them.
    """

    launcher_pid: int
    control_fd: int
    rank_fds: list[int]
    store_fd: int | None
    first_rank: RankSettings

    def descriptors(self) -> list[int]:
        """All file descriptors that the server inherits from the launcher."""
        first = self.first_rank
        shared = first.board_fd, first.memory_fd, self.store_fd
        own = [self.control_fd, *self.rank_fds, *first.wake_fds]
        return own + [descriptor for descriptor in shared if descriptor is not None]

    def of_rank(self, rank: int) -> RankSettings:
        """The settings of one rank."""
        return replace(self.first_rank, rank=rank, local_rank=rank)


def python_command(module: str, arguments: Sequence[str]) -> list[str]:
    """A command that runs `main` of a module in a Python of its own.

    It imports from where this process does. `-P` keeps the working directory off Python's path: a
    file in it named like a module would be run.
    """
    paths = [path for path in sys.path if isinstance(path, str)]
    code = f"import sys; sys.path[:] = {paths!a}; from {module} import main; main()"
    return [sys.executable, "-P", "-c", code, *arguments]


def end_with_parent(parent: int) -> None:
    """Watch the parent from a thread, and end this process at once when it is gone.

    A parent-death signal would not do: the kernel sends it as soon as the *thread* that started
    this process ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _end_with_server(server_pid: int) -> None:
    """Have a rank end when the server does; the server's main thread has forked it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        end_with_parent(server_pid)
    if os.getppid() != server_pid:  # it has ended in between
        os.kill(os.getpid(), signal.SIGKILL)


def _become_rank(
    settings: ServerSettings, rank: int, handlers: "Handlers", server_pid: int
) -> None:
    code = 1
    try:
        from expertlane.engine.worker import run_rank

        _end_with_server(server_pid)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(settings.control_fd)
        for other, fd in enumerate(settings.rank_fds):
            if other != rank:
                os.close(fd)
        channel = Channel(socket.socket(fileno=settings.rank_fds[rank]))
        code = run_rank(channel, settings.of_rank(rank), handlers)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # no clean-up that belongs to the server


def _watch(settings: ServerSettings, rank_of_pid: dict[int, int]) -> None:
    """Report ranks that end, until the launcher closes its side or has ended."""
    poll = select.poll()
    poll.register(settings.control_fd, select.POLLIN)
    while os.getppid() == settings.launcher_pid:
        if poll.poll(_POLL_MS) and not os.read(settings.control_fd, 4096):
            return
        while rank_of_pid:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            rank = rank_of_pid.pop(pid)
            os.write(settings.control_fd, f"{rank} {os.waitstatus_to_exitcode(status)}\n".encode())


def main(handlers: "Handlers | None" = None) -> None:
    """Start the ranks, watch them, and end them. The command line holds `ServerSettings` as JSON.

    Args:
        handlers: what ranks do for each command; None for the engine's own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C
    settings = msgspec.json.decode(sys.argv[1], type=ServerSettings)
    for fd in settings.descriptors():
        os.set_inheritable(fd, False)  # by programs that ranks start
    if handlers is None:
        from expertlane.engine.stage import HANDLERS  # torch, and what ranks run, for all ranks

        handlers = HANDLERS

    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the shared pages
    rank_of_pid: dict[int, int] = {}
    own_pid = os.getpid()
    for rank in range(len(settings.rank_fds)):
        pid = os.fork()
        if pid == 0:
            _become_rank(settings, rank, handlers, own_pid)
        rank_of_pid[pid] = rank
    for fd in settings.rank_fds:
        os.close(fd)
    try:
        _watch(settings, rank_of_pid)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the launcher has ended
    finally:
        for pid in rank_of_pid:
            os.kill(pid, signal.SIGKILL)
        for pid in rank_of_pid:
            os.waitpid(pid, 0)
        if settings.store_fd is None:  # the launcher may have been killed
            with contextlib.suppress(OSError):
                os.unlink(settings.first_rank.store_path or "")
