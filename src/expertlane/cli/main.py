"""How the command line begins and ends: signals, standard streams, errors, exit codes.

Nothing else is imported before signals have their answers, so that they have them from the start.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # as typing's, which takes longer to import than all else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Never, NoReturn

    from expertlane.errors import ExpertlaneError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHELL_BASE = 128  # shells add it to a signal's number
INTERRUPTED = _SHELL_BASE + signal.SIGINT


def main() -> "NoReturn":
    """Run the command line and exit.

    Errors raised on purpose end in one line on stderr and their exit code (2 for a user's
    mistake); any other exception keeps its traceback. What cannot be printed ends the command with
    exit code 1, or 141 without a word where the reader of a pipe is gone.
    """
    _answer_signals(_leave)  # nothing has begun that would have to be ended
    from expertlane.cli.streams import StandardOutputError, guard_streams

    guard_streams()
    code = _run()
    try:
        sys.stdout.flush()
    except StandardOutputError as error:  # only now: the output fitted into the buffer
        code = _tell(error) if code == 0 else code
    sys.exit(code)


def _run() -> int:
    """Run the command; its exit code, once it is said on stderr what ended it."""
    from expertlane.cli.app import app
    from expertlane.errors import ExpertlaneError, UserError

    try:
        _answer_signals(_raise)
        try:
            code = app(standalone_mode=False) or 0
        finally:
            _answer_signals(_leave)  # all has been ended
    except ExpertlaneError as error:
        return _tell(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # Usage errors of typer, which carries its own copy of click and exports no base class.
        if type(error).__name__ == "Abort":  # the end of its input
            return _say("interrupted", INTERRUPTED)
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "expertlane"
        return _say(f"{error.format_message()} (try: {command} --help)", UserError.exit_code)
    if code == INTERRUPTED:
        _say("interrupted", code)
    return int(code)


def _answer_signals(answer: "Callable[[int, FrameType | None], Never]") -> None:
    for number in _SIGNALS:
        # As under `nohup`, or in the background of a script: who ignores it wants it ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer)


def _leave(number: int, frame: "FrameType | None") -> "Never":
    os._exit(_SHELL_BASE + number)


def _raise(number: int, frame: "FrameType | None") -> "Never":
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    from expertlane.errors import TerminatedError

    error = TerminatedError(f"ended by {signal.Signals(number).name}")
    error.exit_code = _SHELL_BASE + number
    raise error


def _tell(error: "ExpertlaneError") -> int:
    """Say what ended the command; its exit code."""
    from expertlane.cli.streams import StandardOutputError
    from expertlane.spec.printable import printable

    if isinstance(error, StandardOutputError) and error.is_reader_gone:
        return error.exit_code
    for note in getattr(error, "__notes__", ()):  # the traceback of a bug in a rank
        print(printable(note, keep="\n\t"), file=sys.stderr)
    return _say(error, error.exit_code)


def _say(error: object, code: int) -> int:
    from expertlane.cli.output import is_speaker
    from expertlane.errors import ExpertlaneError
    from expertlane.spec.printable import printable

    # All ranks of `torchrun` find the same mistake or get the same signal; the first one tells.
    if is_speaker() or code == ExpertlaneError.exit_code:
        print("expertlane: error:", printable(" ".join(str(error).split())), file=sys.stderr)
    return code
