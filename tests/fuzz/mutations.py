"""Files and command lines made wrong: by structure, and byte by byte."""

import json
from collections.abc import Iterable
from typing import Any

import tomli_w
from hypothesis import strategies as st

# Written as they are, into TOML, JSON and options alike; not all are valid in each.
WHOLE_NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "99999999999",
    "2147483648",
    "1000000000000",
    "9000000000000000000",
    "18446744073709551616",
    "1" + "0" * 29,
    "9" * 400,
    "9" * 5000,
)
FRACTIONS = (
    "0.5",
    "1.0",
    "-0.0",
    "-1.0",
    "1e-300",
    "5e-324",
    "1e23",
    "1e29",
    "1e300",
    "1e400",
    "nan",
    "NaN",
    "inf",
    "Infinity",
    "-Infinity",
)
TOKENS = (
    *WHOLE_NUMBERS,
    *FRACTIONS,
    "true",
    "false",
    "null",
    "",
    '""',
    '"a\\nb"',
    '"\\u0000"',
    '"\\u001b[31m"',
    '"/dev/zero"',
    '"fifo"',
    '"1"',
    "[]",
    "{}",
    "[1, 2, 3]",
    '{"a": 1}',
    "1979-05-27",
    "[" * 2000,
    "[" * 150 + "]" * 150,
)
_MARK = "@@{}@@"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value but the whole."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:8]))
    found = []
    for key, child in items:
        found.append((*path, key))
        found += _places(child, (*path, key))
    return found


def _numbers_like(value: Any) -> tuple[str, ...]:
    """Mostly of the kind that is expected, which gets further before it is refused."""
    if isinstance(value, bool):
        return TOKENS
    return (*WHOLE_NUMBERS, "0.5", "1e29") if isinstance(value, int) else (*FRACTIONS, "0", "-1")


def _at(document: Any, path: Iterable[Any]) -> Any:
    for step in path:
        document = document[step]
    return document


def _mutate(draw: Any, document: Any, tokens: list[str]) -> None:
    """One change inside a document, in place."""
    places = _places(document)
    if not places:
        return
    numbers = [place for place in places if isinstance(_at(document, place), int | float)]
    kinds = ("number", "number", "token", "delete", "rename", "twice", "swap", "wrap", "unwrap")
    kind = draw(st.sampled_from(kinds))
    *path, key = draw(st.sampled_from(numbers if kind == "number" and numbers else places))
    parent = _at(document, path)
    if kind in ("number", "token"):
        known = TOKENS if kind == "token" else _numbers_like(parent[key])
        tokens.append(draw(st.sampled_from(known)))
        parent[key] = _MARK.format(len(tokens) - 1)
    elif kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(["", "x", "name", "layout", "a\nb", key + "s"]))] = parent.pop(
            key
        )
    elif kind == "twice" and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif kind == "swap":
        other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else [0, -1]))
        parent[key], parent[other] = parent[other], parent[key]
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif kind == "unwrap" and isinstance(parent[key], dict | list) and parent[key]:
        inner = parent[key]
        parent[key] = next(iter(inner.values())) if isinstance(inner, dict) else inner[0]


def _written(document: Any, tokens: list[str], *, as_toml: bool) -> bytes:
    try:
        text = tomli_w.dumps(document) if as_toml else json.dumps(document, indent=1)
    except (TypeError, ValueError):  # null in TOML
        text = json.dumps(document)
    for number, token in enumerate(tokens):
        text = text.replace(f'"{_MARK.format(number)}"', token)
    return text.encode("utf-8", "surrogatepass")


def _bytewise(draw: Any, data: bytes) -> bytes:
    """One change that knows nothing of a file's form."""
    place = draw(st.integers(0, len(data)))
    kind = draw(
        st.sampled_from(("flip", "flip", "cut", "insert", "drop", "bom", "utf16", "empty", "line"))
    )
    if kind == "flip" and place < len(data):
        return (
            data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        )
    if kind == "cut":
        return data[:place]
    if kind == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
    if kind == "drop":
        return data[:place] + data[place + draw(st.integers(1, 64)) :]
    if kind == "bom":
        return b"\xef\xbb\xbf" + data
    if kind == "utf16":
        return data.decode("utf-8", "replace").encode("utf-16")
    if kind == "empty":
        return b""
    lines = data.split(b"\n")
    number = draw(st.integers(0, len(lines) - 1))
    return b"\n".join([*lines[:number], lines[number], *lines[number:]])


def changed_file(draw: Any, document: Any, *, as_toml: bool) -> bytes:
    """A file with one to three mistakes; now and then with none."""
    document = json.loads(json.dumps(document))
    tokens: list[str] = []
    is_bytewise = draw(st.integers(0, 3)) == 0
    for _ in range(0 if is_bytewise else draw(st.sampled_from((1, 1, 1, 2, 3)))):
        _mutate(draw, document, tokens)
    data = _written(document, tokens, as_toml=as_toml)
    for _ in range(draw(st.integers(0, 3)) if is_bytewise else 0):
        data = _bytewise(draw, data)
    return data


def changed_bytes(draw: Any, data: bytes) -> bytes:
    """A file of no known form, changed once to three times."""
    for _ in range(draw(st.integers(1, 3))):
        data = _bytewise(draw, data)
    return data


def changed_arguments(draw: Any, arguments: list[str]) -> list[str]:
    """A command line with one or two mistakes."""
    changed = list(arguments)
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        values = [
            place
            for place in range(1, len(changed))
            if not changed[place].startswith("--") and _is_number(changed[place])
        ]
        if len(changed) < 2:
            break
        kinds = ("number", "number", "number", "part", "part", "token", "delete", "twice", "path")
        kind = draw(st.sampled_from(kinds))
        if kind == "part":
            values = [place for place in range(1, len(changed)) if "=" in changed[place]]
        is_aimed = kind in ("number", "part") and values
        place = draw(st.sampled_from(values) if is_aimed else st.integers(1, len(changed) - 1))
        token = draw(st.sampled_from(TOKENS if kind == "token" else WHOLE_NUMBERS + FRACTIONS))
        if kind in ("number", "token") and not changed[place].startswith("--"):
            changed[place] = token
        elif kind == "part" and "=" in changed[place]:
            head, _, tail = changed[place].rpartition("=")
            changed[place] = f"{head}={token}" + draw(st.sampled_from(["", f",{head}={tail}", ","]))
        elif kind == "delete":
            del changed[place]
        elif kind == "twice":
            changed.insert(place, changed[place])
        elif kind == "path":
            odd = [".", "/", "/dev/zero", "/dev/null", "fifo", "a\nb", "x" * 5000, "--", "-1"]
            changed[place] = draw(st.sampled_from(odd))
    return changed


def _is_number(text: str) -> bool:
    return any(character.isdigit() for character in text)
