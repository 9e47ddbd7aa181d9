"""Errors as the OpenAI API has them: a status, and a JSON object that names the field."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from expertlane.errors import UserError
from expertlane.printable import printable

JSON = "application/json"
LATER = ("ended", "engine_dead")  # codes of errors that a journal outlives
TOO_SLOW, TOO_LARGE, BUSY = 408, 413, 503
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    TOO_SLOW: "body_too_slow",
    TOO_LARGE: "body_too_large",
    BUSY: "busy",
}
_PYDANTIC = re.compile(r"^\w+ should(?= )")  # Input, String, List…
NO_JSON = "invalid_json"
_MOST = 500  # characters of a message

Model = TypeVar("Model", bound=BaseModel)


class ErrorFacts(BaseModel):
    """The message of an error, its type, the field that is wrong, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorFacts


class ApiError(Exception):
    """An error that the client gets in place of an answer.

    Args:
        message: one line, which says what would be valid.
        param: path of the wrong field, such as `messages[0].content`.
        code: name of the error, for programs.
        retry_after_s: seconds after which another attempt makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        message = printable(str(self))
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": message if len(message) <= _MOST else f"{message[:_MOST]}…",
                "type": "rate_limit_error" if self.status == 429 else kind,
                "param": None if self.param is None else printable(self.param)[:_MOST],
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The HTTP response of the error."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body, self.status, headers)


def json_response(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A value as JSON; NaN and infinity are null."""
    return Response(msgspec.json.encode(body), status, headers, media_type=JSON)


def bad_field(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """The error of a field with a wrong value."""
    return ApiError(400, message, param=param, code=code)


def install_handlers(app: FastAPI) -> None:
    """Give every error of an app, also of its framework, the form of `ApiError`."""

    async def of_api(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        text = f"{request.method} {request.url.path}: {error.detail}"
        answer = ApiError(status, text, code=_CODES.get(status)).response()
        answer.headers.update(error.headers or {})
        if status in (TOO_SLOW, TOO_LARGE, BUSY):
            answer.headers["Connection"] = "close"  # the rest is not read
        return answer

    async def of_mistake(request: Request, error: Exception) -> Response:
        return bad_field(None, str(error)).response()

    async def of_bug(request: Request, error: Exception) -> Response:
        answer = ApiError(500, "internal error", code="internal_error").response()
        answer.headers["Connection"] = "close"  # as the server does after this
        return answer

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(UserError, of_mistake)
    app.add_exception_handler(Exception, of_bug)


def validated(model: type[Model], value: object) -> Model:
    """A value as a model.

    Raises:
        ApiError: it is not valid.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False)) from None


def _refusal(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The most specific of pydantic's errors: of a field's alternatives, the one that fits best."""
    error = max(errors, key=lambda each: len(each["loc"]))
    kind = error["type"]
    param = _param(error["loc"], is_unknown=kind == "extra_forbidden")
    if param is None:
        return no_object()
    if kind == "extra_forbidden":
        return bad_field(param, f"unknown field {param}", "unknown_parameter")
    if kind == "missing":
        return bad_field(param, f"{param} is missing", "missing_required_parameter")
    message = _PYDANTIC.sub("it must", error["msg"].removeprefix("Value error, "))
    return bad_field(param, f"{param}: {message}")


def no_object(hint: str = "") -> ApiError:
    """The error of a body that is no JSON object."""
    return ApiError(400, f"the body must be a JSON object{hint}", code=NO_JSON)


def _param(location: Sequence[str | int], *, is_unknown: bool) -> str | None:
    """A field's path, without the names that pydantic gives the alternatives of a type."""
    path = ""
    for i, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif (is_unknown and i == len(location) - 1) or _is_field(part):
            path += f".{part}" if path else part
    return path or None


def _is_field(part: str) -> bool:
    is_type = part in ("str", "int", "bool", "float") or "[" in part or "-" in part
    return part.islower() and not is_type
