"""Output of commands: which process prints, how wide, progress, what can be written."""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from expertlane.errors import UserError
from expertlane.progress import Progress, Silent
from expertlane.spec.files import strict_json
from expertlane.spec.printable import printable, printable_json

TERMINAL_WIDTH = 100  # columns at most; a narrower terminal keeps its own width
PIPED_WIDTH = 80


def is_first_process() -> bool:
    """Whether this process prints and writes: all but the ranks after the first of `torchrun`."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def stdout_console() -> Console:
    """The console for tables."""
    if not sys.stdout.isatty():
        return Console(width=PIPED_WIDTH, markup=False, emoji=False)
    return Console(width=min(TERMINAL_WIDTH, Console().width), markup=False, emoji=False)


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


def command_line() -> str:
    """The command as a user typed it; bytes of a name that are not UTF-8 become U+FFFD."""
    line = shlex.join(["expertlane", *sys.argv[1:]])
    return os.fsencode(line).decode("utf-8", "replace")


def check_folder(folder: Path) -> None:
    """Check, before anything runs, that results can be written there; leaves nothing behind.

    Raises:
        UserError: a part of the path is no folder, or not writable.
    """
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


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """Progress as a bar on a terminal, as a line per finished task elsewhere."""
    if not is_first_process():
        yield Silent()
    elif not sys.stderr.isatty():
        yield _Lines(sys.stderr)
    else:
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


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def task(self, description: str, total: int) -> None:
        self._description = printable(description)
        self._started_s = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        pass

    def done(self) -> None:
        elapsed_s = time.monotonic() - self._started_s
        print(f"{self._description}: done in {elapsed_s:.1f} s", file=self._stream, flush=True)


class _Bars:
    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars

    def task(self, description: str, total: int) -> None:
        self._total = total
        self._task = self._bars.add_task(printable(description), total=total)

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._task, amount)

    def done(self) -> None:
        self._bars.update(self._task, completed=self._total)
