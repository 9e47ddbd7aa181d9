"""Answers as JSON: at once, or in parts where an answer is too large to be an object first.

In both, an iterator is a list, whose entries are made when they are needed.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec

_ENTRIES = 32  # of a list that are objects at the same time
_PART_BYTES = 64 * 2**10  # at least, but for the last part


def _listed(value: object) -> list[Any]:
    if isinstance(value, Iterator):
        return list(value)
    raise NotImplementedError(f"{type(value).__name__} is not JSON")


as_json = msgspec.json.Encoder(enc_hook=_listed).encode


def json_parts(value: object) -> Iterator[bytes]:
    """The same bytes, in parts that are not empty."""
    part = bytearray()
    for data in _pieces(value):
        part += data
        if len(part) >= _PART_BYTES:
            yield bytes(part)
            part.clear()
    if part:
        yield bytes(part)


def _pieces(value: object) -> Iterator[bytes]:
    if isinstance(value, dict):
        before = b"{"
        for name, each in value.items():
            yield before + as_json(name) + b":"
            yield from _pieces(each)
            before = b","
        yield b"}" if value else b"{}"
    elif isinstance(value, Iterator):
        yield b"["
        before = b""
        while entries := list(islice(value, _ENTRIES)):
            yield before
            before = b","
            if _is_lazy(entries[0]):  # they are alike
                for place, each in enumerate(entries):
                    yield b"," if place else b""
                    yield from _pieces(each)
            else:
                yield as_json(entries)[1:-1]
        yield b"]"
    else:
        yield as_json(value)


def _is_lazy(value: object) -> bool:
    """Whether an iterator is inside."""
    if isinstance(value, dict):
        return any(map(_is_lazy, value.values()))
    return isinstance(value, Iterator)
