"""Running a server: its socket, event loop and signals, and draining requests at its end."""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import msgspec
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from expertlane.errors import CapacityError, TerminatedError, UserError, no_room
from expertlane.server.app import make_app
from expertlane.server.errors import JSON, ApiError
from expertlane.server.journal.keeper import JournalKeeper
from expertlane.server.live import LiveFeed
from expertlane.server.live_state import LiveState
from expertlane.server.middleware import is_loopback
from expertlane.server.service import Service
from expertlane.server.setup import ServedModel, ServerOptions

HEAD_S = 30.0  # from the start of a connection, or of a request, to the end of the headers
MOST_HEAD_BYTES = 64 * 2**10
MOST_CONNECTIONS = 8192
_CHUNK_BYTES = 16  # per chunk of a body: its size and line ends
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # before an answer; clients ignore it
_COMMENT = b"3\r\n:\n\n\r\n"  # inside a stream of events, which are all that is sent in chunks
_LOOKS_S = (0.005, 0.05, 0.2, 1.0)  # before each check, then always the last one
_DROP_S, _MOST_DROPPED_BYTES = 1.0, 4 * 2**20  # of what a refused client still sends
_CLOSED = 7  # TCP_CLOSE of Linux


def most_connections() -> int:
    """The most connections at once; half of the descriptors are left for files and ranks."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft // 2)


class BoundedProtocol(HttpToolsProtocol):
    """An HTTP connection, with bounds on the time and size of a request's head."""

    _head_timer: asyncio.TimerHandle | None = None
    _look_timer: asyncio.TimerHandle | None = None
    _close_timer: asyncio.TimerHandle | None = None  # of a refusal that the client still reads
    _num_dropped_bytes = 0  # after a refusal
    _num_head_bytes = 0
    _message = 0  # counts headers and ends of messages; odd inside a body
    _num_body_bytes = 0  # bytes of its chunks so far, with their sizes and line ends
    _num_other_bytes = 0  # bytes of its chunk extensions and trailers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for headers, for a bounded time; refuse one connection too many."""
        super().connection_made(transport)
        self._begin_head()
        if len(self.connections) > most_connections():
            self._refuse(503, "too many connections are open; try again later")
            self.transport.close()  # waiting for its client would keep it open

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._end_head()
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._close_timer is not None:
            self._close_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse more of a request; refuse large trailers and chunk extensions."""
        if self._close_timer is not None:
            self._num_dropped_bytes += len(data)
            if self._num_dropped_bytes > _MOST_DROPPED_BYTES:
                self.transport.close()
            return
        message, num_before = self._message, self._num_body_bytes
        super().data_received(data)
        if message % 2 and message == self._message:  # all of it is of one body
            self._num_other_bytes += max(0, len(data) - self._num_body_bytes + num_before)
            if self._num_other_bytes > MOST_HEAD_BYTES:
                text = f"trailers and chunk extensions have more than {MOST_HEAD_BYTES:,} bytes"
                self._refuse(431, text)
                return
        if not self._awaits_head() or self._is_ending():
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
        """Take a part of a body."""
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
        if self._close_timer is not None:
            return None
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

    def _is_ending(self) -> bool:
        return self._close_timer is not None or self.transport.is_closing()

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
        elif not self._is_ending():
            self.transport.close()

    def _probe(self, number: int) -> None:
        """Send bytes without effect, and look soon after whether the connection was reset."""
        if self._is_ending() or self.cycle.response_complete:
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
        """Answer in place of the app, and close; a request under way on the connection ends.

        What the client still sends is dropped, within bounds: a connection that is closed with
        bytes unread is reset, and the client may never read the answer (RFC 9112, 9.6).
        """
        cycle = self.cycle
        is_free = cycle is None or cycle.response_complete or not cycle.response_started
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if is_free and not self._is_ending():
            body = msgspec.json.encode(ApiError(status, message, code="invalid_http").body)
            head = f"content-type: {JSON}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + b"\r\n" + body)
            self.transport.write_eof()
            self._close_timer = self.loop.call_later(_DROP_S, self.transport.close)
        elif self._close_timer is None:
            self.transport.close()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BACKLOG = 2048
_LEAST_DESCRIPTORS = 48
_POLL_S = 0.02
_SHELL_BASE = 128  # shells add it to a signal's number
_KEEP_ALIVE_S = 60  # clients keep connections for later, and some do not look before they use them
_LAST_WRITES_S = 5  # for what has been computed to reach clients


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet.

    Raises:
        UserError: there is no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host is {host!r}: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(f"cannot serve at {host}, port {port}: {error.strerror}") from None
    return bound


@dataclass
class Running:
    """A running server; lets its owner drain and end it.

    Attributes:
        loop: the event loop that it runs in.
        service: the service that it runs.
        live: the frames of its live page.
        num_signals: signals to end so far.
    """

    loop: asyncio.AbstractEventLoop
    service: Service
    live: LiveFeed
    server: "_Server"
    num_signals: int = field(default=0, init=False)
    _drained: asyncio.Task[None] | None = field(default=None, init=False)

    def end(self) -> None:
        """Take no new requests, and end when those that run have; a second call ends at once."""
        self.num_signals += 1
        if self.num_signals == 1:
            self.drain()
        else:
            self._end_now()

    def drain(self) -> None:
        """Take no new requests, and end when those that run have."""
        if self._drained is None:
            self.service.is_draining = True
            self._drained = self.loop.create_task(self._drain())

    def tell_to_drain(self) -> None:
        """Call `drain` in the server's loop, from any thread."""
        with suppress(RuntimeError):  # the loop is closed: it has ended
            self.loop.call_soon_threadsafe(self.drain)

    async def _drain(self) -> None:
        until = self.loop.time() + self.service.options.drain_s
        while self.service.num_open and self.loop.time() < until:
            await asyncio.sleep(_POLL_S)
        self._end_now()

    def _end_now(self) -> None:
        self.service.engine.stop_waiting()
        self.live.close()
        self.service.under_way.end(ApiError(503, "the server has ended", code="ended"))
        self.server.should_exit = True


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers of its own."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and call `on_start`."""
        await super().startup(sockets)
        self._on_start()


def serve(
    model: ServedModel,
    options: ServerOptions,
    bound: socket.socket,
    *,
    check_ranks: Callable[[], None] = lambda: None,
    on_start: Callable[[Running], None] = lambda running: None,
    takes_signals: bool = True,
) -> None:
    """Serve until a signal, or the owner, ends it.

    Args:
        bound: from `bind`; closed in the end.
        check_ranks: notices ranks that have ended while no step runs.
        on_start: called once requests are taken.
        takes_signals: SIGINT, SIGTERM and SIGHUP end it; in the main thread only.

    Raises:
        CapacityError: too few descriptors are left.
        RankError: a rank died, hung or failed.
        TerminatedError: a second signal ended it at once.
    """
    _check_descriptors()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        error = runner.run(_serve(model, options, bound, check_ranks, on_start, takes_signals))
    if error is not None:
        raise error


def _check_descriptors() -> None:
    """Check that enough file descriptors are left for the loop, its files and some connections.

    Raises:
        CapacityError: too few are.
    """
    held: list[int] = []
    try:
        held.extend(os.dup(2) for _ in range(_LEAST_DESCRIPTORS))
    except OSError as error:
        raise CapacityError(f"cannot serve: {no_room(error)}") from None
    finally:
        for descriptor in held:
            os.close(descriptor)


async def _serve(
    model: ServedModel,
    options: ServerOptions,
    bound: socket.socket,
    check_ranks: Callable[[], None],
    on_start: Callable[[Running], None],
    takes_signals: bool,
) -> Exception | None:
    """Serve in the running event loop; returns the error that ended the server, if one did."""
    loop = asyncio.get_running_loop()

    def on_end(error: Exception) -> None:
        live.close()
        running.server.should_exit = True

    service = Service(model, options, check_ranks=check_ranks, on_end=on_end)
    live = LiveFeed(LiveState(service))
    resuming: asyncio.Task[None] | None = None
    keeper: JournalKeeper | None = None
    if options.journal is not None:
        keeper = service.journal = JournalKeeper(service, options.journal)
        service.metrics.others.append(keeper.metrics)
        resuming = loop.create_task(keeper.resume())
    config = uvicorn.Config(
        make_app(service, live, keeper, is_local=is_loopback(str(bound.getsockname()[0]))),
        loop="none",
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # warnings are of bytes that anyone can send
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_LAST_WRITES_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    running = Running(loop, service, live, _Server(config, lambda: on_start(running)))
    last: list[signal.Signals] = []

    def take(number: signal.Signals) -> None:
        last.append(number)
        running.end()

    before = {number: signal.getsignal(number) for number in _SIGNALS if takes_signals}
    before = {number: each for number, each in before.items() if each is not signal.SIG_IGN}
    for number in before:
        loop.add_signal_handler(number, take, number)
    try:
        await running.server.serve(sockets=[bound])
    finally:
        if resuming is not None:
            resuming.cancel()
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    if keeper is not None and running.num_signals and service.engine.error is None:
        keeper.note_end()
    if (
        running.num_signals > 1
    ):  # the present step is not waited for: whoever has the ranks ends them
        service.engine.stop()
        return service.engine.error or _terminated(last)
    error = service.engine.error
    await service.engine.close()
    return error


def _terminated(signals: list[signal.Signals]) -> TerminatedError:
    number = signals[-1] if signals else signal.SIGTERM
    error = TerminatedError(f"ended by {number.name}")
    error.exit_code = _SHELL_BASE + number
    return error
