"""Which request a client means, by its headers."""

import re
from dataclasses import dataclass

from starlette.types import Scope

from expertlane.server.errors import ApiError, bad_field
from expertlane.server.middleware import key_digest

ID_HEADER, LAST_HEADER = "X-Request-Id", "Last-Event-ID"
_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
_EVENT_ID = re.compile(rf"({_ID.pattern}):(\d{{1,9}})")


@dataclass(frozen=True)
class Asked:
    """Which request a client means.

    Attributes:
        key: SHA-256 of its API key; empty where none is asked for.
        request_id: None where it names none.
        after: events that it has; None where it does not say so.
    """

    key: bytes
    request_id: str | None
    after: int | None


def asked_of(scope: Scope, request_id: str | None = None, *, has_keys: bool) -> Asked:
    """What a request's headers say.

    Args:
        request_id: where it is known from the path.
        has_keys: whether clients are asked for keys; else all are the same one.

    Raises:
        ApiError: a header is not valid, or two contradict each other.
    """
    headers = {name: value.decode("latin-1").strip() for name, value in scope["headers"]}
    key = key_digest(scope)[1] if has_keys else b""
    if request_id is None and (given := headers.get(ID_HEADER.lower().encode())):
        if _ID.fullmatch(given) is None:
            text = f"{ID_HEADER} must have 1 to 128 letters, digits, or - . _ ~"
            raise bad_field(ID_HEADER, text)
        request_id = given
    last = headers.get(LAST_HEADER.lower().encode())
    if not last:
        return Asked(key, request_id, None)
    found = _EVENT_ID.fullmatch(last)
    if found is None or request_id not in (None, found[1]):
        wanted = "an event's id" if request_id is None else f"the id of an event of {request_id}"
        raise bad_field(LAST_HEADER, f"{LAST_HEADER} must be {wanted}, as ID:NUMBER")
    return Asked(key, found[1], int(found[2]))


def unknown(request_id: str, param: str) -> ApiError:
    """The error of a request that is not there, or is another key's."""
    return ApiError(
        404,
        f"{param}: there is no request {request_id}, or it is no longer kept",
        param=param,
        code="request_not_found",
    )
