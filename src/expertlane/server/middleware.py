"""What every request passes before its route: counting, keys, and a bound on its body."""

import asyncio
import hmac
from collections.abc import Callable, Sequence
from hashlib import sha256

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertlane.server.errors import TOO_LARGE, TOO_SLOW, ApiError

MOST_BODY_BYTES = 32 * 2**20
# For probes and Prometheus; they hold numbers only. The page at /live is the same for everybody: it
# asks for a key, which what it shows needs.
_OPEN = frozenset({"/", "/health", "/ping", "/metrics", "/version", "/load", "/live"})
BODY_S = 30.0  # for a body to come, and what it takes at the least rate besides
LEAST_BYTES_PER_S = 10_000
DIRECT_SEND = "expertlane.send"  # in a scope: past what only looks at an answer's beginning


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


class Heads:
    """Answers HEAD as GET; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


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
        kind, digest = key_digest(scope)
        # All are compared, so that the time tells nothing.
        fits = [hmac.compare_digest(digest, each) for each in self._digests]
        return kind.lower() == b"bearer" and any(fits)


def key_digest(scope: Scope) -> tuple[bytes, bytes]:
    """The kind of key that a request has, and the SHA-256 of the key."""
    given = dict(scope["headers"]).get(b"authorization", b"")
    kind, _, key = given.partition(b" ")
    return kind, sha256(key.strip()).digest()


class BodyLimit:
    """Refuses bodies that are too large, before they are in memory, or too slow."""

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
        num_bytes, is_complete = 0, False
        until_s = asyncio.get_running_loop().time() + BODY_S

        async def counting_receive() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(until_s + num_bytes / LEAST_BYTES_PER_S):
                    message = await receive()
            except TimeoutError:
                text = f"the body is too slow: {num_bytes:,} bytes, and more to come"
                raise HTTPException(TOO_SLOW, text) from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._most:
                raise HTTPException(TOO_LARGE, self._text)
            is_complete = not message.get("more_body", False)
            return message

        await self._app(scope, counting_receive, send)
