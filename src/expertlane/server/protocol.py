"""HTTP on a connection: uvicorn's protocol with bounds, and for clients that half-close it.

A client that has sent its request may shut down its sending side and wait. To the kernel that looks
like a client that is gone, until something is sent: then the host of the one that is gone resets
the connection. So the server sends what changes nothing, and checks for a reset.
"""

import asyncio
import resource
import socket

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from expertlane.server.errors import JSON, ApiError

HEAD_S = 30.0  # from the start of a connection, or of a request, to the end of the headers
MOST_HEAD_BYTES = 64 * 2**10
MOST_CONNECTIONS = 8192
_CHUNK_BYTES = 16  # per chunk of a body: its size and line ends
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # before an answer; clients ignore it
_COMMENT = b"3\r\n:\n\n\r\n"  # inside a stream of events, which are all that is sent in chunks
_LOOKS_S = (0.005, 0.05, 0.2, 1.0)  # before each check, then always the last one
_CLOSED = 7  # TCP_CLOSE of Linux


def most_connections() -> int:
    """The most connections at once; half of the descriptors are left for files and ranks."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft // 2)


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _head_timer: asyncio.TimerHandle | None = None
    _look_timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _message = 0  # counts headers and ends of messages; odd inside a body
    _num_body_bytes = 0  # of its chunks so far, with their sizes and line ends
    _num_other_bytes = 0  # of the same body: chunk extensions and trailers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for headers, but not for ever."""
        super().connection_made(transport)
        self._begin_head()
        if len(self.connections) > most_connections():
            self._refuse(503, "too many connections are open; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._end_head()
        if self._look_timer is not None:
            self._look_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take more of a request."""
        message, num_before = self._message, self._num_body_bytes
        super().data_received(data)
        if message % 2 and message == self._message:  # all of it is of one body
            self._num_other_bytes += max(0, len(data) - self._num_body_bytes + num_before)
            if self._num_other_bytes > MOST_HEAD_BYTES:
                text = f"trailers and chunk extensions have more than {MOST_HEAD_BYTES:,} bytes"
                self._refuse(431, text)
                return
        if not self._awaits_head() or self.transport.is_closing():
            return
        self._num_head_bytes += len(data)
        if self._head_timer is None:
            self._begin_head()
        if self._num_head_bytes > MOST_HEAD_BYTES:
            self._refuse(431, f"the headers have more than {MOST_HEAD_BYTES:,} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers are dropped."""
        if not self._message % 2:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self._end_head()
        self._message += 1
        self._num_body_bytes = self._num_other_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take some of a body."""
        self._num_body_bytes += len(body) + _CHUNK_BYTES
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._message += 1
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(400, f"this is not HTTP/1.1: {msg}")

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client has ended its sending side; true where it may still read."""
        if self._awaits_head():
            if self._num_head_bytes:
                self._refuse(400, "the request ends inside its headers")
            return None
        if self.cycle.more_body and not self.cycle.response_started:
            self._refuse(400, "the body ends early: it is shorter than Content-Length says")
            return None
        if not hasattr(socket, "TCP_INFO") or self.scope["http_version"] != "1.1":
            return None
        self.cycle.keep_alive = False
        self._probe(0)
        return True

    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _begin_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._on_slow_head)

    def _end_head(self) -> None:
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_slow_head(self) -> None:
        if self._num_head_bytes:
            self._refuse(408, f"the headers are not complete after {HEAD_S:g} s")
        elif not self.transport.is_closing():
            self.transport.close()

    def _probe(self, number: int) -> None:
        """Send what changes nothing, and check soon after if the connection was reset."""
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if number % len(_LOOKS_S) == 0:
            self.transport.write(_COMMENT if self.cycle.response_started else _CONTINUE)
        after_s = _LOOKS_S[min(number, len(_LOOKS_S) - 1)]
        self._look_timer = self.loop.call_later(after_s, self._look, number + 1)

    def _look(self, number: int) -> None:
        if self._is_reset():
            self.transport.abort()
        else:
            self._probe(number)

    def _is_reset(self) -> bool:
        connection = self.transport.get_extra_info("socket")
        try:
            state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:
            return True
        return bool(state[0] == _CLOSED)

    def _refuse(self, status: int, message: str) -> None:
        """Answer in place of the app, and close; a request under way on the connection ends."""
        cycle = self.cycle
        is_free = cycle is None or cycle.response_complete or not cycle.response_started
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if is_free and not self.transport.is_closing():
            body = msgspec.json.encode(ApiError(status, message, code="invalid_http").body)
            head = f"content-type: {JSON}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + b"\r\n" + body)
        self.transport.close()
