"""Run one command, and end it with all its descendants. A script without imports of packages.

    guard.py PIPE GRACE_S CORES COMMAND…

The command runs on the cores, numbers with commas between them; on all if that is empty.

The guard ends the command when the pipe closes, as it does when the process that started the guard
is killed. It kills what is left when the command exits by itself; once a byte has come through the
pipe, only when that closes. Orphaned descendants become its children (Linux:
`PR_SET_CHILD_SUBREAPER`), so those in a session of their own are found too. Its exit status is the
command's, or 128 plus the number of the signal that ended the command.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL_S = 0.05
_KILL_S = 10.0  # after that, a process that the kernel does not end (stuck in a driver) is left
CANNOT_START = 127


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    pipe, grace_s, cores = int(arguments[0]), float(arguments[1]), arguments[2]
    command = arguments[3:]
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))  # children inherit it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe says when to end
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_before_command
        )
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return CANNOT_START
    lingers = False
    while child.poll() is None or lingers:
        if select.select([pipe], [], [], _POLL_S)[0]:
            if not os.read(pipe, 1):
                break
            lingers = True
    status = child.poll()
    if status is None:
        status = _end(child, grace_s)
    _end_descendants(child.pid)
    return status if status >= 0 else 128 - status


def _before_command() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":  # where this process is killed itself
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(child: "subprocess.Popen[bytes]", grace_s: float) -> int:
    """Send SIGTERM to the command, and SIGKILL after `grace_s`; return its exit status."""
    with contextlib.suppress(OSError):
        child.send_signal(signal.SIGCONT)  # a stopped process takes no other signal
        child.terminate()
    try:
        return child.wait(grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _end_descendants(group: int) -> None:
    """Kill the command's process group and all descendants, until none is left."""
    until_s = time.monotonic() + _KILL_S
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
        left = _descendants(os.getpid()) if sys.platform == "linux" else []
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            if not left:
                return
        time.sleep(_POLL_S)


def _descendants(pid: int) -> list[int]:
    """Process ids of all descendants of a process, from /proc."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The command's name, in brackets, may have any character in it.
            parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found = {pid}
    while more := {each for each, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {pid})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
