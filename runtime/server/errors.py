"""Every error of the server as one of OpenAI's error objects: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.scheduling import DeadlineExceeded, QueueFull

INVALID = "invalid_request_error"
SERVER = "server_error"
CLIENT_GONE = 499  # for logs only, as in nginx: nobody receives the response

# What values of a wrong type should be, by pydantic's names of the errors.
_EXPECTED = {
    "model_type": "expected an object",
    "dict_type": "expected an object",
    "list_type": "expected a list",
    "string_type": "expected a string",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
}

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An error that a client gets, with its HTTP status. `param` is the field of the body that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error object in JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")

    def response(self) -> Response:
        """The HTTP response."""
        return Response(self.body(), self.status, self.headers, "application/json")


class ClientGone(Exception):
    """The client closed its connection: nobody waits for the answer."""


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """Return the error of a request that cannot be answered as it is."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def of_failure(error: BaseException) -> ApiError:
    """Return what a client is told when its resolved request failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        if error.retry_after_s is None:  # trying again would not help
            return invalid(_told(error), "n", "too_many_answers")
        headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
        return ApiError(HTTPStatus.TOO_MANY_REQUESTS, _told(error), type="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, DeadlineExceeded):
        # Not 504: the server is well, and a proxy must not take it for broken because of a client's own `timeout`.
        return ApiError(
            HTTPStatus.REQUEST_TIMEOUT, _told(error), param="timeout", type="timeout_error", code="deadline_exceeded"
        )
    if isinstance(error, EngineError) and error.stage == "engine":  # it is closed
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, _told(error), type=SERVER, code="engine_unavailable")
    _log.error("A request failed.", exc_info=error)
    message = _told(error) if isinstance(error, EngineError) else "The engine failed while it computed the answer."
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, type=SERVER, code="engine_error")


def _told(error: EngineError) -> str:
    """Return the sentence of an error without the part of the program that found it."""
    sentence = str(error).removeprefix(f"{error.stage}: ")
    return sentence[:1].upper() + sentence[1:]


def of_request(error: EngineError, param: str, subject: str) -> ApiError:
    """Return what a client is told whose request the engine refused; `param` is the field of the body, `subject` says more."""
    facts = [f"found {error.found}" if error.found else "", f"expected {error.expected}" if error.expected else ""]
    details = ", ".join(fact for fact in facts if fact)
    reason = ": ".join(part for part in (subject, details) if part)
    remedy = f"; {error.remedy}" if error.remedy else ""
    return invalid(f"Invalid value for '{param}': {reason}{remedy}.", param)


def of_validation(error: ValidationError) -> ApiError:
    """Return what a client is told whose body does not fit its schema; the first field that does not is named."""
    details = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in details["loc"]) or None
    return invalid(*_sentence(details, param))


def _sentence(details: ErrorDetails, param: str | None) -> tuple[str, str | None, str]:
    kind, message = details["type"], details["msg"].rstrip(".")
    param = details.get("ctx", {}).get("param") or param  # of several fields that do not go together
    if kind == "missing":
        return f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
    if kind == "extra_forbidden":
        return f"Unknown parameter: '{param}'.", param, "unknown_parameter"
    if kind == "unsupported_parameter":
        return f"'{param}' is not supported: {message}.", param, kind
    if kind == "conflict":  # of several fields
        return f"{message}.", param, "invalid_value"
    message = _EXPECTED.get(kind) or message.replace("Input should be", "expected", 1)
    message = message[:1].lower() + message[1:]
    if kind == "wrong_type":
        return f"Invalid type for '{param}': {message}.", param, "invalid_type"
    if kind in _EXPECTED:
        return f"Invalid type for '{param}': {message}, found {kind_of(details['input'])}.", param, "invalid_type"
    return f"Invalid value for '{param}': {message}.", param, "invalid_value"


def kind_of(value: object) -> str:
    """Name the JSON type of a value."""
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "a boolean"), ((int, float), "a number"), (str, "a string"), (list, "a list"), (dict, "an object"),
    )  # fmt: skip
    return next((name for types, name in kinds if isinstance(value, types)), "null")


def install_handlers(app: FastAPI) -> None:
    """Let the application answer every exception with an error object."""

    async def api_error(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path[:200]}"
        if error.status_code == HTTPStatus.NOT_FOUND:
            return ApiError(404, f"Unknown request URL: {where}.", code="unknown_url").response()
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"Not allowed: {where}. See /openapi.json for the methods of each path."
            return ApiError(405, message, code="method_not_allowed", headers=error.headers).response()
        return ApiError(error.status_code, f"{error.detail}.", headers=error.headers).response()

    async def client_gone(request: HttpRequest, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def engine_error(request: HttpRequest, error: Exception) -> Response:
        return of_failure(error).response()

    async def unexpected(request: HttpRequest, error: Exception) -> Response:  # Starlette raises it again, for the log
        return ApiError(500, "The server failed to handle the request.", type=SERVER, code="internal_error").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGone, client_gone)
    app.add_exception_handler(EngineError, engine_error)
    app.add_exception_handler(Exception, unexpected)
