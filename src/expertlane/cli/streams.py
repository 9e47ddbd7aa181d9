"""Standard streams that may be closed, full, without a reader, or unable to encode a character."""

import codecs
import errno
import io
import select
import signal
import sys
from contextlib import contextmanager

from expertlane.errors import ExpertlaneError
from expertlane.spec.files import fill_closed

TYPE_CHECKING = False  # as in main.py
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from typing_extensions import Buffer

_REPLACE = "expertlane.replace"
# Characters of tables and sentences, for a terminal that has ASCII alone; others become `?`.
_ASCII = str.maketrans("×–—−·…µ“”‘’≤≥─═│", "x---..u\"\"''<>-=|")


class StandardOutputError(ExpertlaneError):
    """Standard output cannot be written to.

    Attributes:
        is_reader_gone: the other end of the pipe is closed, as with `| head`: no mistake.
        is_closed: there was none when this process started, as with `>&-`.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")
        self.is_reader_gone = error.errno == errno.EPIPE
        self.is_closed = error.errno == errno.EBADF
        if self.is_reader_gone:
            self.exit_code = 128 + signal.SIGPIPE  # as of a program that the signal ends


def guard_streams() -> None:
    """Make writing to stdout fail by `StandardOutputError` alone, and to stderr not at all.

    A closed stdin or stderr becomes /dev/null; a closed stdout takes nothing. Streams that a caller
    has replaced stay.
    """
    codecs.register_error(_REPLACE, _replacement)
    closed = fill_closed()
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (for as long as the process)
    if sys.stdout is sys.__stdout__:
        kind = _ClosedOutput if 1 in closed else _Output
        sys.stdout = _text(sys.stdout, kind(1, "w", closefd=False))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(sys.stderr, _Errors(2, "w", closefd=False))


@contextmanager
def may_be_lost() -> "Iterator[None]":
    """Output that files have too, or that nobody needs: without standard output it is left out.

    Raises:
        StandardOutputError: it cannot be written although standard output is open.
    """
    try:
        yield
    except StandardOutputError as error:
        if not error.is_closed:
            raise


def _text(before: "TextIO | None", raw: io.FileIO) -> io.TextIOWrapper:
    """Like the stream before, but it replaces characters that it cannot encode."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", "utf-8"),
        errors=_REPLACE,
        # With PYTHONUNBUFFERED text is written through, here only as far as the buffer.
        line_buffering=any(
            getattr(before, each, False) for each in ("line_buffering", "write_through")
        ),
    )


class _Output(io.FileIO):
    """Fails once, and then discards what is still in buffers, so that nothing fails at exit."""

    _has_failed = False

    def write(self, data: "Buffer", /) -> int:
        if self._has_failed:
            return memoryview(data).nbytes
        try:
            while (num_bytes := super().write(data)) is None:  # non-blocking, and full
                select.select([], [self], [])
        except OSError as error:
            self._has_failed = True
            raise StandardOutputError(error) from None
        return num_bytes


class _ClosedOutput(_Output):
    """Fails as if its descriptor were still closed."""

    def write(self, data: "Buffer", /) -> int:
        if self._has_failed:
            return memoryview(data).nbytes
        self._has_failed = True
        raise StandardOutputError(OSError(errno.EBADF, "it is closed"))


class _Errors(io.FileIO):
    """Discards what cannot be written: no command depends on its messages."""

    def write(self, data: "Buffer", /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end].translate(_ASCII)
    return "".join(each if each.isascii() else "?" for each in lost), error.end
