"""Find the processes behind a pool or a command, stop one in the middle of a layer, miss none."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable

import psutil

from expertlane.engine.comm.progress import NO_LAYER, Position, ProgressBoard
from expertlane.engine.ranks.local_ranks import LocalRanks
from forked import command_line

_PATIENCE_S = 120.0  # of what takes seconds on a quiet machine
_LOOK_S = 0.05  # between looks at all processes, which take milliseconds
_SHARE = 9.0  # of a pause, at least, to what a look took of a core


def wait_until(
    condition: Callable[[], object], seconds: float = _PATIENCE_S, pause_s: float = 0.005
) -> bool:
    """Whether `condition` became true in time.

    Args:
        pause_s: between looks at it; longer where a look takes long, so that looks leave most of a
            core to what is waited for.
    """
    until = time.monotonic() + seconds
    while True:
        began_s = time.thread_time()
        if condition():
            return True
        if time.monotonic() > until:
            return False
        time.sleep(max(pause_s, _SHARE * (time.thread_time() - began_s)))


class RunningRanks:
    """The local ranks that a launcher has started.

    Attributes:
        server: the fork server, parent of all ranks.
        pids: of the ranks, in rank order.
        board: what the ranks say they do.
    """

    def __init__(self, launcher_pid: int, num_ranks: int) -> None:
        launcher = psutil.Process(launcher_pid)

        def servers() -> list[psutil.Process]:
            found = []
            for child in launcher.children():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    if '"parent_pid"' in " ".join(command_line(child.pid)):
                        found.append(child)
            return found

        assert wait_until(servers, pause_s=_LOOK_S), "no fork server came"
        self.server = max(servers(), key=psutil.Process.create_time)
        self.pids = self._pids(num_ranks)
        settings = json.loads(command_line(self.server.pid)[-1])
        board_fd = settings["first_rank"]["board_fd"]
        board = os.open(f"/proc/{self.server.pid}/fd/{board_fd}", os.O_RDWR)
        self.board = ProgressBoard(num_ranks, board)
        os.close(board)

    def _pids(self, num_ranks: int) -> list[int]:
        def all_came() -> bool:
            return len(self.server.children()) == num_ranks

        assert wait_until(all_came, pause_s=_LOOK_S), "not all ranks came"
        # Forked one after the other; numbers of processes begin again at some time.
        ranks = sorted(self.server.children(), key=lambda child: (child.create_time(), child.pid))
        return [rank.pid for rank in ranks]

    def stop_in_a_layer(self, rank: int, first_step: int = 3) -> Position:
        """SIGSTOP a rank, and where: in some layer of a step not before `first_step`."""
        pauses = random.Random(0)

        def stopped_there() -> bool:
            if self.board.position(rank).step < first_step:
                return False
            os.kill(self.pids[rank], signal.SIGSTOP)
            stopped = psutil.Process(self.pids[rank])
            assert wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED)
            if self.board.position(rank).layer != NO_LAYER:
                return True
            os.kill(self.pids[rank], signal.SIGCONT)
            time.sleep(pauses.uniform(0, 0.05))  # on a busy machine it may get no core before
            return False

        assert wait_until(stopped_there), "the rank never came to a layer"
        return self.board.position(rank)

    def kill(self, rank: int) -> None:
        """SIGKILL a rank."""
        os.kill(self.pids[rank], signal.SIGKILL)

    def wait_for_step(self, step: int) -> None:
        """Wait until rank 0 is in a step not before `step`."""
        assert wait_until(lambda: self.board.position(0).step >= step), "no step came"

    def are_gone(self, seconds: float) -> bool:
        """Whether no process is left, or will be in time."""
        return session_is_gone(self.server.pid, seconds)


class OwnRanks(RunningRanks):
    """Those that this process has started."""

    def __init__(self, ranks: LocalRanks) -> None:
        self.server = psutil.Process(ranks._server.pid)
        self.pids = self._pids(ranks.ranks_per_node)
        self.board = ranks.board


def _is_reaped_later(pid: int) -> bool:
    """Whether a process has ended and is left to the first one, which may take its time."""
    process = psutil.Process(pid)
    return process.status() == psutil.STATUS_ZOMBIE and process.ppid() == 1


def session_is_gone(server_pid: int, seconds: float) -> bool:
    """Whether none is left, or will be in time, of a fork server and the ranks in its session."""

    def remaining() -> Iterable[int]:
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == server_pid and not _is_reaped_later(pid):
                    yield pid
            except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                continue

    return wait_until(lambda: not any(remaining()), seconds, _LOOK_S)
