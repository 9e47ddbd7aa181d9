"""The entry point of the command line: signals, standard streams, errors, exit codes.

Signal handlers are set before anything else is imported, so that no signal ends in a traceback.
"""

import errno
import os
import signal
import sys

TYPE_CHECKING = False  # as typing's, which takes longer to import than all else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, Never, NoReturn

    from expertlane.errors import ExpertlaneError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHELL_BASE = 128  # shells add it to a signal's number
INTERRUPTED = _SHELL_BASE + signal.SIGINT
_LONG, _SHOWN_NAME = 300, 60  # characters of a name in a message: when it is cut, and to what
_NO_THREAD = "can't start new thread"  # Python's own words


def main() -> "NoReturn":
    """Run the command line and exit.

    Errors raised on purpose end in one line on stderr and their exit code (2 for a user's
    mistake); any other exception keeps its traceback. Output that cannot be written ends with exit
    code 1, or 141 without a message where the reader of a pipe has ended.
    """
    _set_signal_handlers(_exit_at_once)  # nothing has started yet
    from expertlane.cli.output import StandardOutputError, guard_streams

    guard_streams()
    code = _run()
    try:
        sys.stdout.flush()
    except StandardOutputError as error:  # only now: the output was in the buffer
        code = _report(error) if code == 0 else code
    sys.exit(code)


def _run() -> int:
    """Run the command, print the error that ended it, and return its exit code."""
    from expertlane.cli.app import app
    from expertlane.errors import ExpertlaneError, UserError, no_room

    try:
        _set_signal_handlers(_raise)
        try:
            code = app(standalone_mode=False, prog_name="expertlane") or 0
        finally:
            _set_signal_handlers(_exit_at_once)  # all ranks have ended
    except ExpertlaneError as error:
        return _report(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # Usage errors of typer, which carries its own copy of click and exports no base class.
        if type(error).__name__ == "Abort":  # the end of its input
            return _print_error("interrupted", INTERRUPTED)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # of any argument
            line = f"cannot use {error.filename}: the name is too long"
            return _print_error(line, UserError.exit_code)
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return _print_error(no_room(error), UserError.exit_code)
        if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
            return _print_error(no_room(OSError(errno.EAGAIN, "")), UserError.exit_code)
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message().replace("Value error, ", "")  # pydantic's, of a word
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "expertlane"
        hint = f"try: {command} --help"
        if type(error).__name__ == "NoSuchOption" and context is not None:
            given = getattr(error, "option_name", "")
            message = f"there is no option {given}"
            hint = _nearest_options(given, context) or hint
        hint = _nearest_words(message) or hint
        return _print_error(f"{message} ({hint})", UserError.exit_code)
    if code == INTERRUPTED:
        if not _may_start_threads():  # OpenBLAS interrupts a process where it may start none
            return _print_error(no_room(OSError(errno.EAGAIN, "")), UserError.exit_code)
        _print_error("interrupted", code)
    return int(code)


def _may_start_threads() -> bool:
    import threading

    thread = threading.Thread(target=int)
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join()
    return True


def _nearest_options(given: str, context: "Any") -> str:
    """`did you mean …` for an unknown option; empty where none is like it."""
    from expertlane.errors import did_you_mean

    options = (each for each in context.command.params if not getattr(each, "hidden", False))
    names = (name for each in options for name in each.opts if name.startswith("--"))
    return did_you_mean(given, names)


def _nearest_words(message: str) -> str:
    """`did you mean …` for a word that is not one of an option's; empty where none is like it."""
    from expertlane.errors import did_you_mean

    head, is_word, valid = message.partition("' is not one of ")
    given = head.rpartition("'")[2]
    return did_you_mean(given, valid.split("'")[1::2]) if is_word else ""


def _set_signal_handlers(handler: "Callable[[int, FrameType | None], Never]") -> None:
    for number in _SIGNALS:
        # An ignored signal stays ignored, as under `nohup` or in the background of a script.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _exit_at_once(number: int, frame: "FrameType | None") -> "Never":
    os._exit(_SHELL_BASE + number)


def _raise(number: int, frame: "FrameType | None") -> "Never":
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    from expertlane.errors import TerminatedError

    error = TerminatedError(f"ended by {signal.Signals(number).name}")
    error.exit_code = _SHELL_BASE + number
    raise error


def _report(error: "ExpertlaneError") -> int:
    """Print the error that ended the command; returns its exit code."""
    from expertlane.cli.output import StandardOutputError
    from expertlane.printable import printable

    if isinstance(error, StandardOutputError) and error.is_reader_gone:
        return error.exit_code
    for note in getattr(error, "__notes__", ()):  # the traceback of a bug in a rank
        print(printable(note, keep="\n\t"), file=sys.stderr)
    return _print_error(error, error.exit_code)


def _print_error(error: object, code: int) -> int:
    from expertlane.cli.output import is_first_process
    from expertlane.errors import ExpertlaneError
    from expertlane.printable import printable

    # All processes of torchrun find the same mistake or get the same signal; the first prints.
    if is_first_process() or code == ExpertlaneError.exit_code:
        words = (
            word if len(word) <= _LONG else f"{word[:_SHOWN_NAME]}…" for word in str(error).split()
        )
        print("expertlane: error:", printable(" ".join(words)), file=sys.stderr)
    return code
