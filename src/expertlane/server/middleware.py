"""Middleware of every request: counting and observing, and checks of hosts and keys."""

import hmac
import time
from collections.abc import Callable, Collection, Sequence
from hashlib import sha256
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertlane.server.errors import ApiError
from expertlane.server.logs import GENERATED, Exchange, Observer

# For probes and Prometheus; they hold numbers only. The page at /live is the same for everybody: it
# asks for a key, which what it shows needs.
_OPEN = frozenset({"/", "/health", "/ping", "/metrics", "/version", "/load", "/live"})
_LOCAL_NAME, _ANY = "localhost", "*"
_PORTS = {"http": 80, "https": 443}
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_CLIENT_GONE = 499
DIRECT_SEND = "expertlane.send"  # in a scope: sends past middleware that only reads heads


class ExchangeObserver:
    """Counts every answer when it begins, and has it observed once it has ended.

    Args:
        count: called with the method, the route's path and the status.
        observe: called with every request and its answer; None for nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        count: Callable[[str, str, int], None],
        observe: Observer | None,
    ) -> None:
        self._app, self._count, self._observe = app, count, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and report its answer."""
        status, began_s = _CLIENT_GONE, time.perf_counter()

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._count(scope["method"], _route(scope), status)
            await send(message)

        scope[DIRECT_SEND] = send
        try:
            await self._app(scope, receive, noting_send)
        finally:
            exchange = Exchange(
                method=scope["method"],
                path=_route(scope),
                client=(scope.get("client") or ("",))[0],
                status=status,
                seconds=time.perf_counter() - began_s,
                client_request_id=dict(scope["headers"])
                .get(b"x-request-id", b"")
                .decode("latin-1"),
                generated=scope.get(GENERATED),
            )
            if self._observe is not None:
                self._observe(exchange)


def _route(scope: Scope) -> str:
    """The route's path, not one that clients make up."""
    return str(getattr(scope.get("route"), "path", "none"))


class Heads:
    """Answers HEAD as GET; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, HEAD as GET."""
        is_head = scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


class Hosts:
    """Middleware against requests that a web page of another site makes its visitor's browser send.

    A page can point its own name at this server's address (DNS rebinding), and then read answers:
    the `Host` header has that name. Or it can send without reading: then `Origin` names the page's
    site.

    Args:
        allowed: names by which clients reach the server, besides loopback ones; `*` for any.
        is_local: whether it listens on the loopback interface alone.
        has_keys: whether clients need a key, which no page has.
        computed: paths whose POST changes nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed: Sequence[str],
        is_local: bool,
        has_keys: bool,
        computed: Collection[str],
    ) -> None:
        self._app = app
        self._allowed = frozenset(map(host_name, allowed))
        self._takes_any = _ANY in allowed
        self._is_local, self._has_keys = is_local, has_keys
        self._computed = computed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if (why := self._refusal(scope)) is not None:
            answer = ApiError(403, why, code="host_not_allowed").response()
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        names = [name for name, _ in scope["headers"]]
        if names.count(b"host") > 1 or names.count(b"origin") > 1:
            return "Host or Origin is given twice; give one of each"
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host"), headers.get(b"origin")
        name = None if host is None else host_name(host)
        is_known = name in self._allowed or self._takes_any
        is_served = is_known or name is None or is_loopback(name)
        if self._is_local and not self._has_keys and not is_served:
            return (
                f"Host is {host}; without an API key this server answers only to loopback names "
                "and to each --allowed-host"
            )
        if scope["method"] in _READS or scope["path"] in self._computed:
            return None
        if not self._is_local and not self._has_keys and not is_known:
            return (
                "on a server that listens beyond the loopback interface, this needs an API key "
                f"(--api-key), or --allowed-host for the name in Host, which is {host or 'missing'}"
            )
        if origin is not None and not self._is_own(origin, host):
            return (
                f"Origin is {origin}, which is another site; valid: this server's own, or an "
                "--allowed-host"
            )
        return None

    def _is_own(self, origin: str, host: str | None) -> bool:
        try:
            parts = urlsplit(origin)
            own = urlsplit(f"//{host}")
            port = _PORTS.get(parts.scheme)
            is_same = (parts.hostname, parts.port or port) == (own.hostname, own.port or port)
        except ValueError:
            return False
        name = parts.hostname
        return name is not None and (is_same or name in self._allowed)


def host_name(host: str) -> str:
    """The name or address in a `Host` header, in lower case, without its port."""
    try:
        name = urlsplit(f"//{host.strip()}").hostname
    except ValueError:
        name = None
    return (name or "").removesuffix(".")


def is_loopback(name: str) -> bool:
    """True for `localhost` and loopback addresses, which need no name server."""
    if name == _LOCAL_NAME:
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


class ApiKeys:
    """Middleware that refuses requests without one of the keys.

    Args:
        keys: the valid keys; if there are none, requests need none.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["path"] in _OPEN or not self._digests or self._has_key(scope):
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
    """The scheme of a request's `Authorization` header, and the SHA-256 of its key."""
    given = dict(scope["headers"]).get(b"authorization", b"")
    kind, _, key = given.partition(b" ")
    return kind, sha256(key.strip()).digest()


async def client_left(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
