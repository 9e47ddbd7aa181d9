import json

import pytest

from expertlane.printable import printable, printable_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("TP 8 × PP 2 — 語 😀 e\u0301", "TP 8 × PP 2 — 語 😀 e\u0301"),
        ("\x1b[31m\x07\r\x08\x7f", "\\x1b[31m\\x07\\r\\x08\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202eabc\u202c \u2066\u2069\u2028", "\\u202eabc\\u202c \\u2066\\u2069\\u2028"),
        ("caf\udce9", "caf\\udce9"),
        ("a\nb\tc", "a\\nb\\tc"),
    ],
)
def test_unsafe_characters_are_escaped(text, shown):
    assert printable(text) == shown


def test_what_is_kept():
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


def test_json_stays_the_same():
    text = json.dumps({"a": "\x7f\x9b\u202e\u2028 é\n"}, ensure_ascii=False, indent=2) + "\n"
    shown = printable_json(text)
    assert json.loads(shown) == json.loads(text)
    assert not set("\x7f\x9b\u202e\u2028") & set(shown)
    assert "é" in shown
    assert shown.count("\n") == text.count("\n")
