"""A server process on this machine: start it, wait until it is ready, stop it and its children."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Self

from expertlane.comparison import guard
from expertlane.errors import ExpertlaneError, UserError
from expertlane.printable import printable

LOG = "server.log"
_GRACE_S = 10.0  # from SIGTERM to SIGKILL
_ENDING_S = 1.0
_TAIL_BYTES = 2**16
_MOST_WORDS = 300
_POLL_S = 0.1
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# The last line of an exception, such as `ValueError: …`, after a logger's prefix.
_ERROR = re.compile(
    r"(?:^|[\s:\]])(?<!raise )((?:[A-Za-z_][\w.]*)?(?:Error|Exception)(?:: \S.*)?)$"
)
_FRAME = re.compile(r'File "([^"]+)", line \d+, in (\S+)')
_ELSEWHERE = re.compile(r"(?i)root cause|see (?:the )?stack|stack trace")
_REFUSAL = re.compile(r"(?:^|[\s:\]])((?:[\w./-]+: )?error: \S.*)")


class ServerError(ExpertlaneError):
    """A server did not start, or ended; the text has its last error or line."""


class ServerProcess:
    """A server process under a guard process, which stops it however this process ends.

    Args:
        argv: its command.
        environment: environment variables to add to this process's.
        folder: its working directory, which is made; its log is written there.
        files: texts to write there before it starts, by file name.
        cores: cores that it runs on; empty for all.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        files: Mapping[str, str] = MappingProxyType({}),
        cores: Sequence[int] = (),
    ) -> None:
        self.log = folder / LOG
        self._began_s = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text)
            output = self.log.open("ab")
            self._log_begins = self._ready_at = output.tell()
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None
        pipe, self._pipe = os.pipe()
        guarded = [guard.__file__, str(pipe), str(_GRACE_S), ",".join(map(str, cores)), *argv]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", *guarded],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=os.environ | dict(environment),
                pass_fds=(pipe,),
                start_new_session=True,  # Ctrl-C is for this process, which ends the server
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            output.close()
            os.close(pipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def exit_status(self) -> int | None:
        """None while it runs; 128 and a signal's number where that ended it."""
        return self._process.poll()

    @property
    def guard_pid(self) -> int:
        """The process that the server, and what it leaves behind, are children of."""
        return self._process.pid

    def linger(self) -> None:
        """If the server ends by itself from now on, leave its children until `stop`."""
        os.write(self._pipe, b"+")

    def exit_status_soon(self) -> int | None:
        """`exit_status`, after a wait of up to a second: a server that failed may be exiting."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_S)
        return self.exit_status

    def stop(self) -> None:
        """Stop the server and all its descendants; return once they are gone."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        with suppress(KeyboardInterrupt):  # a second Ctrl-C does not leave processes behind
            self._process.wait()
            return
        self._process.wait()

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> float:
        """Wait until the server is ready; return the seconds since its start.

        Args:
            is_ready: asks the server; called repeatedly.
            timeout_s: seconds since its start.

        Raises:
            ServerError: it ended, or was not ready in time.
        """
        while (waited_s := time.monotonic() - self._began_s) < timeout_s:
            if (status := self.exit_status) is not None:
                raise ServerError(f"exited during startup, {self.end_of(status)}")
            if is_ready():
                with suppress(OSError):
                    self._ready_at = self.log.stat().st_size
                return waited_s
            time.sleep(_POLL_S)
        words = self.last_words()
        said = f"; its last line: {words}" if words else "; it printed nothing"
        raise ServerError(f"not ready within {timeout_s:g} s{said}")

    def end_of(self, status: int) -> str:
        """An exit status in words, with the last error or line of the log."""
        how = f"signal {status - 128}" if status > 128 else f"exit code {status}"
        words = self.last_words()
        return f"{how}: {words}" if words else f"{how}, and printed nothing"

    def last_words(self) -> str:
        """The last error in the log, else its last line; empty without output."""
        return last_words(self._output(self._log_begins))

    def errors(self) -> str:
        """The first error in the log since the server was ready, and the last; empty without one.

        The process that fails prints its error first, those that waited for it theirs after it.
        """
        errors = _errors(self._output(self._ready_at))
        return ", then ".join(dict.fromkeys((errors[0], errors[-1]))) if errors else ""

    def _output(self, begin: int) -> str:
        """The last bytes of the log from this byte on."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(begin, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""


def last_words(text: str) -> str:
    """The last error in a log, else its last line; printable, and shortened."""
    errors = _errors(text)
    lines = [line for line in map(_plain, text.splitlines()) if line]
    return errors[-1] if errors else _cut((lines or [""])[-1])


def _errors(text: str) -> list[str]:
    """The errors in a log, without those that only refer to another one.

    Servers wrap an engine's error: `RuntimeError: … failed, see root cause above`. To an error
    without a message the function that raised it is added.
    """
    errors, frame = list[str](), ""
    for line in map(_plain, text.splitlines()):
        if (within := _FRAME.search(line)) is not None:
            frame = f" in {within[2]} ({Path(within[1]).name})"
        elif (found := _ERROR.search(line) or _REFUSAL.search(line)) is not None:
            errors.append(found[1] if ": " in found[1] else f"{found[1]}{frame}")
            frame = ""
    return [_cut(each) for each in errors if not _ELSEWHERE.search(each)] or errors[-1:]


def _plain(line: str) -> str:
    return _COLOURS.sub("", line).strip()


def _cut(words: str) -> str:
    words = printable(words)
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}…"


def command_line(
    argv: Sequence[str],
    environment: Mapping[str, str],
    files: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """A shell command that writes the files, sets the variables and starts the program."""
    written = (f"echo {shlex.quote(text)} > {shlex.quote(name)}" for name, text in files.items())
    variables = (f"{name}={shlex.quote(value)}" for name, value in environment.items())
    return " && ".join([*written, " ".join([*variables, shlex.join(argv)])])
