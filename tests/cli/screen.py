"""Checks of output on a terminal: it fits a screen, and messages hold the expected facts."""

import re
from contextlib import AbstractContextManager, nullcontext

import pytest

from expertlane.errors import UserError

MOST_LINES, MOST_COLUMNS = 40, 80


def fits_a_screen(out: str) -> bool:
    """True if there are few lines, none too wide or with blanks at its end; else it fails."""
    lines = out.splitlines()
    assert len(lines) <= MOST_LINES, out
    assert max(map(len, lines)) <= MOST_COLUMNS, out
    assert [line for line in lines if line != line.rstrip()] == [], out
    return True


def _whole(word: str) -> str:
    """Pattern of a word alone: 8 is neither in 0.8 nor in 80."""
    before = r"(?<!\w)" if re.match(r"\w", word[0]) else ""
    before += r"(?<!\d[.,])" if word[0].isdigit() else ""
    after = r"(?!\w|-\w)" if re.match(r"\w", word[-1]) else ""
    after += r"(?![.,]\d)" if word[-1].isdigit() else ""
    return before + re.escape(word) + after


def telling(words: str) -> str:
    """Pattern of a text that holds all these words, whole, in any order."""
    return "(?s)" + "".join(f"(?=.*{_whole(word)})" for word in words.split())


def tells(text: str, words: str) -> bool:
    """True if a text holds all these facts, values or names, in any wording; else it fails."""
    lacking = [word for word in words.split() if not re.match(telling(word), text)]
    assert lacking == [], text
    return True


def in_order(text: str, words: str) -> bool:
    """True if a text holds these facts in this order; else it fails."""
    end = 0
    for word in words.split():
        found = re.compile(_whole(word)).search(text, end)
        assert found is not None, f"{word!r} does not follow in {text!r}"
        end = found.end()
    return True


def refusing(words: str) -> AbstractContextManager[object]:
    """A context that must raise an error of these facts; or none, where there are no words."""
    return pytest.raises(UserError, match=telling(words)) if words else nullcontext()


def one_line(err: str, words: str) -> bool:
    """True if standard error is one line that holds these facts; else it fails."""
    assert err.startswith("expertlane: error: "), err
    assert err.endswith("\n"), err
    assert err.count("\n") == 1, err
    return tells(err, words)


def refused(answer: tuple[int, str, str], words: str) -> bool:
    """True if a command ended with code 2, no output and one line of these facts; else it fails."""
    code, out, err = answer
    assert (code, out) == (2, ""), answer
    return one_line(err, words)
