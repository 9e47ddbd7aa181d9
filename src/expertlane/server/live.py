"""`/live`: one page, and the stream of frames that it draws."""

import asyncio
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.resources import files
from typing import Any

import msgspec
from fastapi import FastAPI, Response
from starlette.types import Receive, Scope, Send

from expertlane.report.charts.colours import OF_CAUSE, OF_GAP, style_sheet
from expertlane.server.errors import ApiError
from expertlane.server.live_state import LiveState
from expertlane.server.metrics import WAITING
from expertlane.server.middleware import client_left
from expertlane.spec.names import Cause, Gap, Stage

MOST_VIEWERS = 32
_FRAME_S = 1.0
_RECENT_EVENTS = 20
_REPEATED = 5  # frames that bring a new placement, as some may be lost
_STUCK_S = 30.0  # a viewer that takes nothing for so long is let go
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
# The colours of lanes by stage, as in reports; what these add up is separate here.
COLOURS = {
    Stage.EMBED.label: "--overhead-1",
    Stage.ATTENTION.label: OF_CAUSE[Cause.ATTENTION],
    Stage.ROUTER.label: OF_CAUSE[Cause.ROUTER],
    Stage.DISPATCH.label: OF_CAUSE[Cause.DISPATCH_COMBINE],
    Stage.EXPERTS.label: OF_CAUSE[Cause.EXPERTS],
    Stage.COMBINE.label: "--communication-2",
    Stage.COLLECTIVES.label: OF_CAUSE[Cause.TP_COLLECTIVES],
    Stage.HAND_OVER.label: OF_CAUSE[Cause.HAND_OVER],
    Stage.HEAD.label: OF_CAUSE[Cause.HEAD],
    WAITING: OF_CAUSE[Cause.WAITING],
    Stage.IDLE.label: OF_GAP[Gap.IDLE],
}


class LiveFeed:
    """The source of frames, one a second for all viewers; used in one event loop.

    Attributes:
        num_viewers: pages that are open.
        num_layouts: layouts that there have been.
        state: the data of the frames.
    """

    def __init__(self, state: LiveState) -> None:
        self.state = state
        self.num_viewers = 0
        self.is_closed = False
        self._number, self._latest = 0, b""
        self._shown: Sequence[Any] | None = None  # the placements that viewers have
        watch = state.service.model.watch
        self._members = None if watch is None else watch.members  # the ranks that viewers know
        self.num_layouts = 0
        self._changed_at = -_REPEATED  # the frame that brought them
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] = self._loop.create_future()
        self._timer = self._loop.call_later(_FRAME_S, self._tick)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_FRAME_S, self._tick)
        self._look()

    def _look(self) -> None:
        self.state.look()
        if self.num_viewers:
            self._make_frame()

    def _make_frame(self) -> None:
        frame = self.state.frame()
        frame["events"] = list(self.state.events)[-_RECENT_EVENTS:]
        watch = self.state.service.model.watch
        if watch is not None:
            if watch.members != self._members:
                self._members, self._shown = watch.members, None
                self.num_layouts += 1  # viewers begin again
            placements = watch.placements
            is_new = self._shown is not None and any(
                a is not b for a, b in zip(placements, self._shown, strict=True)
            )
            if is_new:
                self._changed_at = self._number
            if is_new or self._number - self._changed_at < _REPEATED:
                frame["placements"] = self.state.placements(placements)
            self._shown = placements
        self._latest = _event(frame)
        self._number += 1
        news, self._news = self._news, self._loop.create_future()
        news.set_result(None)

    def start(self) -> tuple[int, bytes]:
        """The first event for a new viewer, and the number of the latest frame, which it covers."""
        self.state.look()
        return self._number, _event(self.state.start())

    async def next(self, number: int) -> tuple[int, bytes]:
        """Wait for a frame after `number`; returns the latest frame's number and the frame.

        Frames in between are lost, so that a slow viewer costs no memory.
        """
        while self._number <= number and not self.is_closed:
            await asyncio.shield(self._news)
        return self._number, self._latest

    def close(self) -> None:
        """Give all viewers a last frame; no further ones follow."""
        if self.is_closed:
            return
        self._timer.cancel()
        self.is_closed = True
        self.state.look()
        self._make_frame()


class LiveAnswer(Response):
    """The frames as server-sent events."""

    def __init__(self, feed: LiveFeed) -> None:
        super().__init__()
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send frames until either side ends."""
        feed = self._feed
        if feed.num_viewers >= MOST_VIEWERS or feed.is_closed:
            text = f"{feed.num_viewers} pages are open, of at most {MOST_VIEWERS}; close one"
            error = ApiError(503, text, code="too_many_viewers", retry_after_s=10)
            await error.response()(scope, receive, send)
            return
        feed.num_viewers += 1
        stream = asyncio.create_task(self._stream(send))
        gone = asyncio.create_task(client_left(receive))
        try:
            await asyncio.wait({stream, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            feed.num_viewers -= 1
            for task in (stream, gone):
                task.cancel()
            with suppress(asyncio.CancelledError, TimeoutError, OSError):
                await stream

    async def _stream(self, send: Send) -> None:
        feed = self._feed
        await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        number, start = feed.start()
        num_layouts = feed.num_layouts
        await _send_part(send, start)
        while not feed.is_closed:
            number, frame = await feed.next(number)
            if feed.num_layouts != num_layouts:
                number, start = feed.start()
                num_layouts = feed.num_layouts
                await _send_part(send, start)
            await _send_part(send, frame)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_part(send: Send, body: bytes) -> None:
    async with asyncio.timeout(_STUCK_S):
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(body: object) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(body)


def add_live(app: FastAPI, feed: LiveFeed) -> None:
    """Add the page and its stream."""
    page, policy = live_page()
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/live", include_in_schema=False)
    async def live() -> Response:
        """A page that shows what the server does."""
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/live/feed", include_in_schema=False)
    async def live_feed() -> Response:
        """The frames that the page draws, as server-sent events."""
        return LiveAnswer(feed)


def live_page() -> tuple[bytes, str]:
    """The page, the same for everybody, and its content security policy."""
    style = style_sheet() + _stage_colours() + _asset("report", "page.css")
    style += _asset("server", "live.css")
    script = _asset("server", "live.js")
    page = _asset("server", "live.html")
    page = page.replace("/*style*/", style).replace("/*script*/", script)
    policy = {
        "default-src": "'none'",
        "script-src": f"'sha256-{_digest(script)}'",
        "style-src": f"'sha256-{_digest(style)}'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page.encode(), "; ".join(f"{name} {value}" for name, value in policy.items())


def _stage_colours() -> str:
    """CSS variables with the colour of each stage: `--stage-experts` and so on."""
    rules = "".join(f"--stage-{_slug(name)}:var({colour});" for name, colour in COLOURS.items())
    return f":root{{{rules}}}\n"


def _slug(label: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in label.lower())


def _asset(package: str, name: str) -> str:
    return files(f"expertlane.{package}").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()
