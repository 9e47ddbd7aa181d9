"""A process that has imported what ranks run, and forks servers: each would else import torch anew.

A fork server is then a fork of it, as ranks are of a fork server: the same code runs in it, with
the arguments, environment and descriptors that it would be started with. What it takes for its
parent is the process of this file, which ends with the tests.
"""

import array
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

from distributed import on_ranks
from expertlane.engine import local_ranks
from expertlane.engine.fork_server import python_command
from expertlane.engine.local_ranks import rank_environment

_AT_ONCE = 200  # descriptors in a message: the system takes 253
_LOOK_S = 0.005
_IMPORTED = ("distributed.on_ranks", "distributed.supervisor", "expertlane.engine.stage")


def become(command: Sequence[str], descriptors: Sequence[int]) -> NoReturn:
    """In a process that was just forked: run a command of `python_command` as a new one would.

    Args:
        descriptors: that it keeps, beside the standard streams.
    """
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.dup2(2, 1)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in descriptors:
                with contextlib.suppress(OSError):
                    os.close(fd)
        sys.argv[:] = ["-c", *command[4:]]
        exec(command[3], {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Forked:
    """As a `Popen` of what was forked.

    Attributes:
        returncode: None until it has ended and was asked for.
    """

    def __init__(self, imported: "Imported", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._imported = imported

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._imported.ask({"wait": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        until_s = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() >= until_s:
                raise subprocess.TimeoutExpired("what was forked", timeout)
            time.sleep(_LOOK_S)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Imported:
    """The process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                python_command("engine.imported", [str(theirs.fileno())]),
                pass_fds=[theirs.fileno()],
                env=rank_environment(None, on_one_node=True),
                stdin=subprocess.DEVNULL,
            )
        self._answers = self._connection.makefile("r")

    def ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
        """What it answers."""
        with self._lock:
            data = json.dumps(request | {"num": len(descriptors)}).encode() + b"\n"
            self._connection.sendall(len(data).to_bytes(8, "little") + data)
            for begin in range(0, len(descriptors), _AT_ONCE):
                part = array.array("i", descriptors[begin : begin + _AT_ONCE])
                self._connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, part)])
            return json.loads(self._answers.readline())

    def popen(
        self,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        env: dict[str, str] | None = None,
        **_: object,
    ) -> Forked:
        """Run a command of `python_command` in a fork, with a session of its own."""
        request = {
            "command": [*command],
            "fds": [*pass_fds],
            "env": dict(os.environ) if env is None else env,
            "cwd": os.getcwd(),
        }
        return Forked(self, self.ask(request, [2, *pass_fds]))

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Meanwhile fork servers, and supervisors of other nodes, are forked from there."""
        other = SimpleNamespace(**vars(subprocess) | {"Popen": self.popen})
        with (
            mock.patch.object(local_ranks, "subprocess", other),
            mock.patch.object(on_ranks, "subprocess", other),
        ):
            yield

    def close(self) -> None:
        """End it; whatever it has forked ends with it."""
        self._answers.close()
        self._connection.close()
        self._process.wait(30)


def _of_parent(command: list[str]) -> list[str]:
    """With this process as the parent that settings name."""
    *others, last = command
    if '"parent_pid"' not in last:
        return command
    return [*others, json.dumps(json.loads(last) | {"parent_pid": os.getppid()})]


def _fork(connection: socket.socket, request: dict[str, Any], received: list[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    stderr, *descriptors = received
    most = max([*received, *request["fds"], connection.fileno()])
    apart = [os.dup2(fd, most + 1 + place) for place, fd in enumerate(descriptors)]
    os.dup2(stderr, 2)
    for fd, wanted in zip(apart, request["fds"], strict=True):
        os.dup2(fd, wanted)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    become(_of_parent(request["command"]), request["fds"])


def main() -> None:
    """Serve requests at the descriptor that the command line names, until its other end closes."""
    for name in _IMPORTED:
        importlib.import_module(name)

    codes: dict[int, int] = {}

    def take_codes(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])

    signal.signal(signal.SIGCHLD, take_codes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the tests
    connection = socket.socket(fileno=int(sys.argv[1]))
    while header := connection.recv(8, socket.MSG_WAITALL):
        request = json.loads(connection.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL))
        received: list[int] = []
        while len(received) < request["num"]:
            received += socket.recv_fds(connection, 1, _AT_ONCE)[1]
        if "wait" in request:
            answer = codes.get(request["wait"])
        else:
            answer = _fork(connection, request, received)
        for fd in received:
            os.close(fd)
        connection.sendall(json.dumps(answer).encode() + b"\n")
