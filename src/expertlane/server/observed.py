"""Facts about requests and their answers, for logs and traces."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertlane.schedule.request import RequestOutput
from expertlane.spec.sampling import SamplingParams

_IN_SCOPE = "expertlane.generated"


@dataclass(frozen=True)
class Generated:
    """The outputs of a request for text.

    Attributes:
        request_id: the id that the client got.
        outputs, params: [num_prompts × num_choices].
    """

    request_id: str
    outputs: Sequence[RequestOutput]
    params: Sequence[SamplingParams]
    num_choices: int
    is_stream: bool


def note(scope: Scope, generated: Generated) -> None:
    """Attach the outputs of a request to its scope, where observers find them."""
    scope[_IN_SCOPE] = generated


@dataclass(frozen=True)
class Exchange:
    """A request, and its answer once that has ended.

    Attributes:
        path: path of the route; `none` where there is no such route.
        client: the address that it came from.
        status: 499 where the client went before there was an answer.
        headers: the request's; names in lower case.
        generated: its outputs; None where no text was asked for, or none was given.
    """

    method: str
    path: str
    client: str
    status: int
    seconds: float
    headers: dict[str, str] = field(repr=False)
    generated: Generated | None


Observer = Callable[[Exchange], None]
_CLIENT_GONE = 499


class Observed:
    """Tells observers of every request, once it has its answer."""

    def __init__(self, app: ASGIApp, observers: Sequence[Observer]) -> None:
        self._app, self._observers = app, observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and tell observers once its answer has ended."""
        if scope["type"] != "http" or not self._observers:
            await self._app(scope, receive, send)
            return
        status, began_s = _CLIENT_GONE, time.perf_counter()

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            exchange = Exchange(
                method=scope["method"],
                path=getattr(scope.get("route"), "path", "none"),
                client=(scope.get("client") or ("",))[0],
                status=status,
                seconds=time.perf_counter() - began_s,
                headers=_text_of(scope["headers"]),
                generated=scope.get(_IN_SCOPE),
            )
            for observe in self._observers:
                observe(exchange)


def _text_of(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
