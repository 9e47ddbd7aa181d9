"""Makes untrusted text safe to print: no character moves the cursor or hides others."""

import re

# C0 and C1 control characters (ESC among them), line separators, bidirectional controls, and lone
# surrogates, as in names of files that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text with every unsafe character as its escape, `\\x1b`.

    Args:
        keep: characters to leave as they are, such as line ends.
    """

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else ascii(found[0])[1:-1]

    return _UNSAFE.sub(escape, text)


def printable_json(text: str) -> str:
    """JSON text with every unsafe character as a JSON escape; it decodes to the same value."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in "\n\t" else f"\\u{ord(found[0]):04x}"

    return _UNSAFE.sub(escape, text)
