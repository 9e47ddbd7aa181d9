"""Bodies of requests: their bounds, and parsing large ones beside the event loop."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertlane.server.errors import (
    BUSY,
    JSON,
    NO_JSON,
    TOO_LARGE,
    TOO_SLOW,
    ApiError,
    no_object,
    validated,
)

MOST_BODY_BYTES = 16 * 2**20
MOST_BYTES_AT_ONCE = 256 * 2**20  # in bodies of all unanswered requests together
MOST_VALUES = 2**19  # in a body: strings, numbers, lists, objects
MOST_KEYS = 2**16  # in all objects of a body
BODY_S = 30.0  # for a body to arrive, beside the time that it takes at the least rate
LEAST_BYTES_PER_S = 10_000
_SMALL_BYTES = 16 * 2**10  # becomes objects in less than a millisecond
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a character, as an escape
_AHEAD = b" " * 6  # msgspec looks so far for the other half before it says what is wrong
_LARGE_BYTES = 256 * 2**10  # the standard library's parser would hold the interpreter for too long


class JsonCounts:
    """Counts the values and keys of a JSON text as it arrives, without making objects of them.

    Attributes:
        num_values, num_keys: counts so far; never fewer than a parser finds.
    """

    def __init__(self) -> None:
        self.num_values, self.num_keys = 1, 0
        self._is_in_string = False
        self._rest = b""  # half of an escape

    def feed(self, data: bytes) -> None:
        """Count the next bytes."""
        data = self._rest + data
        num_backslashes = len(data) - len(data.rstrip(b"\\"))
        end = len(data) - num_backslashes % 2
        data, self._rest = data[:end], data[end:]
        parts = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._is_in_string :: 2])
        self._is_in_string ^= len(parts) % 2 == 0
        self.num_values += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        self.num_keys += outside.count(b":")


class BodyLimit:
    """Middleware that refuses bodies too large or too slow, before they are wholly in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._num_bytes = 0  # held by the bodies of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse its body."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > MOST_BODY_BYTES:
            answer = ApiError(TOO_LARGE, _TOO_MANY_BYTES, code="body_too_large").response()
            answer.headers["Connection"] = "close"  # the rest is not read
            await answer(scope, receive, send)
            return
        body = _BoundedBody(receive, self._hold)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._num_bytes -= body.num_bytes

    def _hold(self, num_bytes: int) -> None:
        """Reserve memory for more bytes.

        Raises:
            HTTPException: the bodies of all requests take too much.
        """
        self._num_bytes += num_bytes
        if self._num_bytes > MOST_BYTES_AT_ONCE:
            text = (
                f"bodies of requests under way may have {MOST_BYTES_AT_ONCE:,} bytes together; try "
                "again later"
            )
            raise HTTPException(BUSY, text, {"Retry-After": "1"})


_TOO_MANY_BYTES = f"the body has more than {MOST_BODY_BYTES:,} bytes"


class _BoundedBody:
    """The body of one request, counted as it arrives.

    Attributes:
        num_bytes: bytes received so far.
    """

    def __init__(self, receive: Receive, hold: Callable[[int], None]) -> None:
        self.num_bytes = 0
        self._receive, self._hold = receive, hold
        self._counts = JsonCounts()
        self._is_complete = False
        self._until_s = asyncio.get_running_loop().time() + BODY_S

    async def receive(self) -> Message:
        """The next message.

        Raises:
            HTTPException: the body is too large or too slow.
        """
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until_s + self.num_bytes / LEAST_BYTES_PER_S):
                message = await self._receive()
        except TimeoutError:
            text = (
                f"the body is too slow: {self.num_bytes:,} bytes so far; it may take {BODY_S:g} s, "
                f"and 1 s more for every {LEAST_BYTES_PER_S:,} bytes"
            )
            raise HTTPException(TOO_SLOW, text) from None
        self._take(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return message

    def _take(self, data: bytes) -> None:
        self.num_bytes += len(data)
        self._hold(len(data))
        if self.num_bytes > MOST_BODY_BYTES:
            raise HTTPException(TOO_LARGE, _TOO_MANY_BYTES)
        counts = self._counts
        counts.feed(data)
        for number, most, name in (
            (counts.num_values, MOST_VALUES, "values"),
            (counts.num_keys, MOST_KEYS, "keys"),
        ):
            if number > most:
                raise HTTPException(TOO_LARGE, f"the body has more than {most:,} {name}")


def make_bodies_models(app: FastAPI) -> None:
    """Read the bodies of all routes that are added from now on by `BodyRoute`."""
    app.state.one_body = asyncio.Semaphore(1)
    app.router.route_class = BodyRoute


class BodyRoute(APIRoute):
    """A route whose body is parsed and validated in another thread if it is large."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler; it validates the body before the framework would."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model: Any = self.body_field.field_info.annotation

        async def handle_model(request: Request) -> Response:
            body = await _read(request)
            kind = request.headers.get("content-type", "").lower()
            if "json" not in kind:
                raise no_object(f", with Content-Type: {JSON}")
            if not body:
                raise no_object()
            if len(body) <= _SMALL_BYTES:
                made = _made(model, body)
            else:
                async with request.app.state.one_body:  # one at a time: each takes memory
                    made = await asyncio.to_thread(_made, model, body)
            return await handle(_ModelRequest(request, made))

        return handle_model


async def _read(request: Request) -> bytearray:
    """A whole body; it is in memory once, since no list of pieces is joined.

    Raises:
        HTTPException: the client has closed the connection.
    """
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
    except ClientDisconnect:
        raise HTTPException(400, "the client has gone") from None
    return body


class _ModelRequest(Request):
    """A request whose body has been validated: it is a model."""

    def __init__(self, request: Request, made: BaseModel) -> None:
        super().__init__(request.scope, request.receive, request._send)
        self._body = b"{}"  # for the framework, which asks for its value
        self._made = made

    async def json(self) -> BaseModel:
        """The model."""
        return self._made


def _parsed(body: bytes | bytearray) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is none, or a text in it is no Unicode.
        RecursionError: it is nested too deeply.
    """
    if len(body) > _LARGE_BYTES:
        return msgspec.json.decode(body)
    if _SURROGATE.search(body) is None:
        return json.loads(body.decode("utf-8-sig"))
    try:  # json would take half of a pair
        return msgspec.json.decode(bytes(body) + _AHEAD)
    except msgspec.DecodeError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


def _made(model: type[BaseModel], body: bytearray) -> BaseModel:
    """The model that a body describes.

    Raises:
        ApiError: it is not JSON, or not valid.
    """
    try:
        value = _parsed(body)
    except (ValueError, RecursionError) as error:  # both libraries raise kinds of ValueError
        text = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {text}", code=NO_JSON) from None
    return validated(model, value)
