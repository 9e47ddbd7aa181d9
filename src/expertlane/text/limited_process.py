"""A process that works for this one within limits of memory and time, seen from both sides.

Only limits of a process hold inside a single operation of a library, such as `10 ** 10 ** 9` in a
template or the compilation of a grammar; and only a process may be killed. Requests and answers are
JSON, over the connection that is its standard input.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from expertlane.errors import UserError

# Isolated: neither the working directory nor the environment decides what is imported. Packages
# outside the standard library come from where this process has them.
_PROGRAM = "import sys; sys.path += sys.argv[1:]; from expertlane.text.{} import main; main()"
_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ")  # all that it gets: others may be secrets
_PARENT_CHECK_S = 2.0  # how often an idle process checks that its parent lives
_MAX_ERROR_CHARACTERS = 500


@dataclass(frozen=True)
class Limits:
    """Limits on one request.

    Attributes:
        cpu_s: CPU time of all threads.
        memory_bytes: address space, beyond what the process has when it is limited.
        answer_s: wall time, far longer than `cpu_s`: the machine may be busy.
    """

    cpu_s: float
    memory_bytes: int
    answer_s: float = 30.0


class LimitedProcess:
    """A process that answers requests; safe to use from several threads.

    It starts with the first request, or with `start`, and ends with this object or with the
    process that has it. After a request that broke a limit or failed, the next one starts another
    process.

    Args:
        module: of `expertlane.text`; its function `main` is the program, which uses a `Worker`.
        packages: that it imports, beside the standard library.
        given: what every such process gets first.
    """

    def __init__(self, module: str, packages: Sequence[str], limits: Limits, given: Any) -> None:
        self._module = module
        self._packages = packages
        self._limits = limits
        self._given = given
        self._lock = threading.Lock()
        self._started: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The process that answers; None where the next request starts one."""
        return None if self._started is None else self._started.process.pid

    def start(self) -> None:
        """Start the process now, so that it gets ready while the caller goes on."""
        with self._lock:
            if self._started is None:
                self._start()

    def ask(self, request: Any) -> str:
        """The answer to a request.

        Raises:
            UserError: one line with the reason for a refusal, or the limit that it broke.
        """
        with self._lock:
            started = self._started
            if started is None or started.process.poll() is not None:  # killed, as for its memory
                started = self._start()
            answer: dict[str, Any] = {}
            try:
                answer = self._answer(started, request)
            finally:
                if answer.get("is_last", True):
                    started.end()
                    self._started = None
        if "error" in answer:
            raise UserError(" ".join(answer["error"].split()))
        return str(answer["text"])

    def _start(self) -> "_Child":
        self._started = started = _Child(self._module, self._packages)
        first = {"limits": asdict(self._limits), "given": self._given}
        with suppress(OSError):  # it has ended; who asks it finds out why
            started.connection.send_bytes(json.dumps(first).encode())
        return started

    def _answer(self, started: "_Child", request: Any) -> dict[str, Any]:
        """A `text` or an `error`; `is_last` is false where the process can go on."""
        try:
            started.connection.send_bytes(json.dumps(request).encode())
            if not started.connection.poll(self._limits.answer_s):
                return {"error": f"no answer within {self._limits.answer_s:g} s"}
            answer: dict[str, Any] = json.loads(started.connection.recv_bytes())
        except (EOFError, OSError):
            return {"error": self._why_ended(started.process)}
        return answer

    def _why_ended(self, process: "subprocess.Popen[bytes]") -> str:
        try:
            code = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code == -signal.SIGPROF:
            return f"it takes more than {self._limits.cpu_s:g} s of CPU time"
        if code < 0:  # what is not Python aborts without memory, or overflows its stack
            name = signal.Signals(-code).name
            return f"it takes too much memory, or is nested too deeply: its process got {name}"
        return f"its process ended with exit code {code}"


class _Child:
    """A process and the connection to it."""

    def __init__(self, module: str, packages: Sequence[str]) -> None:
        paths = dict.fromkeys(map(_package_folder, packages))
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM.format(module), *paths],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                process_group=0,  # a terminal's Ctrl-C is not for it
            )
        self.end = weakref.finalize(self, _end, self.process, self.connection, os.getpid())


def _package_folder(name: str) -> str:
    """The folder that a package is imported from."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"{name} is needed but not installed")
    return str(Path(spec.origin).parents[1])


def _end(process: "subprocess.Popen[bytes]", connection: Connection, owner: int) -> None:
    connection.close()
    if os.getpid() == owner:  # a fork of the owner only closes its copy
        process.kill()
        process.wait()


class Worker:
    """The side of the process itself; a program's `main` uses it.

    Args:
        explain: gives the text of an error; by default its type and its message.

    Attributes:
        given: as `LimitedProcess` has it.
    """

    def __init__(self, explain: Callable[[Exception], str] | None = None) -> None:
        self._explain = explain or _named
        self._connection = Connection(0)
        self._parent = os.getppid()
        first = json.loads(next(self.requests()))
        self._limits = Limits(**first["limits"])
        self._most_kept = self._limits.memory_bytes // 4  # from one request to the next
        self.given: Any = first["given"]

    def limit_memory(self) -> None:
        """Limit memory to what is mapped now plus the limit."""
        self._most_kept += memory_bytes().mapped
        _limit(resource.RLIMIT_AS, memory_bytes().mapped + self._limits.memory_bytes)
        _limit(resource.RLIMIT_CORE, 0)

    def requests(self) -> Iterator[bytes]:
        """Requests as they arrive, until the parent ends, even if others hold its socket."""
        while True:
            while not self._connection.poll(_PARENT_CHECK_S):
                if os.getppid() != self._parent:
                    return
            try:
                yield self._connection.recv_bytes()
            except EOFError:
                return

    def answer(self, make: Callable[[], str]) -> None:
        """Send the text, or the reason for having none.

        After a `UserError` the process goes on; after any other error it ends. SIGPROF ends it
        when the CPU time is used up.
        """
        signal.setitimer(signal.ITIMER_PROF, self._limits.cpu_s)
        answer: dict[str, Any] = {}
        has_failed = False
        try:
            answer["text"] = make()
        except UserError as error:
            answer["error"] = str(error)
        except MemoryError:
            answer["error"], has_failed = "it takes too much memory", True
        except Exception as error:  # a template is a program: anything can fail
            answer["error"], has_failed = self._explain(error), True
        if "error" in answer:
            answer["error"] = answer["error"][:_MAX_ERROR_CHARACTERS]
        answer["is_last"] = has_failed or self._keeps_too_much()  # no error holds memory here
        self._connection.send_bytes(json.dumps(answer).encode())
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _keeps_too_much(self) -> bool:
        """True if the next request would find less memory than it may take."""
        if memory_bytes().mapped <= self._most_kept:
            return False
        give_back()
        return memory_bytes().mapped > self._most_kept


class MemoryBytes(NamedTuple):
    """Memory of this process: all that is mapped, and what is resident."""

    mapped: int
    resident: int


def memory_bytes() -> MemoryBytes:
    """The memory of this process now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped, resident, *_ = map(int, file.read().split())
    return MemoryBytes(mapped * resource.getpagesize(), resident * resource.getpagesize())


def give_back() -> None:
    """Give freed memory back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))
