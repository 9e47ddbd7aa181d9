"""Output of commands: standard streams, how much is printed, progress, results and their files.

A stream may be closed, full, without a reader, or unable to encode a character.
"""

import codecs
import errno
import io
import json
import os
import re
import select
import shlex
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO

import typer

from expertlane.cli.help import Panel
from expertlane.errors import ExpertlaneError, UserError
from expertlane.printable import printable, printable_json
from expertlane.progress import Progress
from expertlane.spec.files import fill_closed, strict_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from typing_extensions import Buffer

    from expertlane.report.document import Report
    from expertlane.results.file import Format
    from expertlane.results.results import Results


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
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    if sys.stdout is sys.__stdout__:
        kind = _ClosedOutput if 1 in closed else _Output
        sys.stdout = _text(sys.stdout, kind(1, "w", closefd=False))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(sys.stderr, _Errors(2, "w", closefd=False))


@contextmanager
def may_be_lost() -> Iterator[None]:
    """Output that files have too, or that nobody needs: without standard output it is left out.

    Raises:
        StandardOutputError: it cannot be written although standard output is open.
    """
    try:
        yield
    except StandardOutputError as error:
        if not error.is_closed:
            raise


def _text(before: TextIO | None, raw: io.FileIO) -> io.TextIOWrapper:
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


# JSON for other programs.
JSON: Any = typer.Option(
    False, "--json", rich_help_panel=Panel.OUTPUT, help="Print JSON instead of text."
)


@dataclass(frozen=True, kw_only=True)
class PrintOptions:
    """Options for how much of the answer is printed.

    Raises:
        UserError: two forms at once.
    """

    panel: ClassVar = Panel.OUTPUT
    full: bool = typer.Option(False, help="Print all tables.")
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print one line.")
    as_json: bool = JSON

    def __post_init__(self) -> None:
        flags = {"--full": self.full, "--quiet": self.quiet, "--json": self.as_json}
        given = [name for name, is_given in flags.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; give one")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(PrintOptions):
    """Options of printing, and the folder for files."""

    out: Path | None = typer.Option(
        None,
        "--out",
        "-o",
        metavar="DIR",
        show_default="results/NAME, after the command and its subject",
        help="Folder that files are written to.",
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(AnswerOptions):
    """Options of printing and files, with export of results.

    Raises:
        UserError: as in `PrintOptions`, or a library for `--export` is missing.
    """

    export: Literal["csv", "parquet"] | None = typer.Option(
        None,
        rich_help_panel=Panel.MORE_OUTPUT,
        help="Also write a flat table for other programs, a row for each deployment and phase or "
        "load. parquet needs pyarrow.",
    )

    def __post_init__(self) -> None:
        from expertlane.results.file import check_format  # numpy, not for the help of commands

        check_format(self.export)
        super().__post_init__()


TERMINAL_WIDTH = 120  # columns at most; a narrower terminal keeps its own width
LEAST_WIDTH, MOST_WIDTH = 40, 1_000  # whatever COLUMNS says
PIPED_WIDTH = 80
TABLE = "results.csv"  # or with the suffix of another format
_TRAILING = re.compile(r" +(?=(?:\x1b\[[0-9;]*m)*$)", re.MULTILINE)


def is_first_process() -> bool:
    """True in the process that prints and writes: under `torchrun` only the first one does."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def stdout_console() -> "Console":
    """The console for tables."""
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    if sys.stdout.isatty():
        width = min(TERMINAL_WIDTH, Console().width)
    else:
        width = int(columns) if columns.isascii() and columns.isdigit() else PIPED_WIDTH
    return Console(
        width=min(max(LEAST_WIDTH, width), MOST_WIDTH), markup=False, emoji=False, highlight=False
    )


@contextmanager
def printing() -> Iterator["Console"]:
    """A console for tables on standard output; lines end without blanks."""
    console = stdout_console()
    with console.capture() as capture:
        yield console
    sys.stdout.write(_TRAILING.sub("", capture.get()))
    sys.stdout.flush()


def print_message(text: str) -> None:
    """Print a line on stderr; unsafe characters of names in it are escaped."""
    print(printable(text, keep="\n"), file=sys.stderr, flush=True)


def print_json(text: str) -> None:
    """Print JSON text; what the stream cannot encode becomes JSON's own escapes."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = strict_json(json.loads(text), indent=2) + "\n"
    sys.stdout.write(printable_json(text))
    sys.stdout.flush()


def now() -> str:
    """The time, as reports say when they were made."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """The command as a user typed it; bytes of a name that are not UTF-8 become U+FFFD."""
    line = shlex.join(["expertlane", *sys.argv[1:]])
    return os.fsencode(line).decode("utf-8", "replace")


def check_folder(folder: Path) -> None:
    """Check, before anything runs, that results can be written there; leaves nothing behind.

    Only in the process that writes.

    Raises:
        UserError: a part of the path is no folder, or not writable.
    """
    if not is_first_process():
        return
    for path in (folder, *folder.absolute().parents):
        try:
            exists = path.exists()
        except OSError as error:
            raise UserError(f"results cannot go to {folder}: {error.strerror}") from None
        if exists:
            if not path.is_dir():
                raise UserError(f"results cannot go to {folder}: {path} is not a folder")
            try:
                with tempfile.TemporaryDirectory(dir=path):
                    return
            except OSError as error:
                raise UserError(
                    f"results cannot go to {folder}: {path} is not writable ({error.strerror})"
                ) from None


def check_file(path: Path) -> None:
    """Check, before anything runs, that a file can be written there; leaves nothing behind.

    Only in the process that writes.

    Raises:
        UserError: its folder is none or not writable, or something else has its name.
    """
    check_folder(path.parent)
    if not is_first_process():
        return
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"cannot write {path}: it is {kind}")


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """Progress as a bar on a terminal, as a line per finished task elsewhere."""
    if not is_first_process():
        yield Progress()
    elif not sys.stderr.isatty():
        yield _Lines(sys.stderr)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with bars:
            yield _Bars(bars)


@contextmanager
def task_on_stderr(description: str, total: int = 1) -> Iterator[Callable[..., None]]:
    """One task's progress on stderr; gives what advances it, by one part or a number."""
    with progress_on_stderr() as progress:
        progress.task(description, total)
        yield progress.advance
        progress.done()


class _Lines(Progress):
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def task(self, description: str, total: int) -> None:
        self._description = printable(description)
        self._started_s = time.monotonic()

    def done(self) -> None:
        elapsed_s = time.monotonic() - self._started_s
        print(f"{self._description}: done in {elapsed_s:.1f} s", file=self._stream, flush=True)


class _Bars(Progress):
    def __init__(self, bars: "RichProgress") -> None:
        self._bars = bars

    def task(self, description: str, total: int) -> None:
        self._total = total
        self._task = self._bars.add_task(printable(description), total=total)

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._task, amount)

    def done(self) -> None:
        self._bars.update(self._task, completed=self._total)


def slug(*names: object) -> str:
    """Names with hyphens between, as a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(map(str, names)))


@dataclass(frozen=True)
class Call:
    """A call of a command, from the command line or Python.

    Attributes:
        command: text of the call, to repeat it; kept in the results.
        out: folder for results, if one was asked for.
        is_typed: it is this command line: results go to `results/NAME` where no folder was asked
            for, and the process ends with the command.
        as_json: standard output is to have JSON.
    """

    command: str
    out: Path | None = None
    is_typed: bool = False
    as_json: bool = False

    @classmethod
    def typed(cls, options: AnswerOptions) -> "Call":
        """The call that is this command line."""
        return cls(command_line(), options.out, is_typed=True, as_json=options.as_json)

    def folder(self, name: str) -> Path | None:
        """The folder for results, checked; None for none.

        Raises:
            UserError: the folder cannot be written to.
        """
        folder = self.out
        if folder is None and self.is_typed:
            folder = Path("results", name)
        if folder is not None:
            check_folder(folder)
        return folder


@dataclass(frozen=True)
class Found:
    """Results of a command, before they are shown.

    Attributes:
        folder: folder to write them to; None for none.
        also: writes files of the command's own, after the results.
        exit_code: the command's, once they are shown.
    """

    results: "Results"
    folder: Path | None
    also: Callable[[], Sequence[Path]] = tuple
    exit_code: int = 0


def publish(found: Found, options: OutputOptions) -> None:
    """Print results, write them and their reports, and say on stderr what was written.

    Args:
        options: how much is printed, and in which form.

    Raises:
        UserError: the folder can't be written to; then the results are printed all the same.
    """
    from expertlane.report.sections import report_of
    from expertlane.results.file import to_json, write

    results, folder = found.results, found.folder
    assert folder is not None, "a command always writes"
    try:
        written = [write(results, folder)]  # first: what was found is kept whatever comes
    except UserError:  # such as a full disk
        print_report(report_of(results), options, None, partial(to_json, results))
        raise
    report = report_of(results)
    try:
        print_report(report, options, folder / "report.html", partial(to_json, results))
    finally:  # also where standard output takes nothing
        written += write_beside(found, report, options.export)
    print_written(written)


def print_report(
    report: "Report", options: PrintOptions, page: Path | None, as_json: Callable[[], str]
) -> None:
    """Print the answer, or as much as the options ask for.

    Args:
        page: the page with the rest, if any; then a closed standard output is no mistake.
        as_json: gives the text that `--json` prints.
    """
    from expertlane.report import terminal

    with nullcontext() if page is None else may_be_lost():
        if options.as_json:
            print_json(as_json())
        elif options.quiet:
            print(report.answer.headline, flush=True)
        else:
            with printing() as console:
                if options.full:
                    terminal.show(report, console)
                else:
                    terminal.show_answer(report, console, page)


def print_written(paths: Sequence[Path]) -> None:
    """Say on stderr what was written."""
    print_message(f"written: {', '.join(map(str, paths))}")


def write_beside(found: Found, report: "Report", export: "Format | None") -> list[Path]:
    """Write all but `results.json` to the folder: reports, a table, the command's own files.

    Raises:
        UserError: the folder can't be written to.
    """
    from expertlane.report.files import write_reports
    from expertlane.results.file import rows_of, write_table

    assert found.folder is not None, "it has been asked for"
    written = list(write_reports(report, found.folder))
    if export is not None:
        written.append(write_table(rows_of(found.results), found.folder / TABLE, export))
    return [*written, *found.also()]
