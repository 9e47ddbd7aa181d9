"""HTTP/1.1 as a load generator needs it: little work for each part of a body, and when it came.

A library costs more than it saves here: of 32 streams, an event takes 10 us of CPU time to receive,
26 us with aiohttp and 120 us with httpx (1 December 2026, two busy cores of an Intel Xeon).
"""

import asyncio
import re
import ssl
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from expertlane.errors import UserError
from expertlane.version import __version__

MOST_ANSWER_BYTES = 2**28
_SSE = "text/event-stream"
_KEPT_S = 2.0  # idle; servers close theirs after 5 and more, and a request must not meet that


_END = re.compile(rb"\r?\n\r?\n")
_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{')
_TEXT = re.compile(rb'"(?:text|content|reasoning_content|reasoning|arguments|name)"\s*:\s*"(?!")')
_ROLE = re.compile(rb'"role"\s*:\s*"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = re.compile(rb'^\s*\{\s*"error"\s*:|"object"\s*:\s*"error"')
_DONE = b"[DONE]"
_DATA = re.compile(rb"^data:", re.MULTILINE)
_MOST_MESSAGE = 200


class ConnectionFailed(Exception):
    """There is no connection; the text says why."""


class ClosedEarly(Exception):
    """The server closed the connection before its answer was whole."""


@dataclass(frozen=True)
class Url:
    """A server's address.

    Attributes:
        path: prefix before `/v1`.
    """

    host: str
    port: int
    is_tls: bool
    path: str

    @classmethod
    def parse(cls, text: str, option: str = "--url") -> "Url":
        """Read `http://host:port`, with or without `/v1` behind it.

        Raises:
            UserError: it is none.
        """
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{option} is {text!r}; it must be like http://127.0.0.1:8000")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(f"{option} must be a server's address, without user, ? or #")
        if not text.isascii() or any(each.isspace() for each in text):
            raise UserError(f"{option} is {text!r}; it is not a valid URL")
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, path)

    @property
    def authority(self) -> str:
        """Host and port, as headers have them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"http{'s' * self.is_tls}://{self.authority}{self.path}"


@dataclass(eq=False)
class Answer:
    """The response to a request; times are of `time.perf_counter`.

    Attributes:
        body: the body so far.
        times_s, ends: arrival time of each part of the body, and its end offset there.
        most_bytes: the body's largest size; beyond it the connection is closed.
    """

    status: int = 0
    content_type: str = ""
    body: bytearray = field(default_factory=bytearray)
    times_s: "array[float]" = field(default_factory=lambda: array("d"))
    ends: "array[int]" = field(default_factory=lambda: array("q"))
    most_bytes: int = MOST_ANSWER_BYTES

    @property
    def is_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self.content_type.startswith(_SSE)


class _Connection(asyncio.Protocol):
    """One connection, which has one request at a time.

    Attributes:
        idle_since_s: when the last answer was whole.
    """

    def __init__(self) -> None:
        self.answer = Answer()
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._is_usable_again = False
        self._has_length = False
        self.idle_since_s = 0.0

    async def ask(self, head: bytes, body: bytes, answer: Answer) -> bool:
        """Send a request and fill the answer; gives whether another one may follow.

        Raises:
            ClosedEarly: the server closed the connection.
        """
        assert self._transport is not None
        self.answer = answer
        self._parser = httptools.HttpResponseParser(self)
        self._has_length = False
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(head + body)
        await self._waiter
        self.idle_since_s = time.perf_counter()
        return self._is_usable_again and self.is_open

    def close(self) -> None:
        """Close it, also in the middle of an answer."""
        if self._transport is not None:
            self._transport.abort()

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ClosedEarly(f"no HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self.answer.status and not self._has_length and error is None:
            self._finish()  # such an answer ends where the connection does
        self._fail(ClosedEarly("connection closed"))

    def _fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    # Called by the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.answer.content_type = value.decode("latin-1").lower()
        self._has_length |= name in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        answer = self.answer
        answer.times_s.append(time.perf_counter())
        answer.body += part
        answer.ends.append(len(answer.body))
        if len(answer.body) > answer.most_bytes:
            self._fail(ClosedEarly(f"an answer of more than {answer.most_bytes:,} bytes"))
            self.close()

    def on_message_complete(self) -> None:
        if 100 <= self.answer.status < 200:
            return
        self._is_usable_again = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connections:
    """Connections to one server, kept open between requests; of one event loop.

    Args:
        headers: headers of every request.
    """

    def __init__(self, url: Url, headers: Mapping[str, str]) -> None:
        self.url = url
        lines = {
            "Host": url.authority,
            "User-Agent": f"expertlane/{__version__}",
            "Content-Type": "application/json",
            **headers,
        }
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._tls = ssl.create_default_context() if url.is_tls else None
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def ask(
        self, method: str, path: str, body: bytes = b"", into: Answer | None = None
    ) -> Answer:
        """Send a request, and wait for all of the answer.

        Args:
            into: is filled while the answer comes.

        Raises:
            ConnectionFailed: the server cannot be reached.
            ClosedEarly: it closed the connection before the end.
        """
        answer = Answer() if into is None else into
        head = (
            f"{method} {self.url.path}{path} HTTP/1.1\r\n{self._headers}"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode("latin-1")
        connection = self._kept() or await self._connect()
        return await self._ask(connection, head, body, answer)

    def _kept(self) -> _Connection | None:
        """The connection used last; older ones may be closed by the server at any time."""
        while self._idle:
            kept = self._idle.pop()
            if kept.is_open and time.perf_counter() - kept.idle_since_s < _KEPT_S:
                return kept
            kept.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        url = self.url
        try:
            _, connection = await loop.create_connection(
                _Connection,
                url.host,
                url.port,
                ssl=self._tls,
                server_hostname=url.host if url.is_tls else None,
            )
        except ssl.SSLError as error:
            raise ConnectionFailed(f"TLS: {error.reason or error}") from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConnectionFailed(_plain(error, reason)) from None
        return connection

    async def _ask(
        self, connection: _Connection, head: bytes, body: bytes, answer: Answer
    ) -> Answer:
        self._busy.add(connection)
        is_usable = False
        try:
            is_usable = await connection.ask(head, body, answer)
        finally:
            self._busy.discard(connection)
            if is_usable:
                self._idle.append(connection)
            else:
                connection.close()
        return answer

    def close(self) -> None:
        """Close all connections."""
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._idle.clear()


def _plain(error: Exception, reason: str) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return reason[:1].lower() + reason[1:]


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
class TokenTimes:
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


def read_answer(answer: Answer) -> TokenTimes:
    """Read a whole answer.

    Raises:
        AnswerError: the server refused, failed, or ended before its time.
    """
    if answer.status != 200:
        raise AnswerError(f"HTTP {answer.status}", error_message(bytes(answer.body)))
    if not answer.is_stream:
        raise AnswerError("no event stream", f"the answer is {answer.content_type or 'of no type'}")
    return _read_events(answer)


def data_of(event: bytes) -> bytes | None:
    """Data of a server-sent event; None if it has none. Its id or type may come before."""
    line = _DATA.search(event)
    return None if line is None else event[line.end() :].strip()


def _read_events(answer: Answer) -> TokenTimes:
    found = TokenTimes()
    body, ends = bytes(answer.body), answer.ends
    is_done, is_textless, part, begin = False, True, 0, 0
    without_text: list[int] = []  # places in `times_s`
    while (match := _END.search(body, begin)) is not None:
        event, end = body[begin : match.start()], match.end()
        begin = end
        if (data := data_of(event)) is None:
            continue  # a comment that keeps the connection open
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
    if not is_done and not body[begin:].strip().endswith(b"data: " + _DONE):
        raise AnswerError("stream ended early", "the connection closed before [DONE]")
    _drop_ends(found, without_text, is_textless=is_textless)
    if not found.times_s:
        raise AnswerError("no tokens", "the stream brought none")
    return found


def _drop_ends(found: TokenTimes, without_text: list[int], *, is_textless: bool) -> None:
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


def _take_usage(found: TokenTimes, data: bytes) -> None:
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
