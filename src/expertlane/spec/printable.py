"""Text from elsewhere that is safe to show: no character in it moves a cursor or hides another."""

import re

# Controls of both sets (ESC among them), line separators, what turns the direction of a line, and
# halves of characters, as in names of files that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text with every unsafe character as its escape, `\\x1b`.

    Args:
        keep: characters to leave as they are, such as a line's end.
    """

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else ascii(found[0])[1:-1]

    return _UNSAFE.sub(escape, text)


def printable_json(text: str) -> str:
    """JSON text in which such characters are escaped as JSON has it; it stands for the same."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in "\n\t" else f"\\u{ord(found[0]):04x}"

    return _UNSAFE.sub(escape, text)
