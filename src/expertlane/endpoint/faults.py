"""Faults of a drill: signals to a process or rank, deletion of a pod, a user's command."""

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from expertlane.errors import UserError
from expertlane.printable import printable

Signal = Literal["KILL", "STOP", "TERM"]
_POLL_S = 0.02
_TAIL_BYTES, _MOST_WORDS = 4096, 200
_WHICH_CLUSTER = ("-n", "--namespace", "--context", "--kubeconfig", "--cluster", "--user")
_IN_A_POD = "--kill 'kubectl exec POD -c CONTAINER -- pkill -{} -f PATTERN'"


@dataclass(frozen=True)
class FaultOutcome:
    """The outcome of a fault that was given: of a command or a signal.

    Attributes:
        exit_code: of a command, 0; None for a signal.
        took_s: seconds that it took.
        printed: the end of what it printed, in a line.
    """

    exit_code: int | None = None
    took_s: float = 0.0
    printed: str = ""


@dataclass(frozen=True)
class SignalFault:
    """A signal to a process of this machine.

    Attributes:
        name: what the process is, in words.
    """

    pid: int
    signal: Signal
    name: str

    @property
    def words(self) -> str:
        """`SIGKILL to rank 1 (process 4711)`."""
        return f"SIG{self.signal} to {self.name}"

    def check(self) -> None:
        """Check that the process is there, may be signalled, and is not this one.

        Raises:
            UserError: otherwise.
        """
        if self.pid in _own_line():
            raise UserError(f"--pid {self.pid} is this process, or one that it runs in")
        self._send(0)

    async def strike(self) -> FaultOutcome:
        """Send it.

        Raises:
            UserError: the process has ended meanwhile.
        """
        self._send(signal.Signals[f"SIG{self.signal}"])
        return FaultOutcome()

    def _send(self, number: int) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            raise UserError(f"there is no {self.name}") from None
        except PermissionError:
            raise UserError(f"{self.name} belongs to another user") from None


def _own_line() -> set[int]:
    """This process and those above it."""
    from expertlane.endpoint.processes import processes

    found, line, pid = processes(), {os.getpid(), os.getppid(), 0, 1}, os.getpid()
    while pid in found and (pid := found[pid].parent) not in (0, 1):
        line.add(pid)
    return line


@dataclass(frozen=True)
class CommandFault:
    """A command that kills or stops something, wherever that is.

    Attributes:
        argv: the command, or a shell with the command for it.
        words: what is done, for a report.
        within_s: seconds that it may take; then it is ended.
    """

    argv: Sequence[str]
    words: str
    within_s: float

    def check(self) -> None:
        """Check that its program is there.

        Raises:
            UserError: it is not.
        """
        if shutil.which(self.argv[0]) is None:
            raise UserError(f"there is no command {self.argv[0]!r} here")

    async def strike(self) -> FaultOutcome:
        """Run it once.

        Raises:
            UserError: it failed or did not end, so that nobody knows what was done.
        """
        began_s = time.perf_counter()
        with tempfile.TemporaryFile() as printed:
            process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
            try:
                until_s = began_s + self.within_s
                while process.poll() is None and time.perf_counter() < until_s:
                    await asyncio.sleep(_POLL_S)
            finally:
                if (code := process.poll()) is None:
                    with suppress(OSError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            printed.seek(max(0, printed.seek(0, os.SEEK_END) - _TAIL_BYTES))
            said = " ".join(printed.read().decode("utf-8", "replace").split())
        said = printable(said[-_MOST_WORDS:])
        if code != 0:
            how = f"ended with exit code {code}" if code else f"did not end in {self.within_s:g} s"
            hint = "end it with || true" if code else "let it go on in the background, by &,"
            raise UserError(
                f"{self.words} {how}{f': {said}' if said else ''}; so what it did is not known "
                f"({hint} if that is as it should be)"
            )
        return FaultOutcome(code, time.perf_counter() - began_s, said)


Fault = SignalFault | CommandFault  # done once to a server under load


def by_shell(command: str, within_s: float) -> CommandFault:
    """A command of the user's, for the user's shell."""
    shell = os.environ.get("SHELL") or "/bin/sh"
    return CommandFault((shell, "-c", command), f"--kill {command!r}", within_s)


def by_kubectl(words: str, how: Signal, within_s: float) -> CommandFault:
    """A pod's end.

    Args:
        words: the pod as a shell would give it to kubectl: POD, NAMESPACE/POD, and options that say
            which cluster is meant.

    Raises:
        UserError: they name no pod, or the signal is STOP, which kubectl cannot send.
    """
    if how == "STOP":
        raise UserError(f"--kubectl ends a pod; to stop a process in it: {_IN_A_POD.format(how)}")
    try:
        given = shlex.split(words)
        options, pods = _kubectl_words(given)
    except ValueError as error:
        raise UserError(f"--kubectl {words!r}: {error}") from None
    namespace, _, name = pods[0].rpartition("/") if len(pods) == 1 else ("", "", "")
    if not name or name.startswith("-"):
        raise UserError(f"--kubectl is {words!r}; it must be a pod's name, or NAMESPACE/POD")
    argv = ["kubectl", "delete", "pod", name, "--wait=false", f"--request-timeout={within_s:g}s"]
    argv += ["--namespace", namespace] if namespace else []
    argv += [*options, *(["--grace-period=0", "--force"] if how == "KILL" else [])]
    return CommandFault(argv, f"kubectl delete pod {words} (SIG{how})", within_s)


def _kubectl_words(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of kubectl with their values, and all other words.

    Raises:
        ValueError: an option is another than of `_WHICH_CLUSTER`, or lacks its value.
    """
    options, others, left = list[str](), list[str](), list(given)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            others.append(word)
            continue
        name, has_value, _ = word.partition("=")
        if name in ("-c", "--container"):
            raise ValueError(f"a pod ends as a whole; for a process: {_IN_A_POD.format('KILL')}")
        if name not in _WHICH_CLUSTER:
            raise ValueError(f"{name} is none of {', '.join(_WHICH_CLUSTER)}")
        if not has_value and (not left or left[0].startswith("-")):
            raise ValueError(f"{name} has no value")
        options += [word] if has_value else [word, left.pop(0)]
    return options, others
