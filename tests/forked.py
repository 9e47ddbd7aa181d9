"""Python processes that tests start, as forks of one process that has imported torch.

Starting one takes 2 s of a core, most of it to import torch. So in tests `subprocess.Popen` forks
that process where a command runs a program of this project with this Python. Tests marked
`starts_anew` start real processes, and so do all tests with `pytest --start-anew`. A fork is a
child of the process that asked for it, with the arguments, environment, descriptors and working
directory that a new Python would have.
"""

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from expertlane.engine.ranks.fork_server import python_command
from expertlane.engine.ranks.rank_settings import rank_environment

_TESTS = Path(__file__).parent
_ROOT = _TESTS.parent
_AT_ONCE = 200  # descriptors in a message: the system takes 253
_PR_SET_CHILD_SUBREAPER = 36
_READ_AT_START = ("PYTHON", "LANG", "LC_", "LD_", "OMP_", "TRITON_")  # of variables
_IMPORTED = (
    "distributed.on_ranks",
    "distributed.supervisor",
    "expertlane.cli.app",
    "expertlane.comparison.projection",
    "expertlane.comparison.run",
    "expertlane.engine.llm",
    "expertlane.engine.stage.worker",
    "expertlane.planner.results",
    "expertlane.planner.search",
    "expertlane.report.html",
    "expertlane.report.markdown",
    "expertlane.report.terminal",
    "expertlane.results.file",
    "expertlane.server.run",
    "expertlane.simulator.results",
)


@dataclass(frozen=True)
class _Program:
    """What a fork runs.

    Attributes:
        kind: `-m`, `-c`, or empty for a file.
        text: the module, the code, or the file.
        is_path_safe: started with `python -P`.
    """

    kind: str
    text: str
    is_path_safe: bool
    arguments: list[str]

    @classmethod
    def of(cls, command: Sequence[object]) -> "_Program | None":
        """The program of a command; None where it has to start as a new process."""
        words = [os.fspath(word) for word in command if isinstance(word, str | os.PathLike)]
        if len(words) != len(command) or words[:1] != [sys.executable]:
            return None
        is_path_safe = words[1:2] == ["-P"]
        match words[1 + is_path_safe :]:
            case ["-m", module, *arguments] if _is_ours(module):
                return cls("-m", module, is_path_safe, arguments)
            case ["-c", code, *arguments] if _imports_torch(code):
                return cls("-c", code, is_path_safe, arguments)
            case [file, *arguments] if Path(file).is_relative_to(_ROOT) and file.endswith(".py"):
                return cls("", file, is_path_safe, arguments)
        return None

    def run(self) -> None:
        """Run it as the main program of this process."""
        sys.argv[:] = [self.kind or self.text, *self.arguments]
        if not self.is_path_safe:
            of_kind = {"-m": os.getcwd(), "-c": "", "": os.path.dirname(self.text)}
            sys.path.insert(0, of_kind[self.kind])
        if self.kind == "-m":
            runpy.run_module(self.text, run_name="__main__", alter_sys=True)
        elif self.kind == "-c":
            exec(compile(self.text, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(self.text, run_name="__main__")


def _imports_torch(code: str) -> bool:
    names = ("import torch", "from expertlane.engine", "expertlane.LLM", "import main; main()")
    others = ("sys.modules", "expertlane.text.")  # some look at imports, some limit memory
    return any(name in code for name in names) and not any(name in code for name in others)


def _is_ours(module: str) -> bool:
    return module == "expertlane" or Path(_TESTS, *module.split(".")).with_suffix(".py").exists()


@dataclass(frozen=True)
class _Asked:
    """A request for a fork; its descriptors come beside it, in the order of `numbers`."""

    command: list[str]
    environment: dict[str, str]
    folder: str
    numbers: list[int]
    is_session: bool


def _become(asked: _Asked, descriptors: Sequence[int], command_lines: str) -> None:
    """Give a process that was just forked the session, descriptors and variables of a new one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked.is_session:
        os.setsid()
    most = max([*descriptors, *asked.numbers, 2])
    apart = [os.dup2(fd, most + 1 + place) for place, fd in enumerate(descriptors)]
    for fd, wanted in zip(apart, asked.numbers, strict=True):
        os.dup2(fd, wanted)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in asked.numbers:
            with contextlib.suppress(OSError):
                os.close(fd)
    os.environ.clear()
    os.environ.update(asked.environment)
    os.chdir(asked.folder)
    own = Path(command_lines, str(os.getpid()))
    unfinished = own.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asked.command))
    unfinished.replace(own)  # whole when it appears, for others look for it


class _Forking(subprocess.Popen):  # type: ignore[type-arg]
    """A `Popen` whose child is a fork where the command allows it.

    Attributes:
        command_lines: a folder with the command line of each fork, in a file named by its pid.
        is_on: False while commands start new processes.
    """

    command_lines = ""
    is_on = True

    def _execute_child(  # type: ignore[no-untyped-def]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more
    ) -> None:
        _, _, shell, read_in, write_in, read_out, write_out, read_err, write_err, *last = more
        *_, is_session, _ = last
        environment = dict(os.environ if env is None else env)
        listed = [args] if isinstance(args, str | bytes | os.PathLike) else [*args]
        is_plain = preexec_fn is None and executable is None and close_fds and not shell
        if not (self.is_on and is_plain and _Program.of(listed) and _starts_alike(environment)):
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more
            )
            return
        standard = [
            own if fd == -1 else fd for own, fd in enumerate((read_in, write_out, write_err))
        ]
        asked = _Asked(
            [os.fspath(word) for word in listed],
            {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()},
            os.path.abspath(cwd or os.curdir),
            [0, 1, 2, *map(int, pass_fds)],
            bool(is_session),
        )
        self.pid = self._fork(asked, [*standard, *map(int, pass_fds)])
        self._child_created = True
        self._close_pipe_fds(read_in, write_in, read_out, write_out, read_err, write_err)

    def _fork(self, asked: _Asked, descriptors: Sequence[int]) -> int:
        raise NotImplementedError


def _starts_alike(environment: dict[str, str]) -> bool:
    """True if the variables that Python and its libraries read at the start are this process's."""
    names = {name for name in {*environment, *os.environ} if name.startswith(_READ_AT_START)}
    names -= {"PYTHONPATH"}  # forks import from where tests do
    return all(environment.get(name) == os.environ.get(name) for name in names)


class _ForkingItself(_Forking):
    """In a fork: starts programs as forks of itself, each of which ends with its main thread."""

    def _fork(self, asked: _Asked, descriptors: Sequence[int]) -> int:
        program = _Program.of(asked.command)
        assert program is not None
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            _become(asked, descriptors, self.command_lines)
            program.run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


class Forks:
    """The process that is forked, and has imported all that forks need; started when first asked.

    Args:
        command_lines: an empty folder.
    """

    def __init__(self, command_lines: Path) -> None:
        self._command_lines = command_lines
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._popen: type[_Forking] | None = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context `subprocess.Popen` forks."""
        forks = self

        class Popen(_Forking):
            command_lines = str(self._command_lines)

            def _fork(self, asked: _Asked, descriptors: Sequence[int]) -> int:
                return forks._fork(asked, descriptors)

            @classmethod
            def prepare(cls) -> None:
                forks._connected()

        self._popen = Popen
        with mock.patch.object(subprocess, "Popen", Popen):
            yield
        self._popen = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context `subprocess.Popen` starts new processes."""
        if self._popen is None:
            yield
            return
        with mock.patch.object(self._popen, "is_on", False):
            yield

    def _fork(self, asked: _Asked, descriptors: Sequence[int]) -> int:
        with self._lock:
            try:
                pid = self._answer(asked, descriptors)
            except BaseException:  # an answer that was not read would be taken for the next one
                self.close()
                raise
        # Raises if the fork is no child of this process.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return pid

    def _answer(self, asked: _Asked, descriptors: Sequence[int]) -> int:
        connection = self._connected()
        _adopt_orphans(True)  # the fork's parent ends at once
        try:
            data = json.dumps(asdict(asked)).encode()
            connection.sendall(len(data).to_bytes(8, "little") + data)
            for begin in range(0, len(descriptors), _AT_ONCE):
                part = array.array("i", descriptors[begin : begin + _AT_ONCE])
                connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, part)])
            return int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
        finally:
            _adopt_orphans(False)

    def _connected(self) -> socket.socket:
        if self._connection is None:
            self._connection, theirs = socket.socketpair()
            arguments = [str(theirs.fileno()), str(self._command_lines)]
            with theirs, self.paused():
                self._process = subprocess.Popen(
                    python_command("forked", arguments),
                    pass_fds=[theirs.fileno()],
                    env=rank_environment(None, on_one_node=True),
                    stdin=subprocess.DEVNULL,
                )
        return self._connection

    def close(self) -> None:
        """End the process."""
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.wait(30)
            self._connection = None


def prepare_forks() -> None:
    """Start the process that is forked, if tests fork, so that it is a child from now on."""
    prepare = getattr(subprocess.Popen, "prepare", None)
    if prepare is not None:
        prepare()


def command_line(pid: int) -> list[str]:
    """The command line of a process; of a fork, the one that it was asked for.

    Raises:
        OSError: there is no such process.
    """
    folder = getattr(subprocess.Popen, "command_lines", "")
    if folder and (file := Path(folder, str(pid))).exists():
        return list(json.loads(file.read_text()))
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def _adopt_orphans(does: bool) -> None:
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(does)):
        raise OSError("no orphan can be adopted")


def _serve(connection: socket.socket, command_lines: str) -> _Program | None:
    """Fork for each request; gives the program in a fork, and None when the other end closes."""
    while header := connection.recv(8, socket.MSG_WAITALL):
        data = connection.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL)
        asked = _Asked(**json.loads(data))
        received: list[int] = []
        while len(received) < len(asked.numbers):
            received += socket.recv_fds(connection, 1, _AT_ONCE)[1]
        released, release = os.pipe()
        read_pid, tell_pid = os.pipe()
        first = os.fork()
        if first == 0:
            if pid := os.fork():
                os.write(tell_pid, pid.to_bytes(8, "little"))
                os._exit(0)
            os.close(release)
            os.read(released, 1)  # until the parent is the one that asked
            _become(asked, received, command_lines)
            connection.detach()  # `_become` has closed it
            return _Program.of(asked.command)
        os.waitpid(first, 0)
        connection.sendall(os.read(read_pid, 8))
        for fd in (released, release, read_pid, tell_pid, *received):
            os.close(fd)
    return None


def main() -> None:
    """Import modules, serve requests at a descriptor, and in each fork run its program."""
    for name in _IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the tests
    gc.collect()
    gc.freeze()
    descriptor, command_lines = sys.argv[1:]
    program = _serve(socket.socket(fileno=int(descriptor)), command_lines)
    if program is not None:
        _Forking.command_lines = command_lines
        subprocess.Popen = _ForkingItself  # type: ignore[misc]
        program.run()
