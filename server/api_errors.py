"""Every error a client can see, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import NoReturn

import msgspec
from flask import Response

from cupy_engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
)

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error. ``param`` names the request field at fault, ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, object]]:
        kind = _TYPES.get(self.status) or _TYPES[400 if self.status < 500 else 500]
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        response = Response(msgspec.json.encode(self.body()), self.status, mimetype="application/json")
        if self.retry_after_s is not None:
            response.headers["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response


def refuse(param: str, message: str) -> NoReturn:
    """Raises ApiError 400 that names ``param``."""
    raise ApiError(400, message, param=param, code="invalid_value")


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is left to answer."""


def to_api_error(error: Exception) -> ApiError:
    """What a client may know of an exception. Only errors raised on purpose keep their text."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return ApiError(400, str(error), param=error.param, code="invalid_value")
        case QueueFullError():
            return ApiError(429, str(error), code=error.reason, retry_after_s=error.retry_after_s)
        case DeadlineExceededError():
            return ApiError(504, str(error), code="deadline_exceeded")
        case EngineDeadError():
            return ApiError(503, str(error), code="engine_unavailable", retry_after_s=1)
        case EngineError():
            return ApiError(500, str(error), code="engine_error")
        case _:
            logger.exception("unexpected error", exc_info=error)
            return ApiError(500, "an unexpected error; the server's log has the details", code="internal_error")
