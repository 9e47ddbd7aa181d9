"""Numbered cases that a command runs, each of which adds a line to a file when it has ended."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.ranks.processes import wait_until
from expertlane.engine.ops.backend import backend_of_cpu
from expertlane.engine.ranks import fork_server


class ForkedServer:
    """As a `Popen` of the fork server, without another import of torch: a fork of this process.

    Args:
        prepare: is called in it, before it forks ranks.
    """

    def __init__(
        self, prepare: Any, command: Sequence[str], *, pass_fds: Sequence[int], **_: object
    ) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.dup2(2, 1)
                for fd in map(int, os.listdir("/proc/self/fd")):
                    if fd > 2 and fd not in pass_fds:
                        with contextlib.suppress(OSError):
                            os.close(fd)
                prepare()
                sys.argv[1:] = command[-1:]
                fork_server.main()
                code = 0
            finally:
                os._exit(code)

    def wait(self, timeout_s: float) -> int:
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        raise subprocess.TimeoutExpired("the fork server", timeout_s)


def files_and_names() -> set[str]:
    """What could be left over: this process's files, and names in shared and temporary folders."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    temporary = [n for n in os.listdir(tempfile.gettempdir()) if n.startswith("expertlane-")]
    files = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the list
            files.add(f"fd {fd} of {os.readlink(f'/proc/self/fd/{fd}')}")
    return {*names, *temporary, *files}


def read(file: Path) -> list[dict[str, Any]]:
    """The lines so far, by number; the last one may be half written."""
    text = file.read_bytes() if file.exists() else b""
    lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    return sorted(lines, key=lambda line: line["number"])


def remaining(file: Path, first: int, end: int) -> list[int]:
    """Numbers of the runs that are not in the file yet; a half-written last line is cut off."""
    lines = read(file)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {line["number"] for line in lines}
    return [number for number in range(first, end) if number not in done]


def numbered(num_runs: int, num_quick: int) -> list[Any]:
    """Numbers of runs for `parametrize`; those of `make test` come first."""
    full = (pytest.param(number, marks=pytest.mark.full) for number in range(num_quick, num_runs))
    return [*range(num_quick), *full]


def asked_for(request: pytest.FixtureRequest) -> int:
    """Runs that the tests of a file ask for, by their parameter `number`."""
    items = (each for each in request.session.items if each.path == request.path)
    return 1 + max(each.callspec.params["number"] for each in items if hasattr(each, "callspec"))


@contextlib.contextmanager
def lines_of(command: Sequence[str], file: Path, patience_s: float) -> Iterator[Any]:
    """While a command adds lines to a file: what gives the line of a run that has ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    found: dict[int, dict[str, Any]] = {}

    def line(number: int) -> dict[str, Any]:
        def is_there() -> bool:
            found.update((each["number"], each) for each in read(file))
            return number in found or process.poll() is not None

        wait_until(is_there, seconds=patience_s, pause_s=0.1)  # runs take seconds
        return found[number]

    yield line
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def arguments_of(doc: str | None, end: int) -> argparse.ArgumentParser:
    """The arguments of a command that runs numbered cases and adds a line to a file after each."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("file", type=Path, help="takes a line for each case that has ended")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first")
    parser.add_argument("--to", type=int, default=end, dest="end", help="one past the last's")
    parser.add_argument("--at-once", type=int, default=2, help="cases under way at a time")
    return parser


def in_workers(numbers: Sequence[int], at_once: int, run_each: Callable[..., None]) -> bool:
    """Have processes run a part of the numbers each; gives whether all ended well."""
    backend_of_cpu()  # loads our kernels, once for all ranks
    workers, own_pid = [], os.getpid()
    for worker in range(at_once):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                fork_server._end_with_server(own_pid)
                run_each(numbers[worker::at_once])
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        workers.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in workers]
    return not any(statuses)
