"""HTTP/1.1 as a load generator needs it: little work for each part of a body, and when it came."""

import asyncio
import ssl
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from expertlane.errors import UserError
from expertlane.version import __version__

MOST_ANSWER_BYTES = 2**28
_SSE = "text/event-stream"
_KEPT_S = 2.0  # idle; servers close theirs after 5 and more, and a request must not meet that


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
    """

    status: int = 0
    content_type: str = ""
    body: bytearray = field(default_factory=bytearray)
    times_s: "array[float]" = field(default_factory=lambda: array("d"))
    ends: "array[int]" = field(default_factory=lambda: array("q"))

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
        self._transport = cast(asyncio.Transport, transport)
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
        if len(answer.body) > MOST_ANSWER_BYTES:
            self._fail(ClosedEarly(f"an answer of more than {MOST_ANSWER_BYTES:,} bytes"))
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
