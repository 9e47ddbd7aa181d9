"""Recorded requests as a load: Mooncake's traces, and Azure's of LLM inference.

Mooncake (github.com/kvcache-ai/Mooncake, traces): JSON lines with `timestamp` in milliseconds,
`input_length`, `output_length` and `hash_ids`, one for each block of 512 tokens of the prompt.
Azure (github.com/Azure/AzurePublicDataset, LLM inference 2023 and 2024): CSV with the columns
`TIMESTAMP`, a date and time, `ContextTokens` and `GeneratedTokens`. Neither has any text.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from expertlane.errors import SpecError, UserError
from expertlane.spec.files import parse_json, read_lines, shown_json
from expertlane.spec.ranges import RANGES, shown
from expertlane.spec.workload import HASH_BLOCK, RecordedRequest

_MOST_LINE_BYTES = 2**20
_MOST_NAMED = 5  # further bad lines
_MOST_HASH = 2**63
_MOST_MS = 10**12
_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_FIELDS = ["timestamp", "input_length", "output_length"]

_Parse = Callable[[int, str], RecordedRequest]


def read_requests(path: Path, num_requests: int | None = None) -> tuple[RecordedRequest, ...]:
    """The requests of a file in either format, by arrival; the first one's counts as 0.

    Args:
        num_requests: take so many, the first in the file; None for all.

    Raises:
        SpecError: it cannot be read, is of neither format, or a line is bad; the text names it.
        UserError: it has none, fewer than asked for, or more than a run takes.
    """
    most, found = int(RANGES["num_requests"].high), list[RecordedRequest]()
    bad: list[tuple[int, str]] = []
    for number, text, parse in _parsed(path):
        if num_requests is not None and len(found) + len(bad) == num_requests:
            break
        if len(found) == most:
            raise UserError(f"{path} has over {most:,} requests; --num-requests takes the first N")
        try:
            found.append(parse(number, text))
        except SpecError as error:
            bad.append((number, str(error)))
            if len(bad) > _MOST_NAMED:
                break
    if bad:
        raise SpecError(f"{path}: {_named(bad)}")
    if len(found) < (num_requests or 1):
        wanted = "" if num_requests is None else f"; --num-requests is {num_requests:,}"
        raise UserError(f"{path} has {len(found):,} requests{wanted}")
    first_s = min(each.due_s for each in found)
    found.sort(key=lambda each: each.due_s)
    return tuple(replace(each, due_s=each.due_s - first_s) for each in found)


def _parsed(path: Path) -> Iterator[tuple[int, str, _Parse]]:
    """Each line that holds a request, and what reads it; the first line tells the format."""
    parse: _Parse | None = None
    for number, text in read_lines(path, _MOST_LINE_BYTES):
        if parse is None:
            if text.startswith("{"):
                parse = _mooncake
            elif sorted(header := text.replace(" ", "").split(",")) == sorted(_COLUMNS):
                parse = partial(_azure, [header.index(column) for column in _COLUMNS])
                continue
            else:
                raise SpecError(
                    f"{path}: line {number} is {shown(text)}; it must be a JSON object with "
                    f"{', '.join(_FIELDS)} (Mooncake), or the heading {','.join(_COLUMNS)} (Azure)"
                )
        yield number, text, parse


def _named(bad: list[tuple[int, str]]) -> str:
    (number, what), *others = bad
    named = ", ".join(str(each) for each, _ in others[: _MOST_NAMED - 1])
    more = " and perhaps more" if len(others) >= _MOST_NAMED else ""
    also = f" (bad as well: line{'s' if len(others) > 1 else ''} {named}{more})" if others else ""
    return f"line {number}: {what}{also}"


def _mooncake(number: int, text: str) -> RecordedRequest:
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"not JSON, {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise SpecError(f"{shown_json(value)} is no JSON object")
    for key in _FIELDS:
        if key not in value:
            raise SpecError(f"{key} is missing")
    timestamp = value["timestamp"]
    is_number = isinstance(timestamp, int | float) and not isinstance(timestamp, bool)
    if not is_number or not 0 <= timestamp <= _MOST_MS:
        raise SpecError(
            f"timestamp is {shown_json(timestamp)}; it must be milliseconds, 0 to {_MOST_MS:,}"
        )
    prompt_len = RANGES["prompt_len"].take("input_length", value["input_length"])
    output_len = RANGES["output_len"].take("output_length", value["output_length"])
    hash_ids = _hash_ids(value.get("hash_ids", []), int(prompt_len))
    return RecordedRequest(number, timestamp / 1e3, int(prompt_len), int(output_len), hash_ids)


def _hash_ids(value: Any, prompt_len: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        isinstance(each, int) and not isinstance(each, bool) and 0 <= each < _MOST_HASH
        for each in value
    ):
        raise SpecError(
            f"hash_ids is {shown_json(value)}; it must be a list of whole numbers, 0 or more"
        )
    num_blocks = -(-prompt_len // HASH_BLOCK)
    if value and len(value) != num_blocks:
        raise SpecError(
            f"{len(value)} hash_ids for an input_length of {prompt_len}; it must be {num_blocks}, "
            f"one for each {HASH_BLOCK} tokens"
        )
    return tuple(value)


def _azure(places: list[int], number: int, text: str) -> RecordedRequest:
    cells = _cells(text)
    if len(cells) != len(_COLUMNS):
        raise SpecError(f"{len(cells)} cells; it must be {len(_COLUMNS)}")
    when, *lengths = (cells[place] for place in places)
    try:
        moment = datetime.fromisoformat(when)
    except ValueError:
        raise SpecError(
            f"TIMESTAMP is {shown(when)}; it must be a date and time, 2023-11-16 18:15:46.68"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    prompt_len, output_len = (
        _length(*each)
        for each in zip(_COLUMNS[1:], ("prompt_len", "output_len"), lengths, strict=True)
    )
    return RecordedRequest(number, moment.timestamp(), prompt_len, output_len)


def _length(column: str, field: str, cell: str) -> int:
    length = RANGES[field].parse(cell)
    if length is None:
        raise SpecError(f"{column} is {shown(cell)}; it must be {RANGES[field]}")
    return int(length)


def _cells(text: str) -> list[str]:
    """The cells of one line of CSV."""
    try:
        return [cell.strip() for cell in next(csv.reader([text]))]
    except csv.Error as error:
        raise SpecError(f"not CSV: {error}") from None
