"""What every request passes before its route: counting, keys, and a bound on its body."""

import hmac
from collections.abc import Callable, Sequence
from hashlib import sha256

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertlane.server.errors import TOO_LARGE, ApiError

MOST_BODY_BYTES = 32 * 2**20
DIRECT_SEND = "expertlane.send"  # in a scope: past what only looks at an answer's beginning
# For probes and Prometheus; they hold numbers only.
_OPEN = frozenset({"/health", "/ping", "/metrics", "/version", "/load"})


class Counted:
    """Tells the status of every answer.

    Args:
        count: gets the method, the route's path and the status.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")  # no path that clients make up
                self._count(scope["method"], route, message["status"])
            await send(message)

        scope[DIRECT_SEND] = send
        await self._app(scope, receive, counting_send)


class ApiKeys:
    """Refuses requests without one of the keys.

    Args:
        keys: none: nobody is asked.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        is_open = scope["type"] != "http" or scope["path"] in _OPEN
        if is_open or not self._digests or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        text = "give a valid API key: Authorization: Bearer KEY"
        answer = ApiError(401, text, code="invalid_api_key").response()
        await answer(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        digest = sha256(key.strip()).digest()
        # All are compared, so that the time tells nothing.
        fits = [hmac.compare_digest(digest, each) for each in self._digests]
        return kind.lower() == b"bearer" and any(fits)


class BodyLimit:
    """Refuses bodies that are too large, before they are in memory."""

    def __init__(self, app: ASGIApp, most_bytes: int = MOST_BODY_BYTES) -> None:
        self._app = app
        self._most = most_bytes
        self._text = f"the body has more than {most_bytes:,} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told[:20]) > self._most:
            answer = ApiError(TOO_LARGE, self._text, code="body_too_large").response()
            answer.headers["Connection"] = "close"  # the rest is not read
            await answer(scope, receive, send)
            return
        num_bytes = 0

        async def counting_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._most:
                raise HTTPException(TOO_LARGE, self._text)
            return message

        await self._app(scope, counting_receive, send)
