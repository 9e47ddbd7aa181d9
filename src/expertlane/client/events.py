"""Answers as server-sent events: when tokens came, how many, and what went wrong.

Bodies are kept as they come and read when they are whole, with one search of each event; of JSON
only the usage and errors are parsed.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from expertlane.client.connection import Answer

_END = re.compile(rb"\r?\n\r?\n")
_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{')
_TEXT = re.compile(rb'"(?:text|content|reasoning_content|reasoning|arguments|name)"\s*:\s*"(?!")')
_ROLE = re.compile(rb'"role"\s*:\s*"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = re.compile(rb'^\s*\{\s*"error"\s*:|"object"\s*:\s*"error"')
_DONE = b"[DONE]"
_MOST_MESSAGE = 200


class AnswerError(Exception):
    """An answer that holds no whole generation.

    Args:
        name: kind of error, under which it is counted.
        message: the server's own message.
    """

    def __init__(self, name: str, message: str = "") -> None:
        super().__init__(message)
        self.name = name


@dataclass
class Generated:
    """Tokens of one request: when they came, and how many.

    Attributes:
        times_s: arrival of each event that brought a token or more.
        num_tokens, num_prompt_tokens: the server's counts; None where it gives none.
        num_cached_tokens: prompt tokens that the server did not compute.
    """

    times_s: list[float] = field(default_factory=list)
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None


def read_answer(answer: Answer) -> Generated:
    """Read a whole answer.

    Raises:
        AnswerError: the server refused, failed, or ended before its time.
    """
    if answer.status != 200:
        raise AnswerError(f"HTTP {answer.status}", error_message(bytes(answer.body)))
    if not answer.is_stream:
        raise AnswerError("no event stream", f"the answer is {answer.content_type or 'of no type'}")
    return _read_events(answer)


def _read_events(answer: Answer) -> Generated:
    found = Generated()
    body, ends = bytes(answer.body), answer.ends
    is_done, is_textless, part, begin = False, True, 0, 0
    without_text: list[int] = []  # places in `times_s`
    while (match := _END.search(body, begin)) is not None:
        event, end = body[begin : match.start()], match.end()
        begin = end
        if not event.startswith(b"data:"):
            continue  # a comment that keeps the connection open
        data = event[5:].lstrip()
        if data == _DONE:
            is_done = True
            break
        while ends[part] < end:
            part += 1
        if _ERROR.search(data):
            raise AnswerError("error in the stream", error_message(data))
        if _USAGE.search(data):
            _take_usage(found, data)
        if not _CHOICE.search(data):
            continue
        if not _TEXT.search(data):
            if _ROLE.search(data) and not found.times_s:
                continue  # the opening of a chat
            without_text.append(len(found.times_s))
        else:
            is_textless = False
        found.times_s.append(answer.times_s[part])
    if not is_done and body[begin:].strip() != b"data: " + _DONE:
        raise AnswerError("stream ended early", "the connection closed before [DONE]")
    _drop_ends(found, without_text, is_textless=is_textless)
    if not found.times_s:
        raise AnswerError("no tokens", "the stream brought none")
    return found


def _drop_ends(found: Generated, without_text: list[int], *, is_textless: bool) -> None:
    """Drop events at the end that carry the finish reason and no token."""
    if found.num_tokens is None and is_textless:
        return
    most = found.num_tokens or 0
    while (
        found.times_s
        and len(found.times_s) > most
        and without_text
        and without_text[-1] == len(found.times_s) - 1
    ):
        without_text.pop()
        found.times_s.pop()


def _take_usage(found: Generated, data: bytes) -> None:
    usage = _decoded(data).get("usage")
    if not isinstance(usage, dict):
        return
    found.num_tokens = _count(usage.get("completion_tokens"))
    found.num_prompt_tokens = _count(usage.get("prompt_tokens"))
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        found.num_cached_tokens = _count(details.get("cached_tokens"))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def error_message(body: bytes) -> str:
    """The error message in a body, in OpenAI's form or another; one line, cut."""
    found: Any = _decoded(body)
    if isinstance(found, dict):
        found = found.get("error", found)
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or ""
    text = found if isinstance(found, str) and found else body.decode("utf-8", "replace")
    text = " ".join(text.split())
    return text if len(text) <= _MOST_MESSAGE else f"{text[:_MOST_MESSAGE]}…"
