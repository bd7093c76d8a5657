"""Failures as HTTP clients see them: OpenAI's error object, the status, and whether a retry makes sense."""

from __future__ import annotations

import math
from typing import Any

from aiohttp import web

from hexmesh.errors import (
    Busy,
    Closed,
    HexmeshError,
    Internal,
    InvalidInput,
    Lost,
    NoRoom,
    NotReady,
    TimedOut,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout",
    409: "conflict_error",
    429: "rate_limit_error",
    499: "request_cancelled",
    500: "server_error",
    502: "upstream_error",
    503: "service_unavailable",
    504: "timeout",
}
CANCELLED = "cancelled"
"""Code of the Closed error that a request ends with when it was cancelled through the API."""


class HttpFailure(HexmeshError):
    """A request refused by the HTTP surface itself; `param` names the field to change."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        next_step: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, next_step=next_step)
        self.status = status
        self.param = param
        self.headers = headers or {}


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> HttpFailure:
    """A 400 for one field of the request."""
    return HttpFailure(400, message, param=param, code=code)


def unsupported(param: str, why: str = "is not supported yet") -> HttpFailure:
    """A 400 for a parameter that would change the answer and that we cannot honour."""
    return HttpFailure(400, f"{param} {why}", param=param, code="unsupported_parameter")


def status_of(error: HexmeshError) -> int:
    if isinstance(error, HttpFailure):
        return error.status
    if isinstance(error, Closed) and error.code == CANCELLED:
        return 499
    return error.http_status


def error_object(error: HexmeshError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, with the next step and, if known, bytes."""
    status = status_of(error)
    inner: dict[str, Any] = {
        "message": error.message,
        "type": _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "param": error.param if isinstance(error, HttpFailure) else None,
        "code": error.code or None,
    }
    if error.next_step:
        inner["next_step"] = error.next_step
    if isinstance(error, NotReady | NoRoom) and error.needed_bytes is not None:
        inner |= {"needed_bytes": error.needed_bytes, "room_bytes": error.room_bytes}
    return {"error": inner}


def error_response(error: HexmeshError) -> web.Response:
    """The whole response to a request that failed before its first byte went out."""
    return web.json_response(error_object(error), status=status_of(error), headers=_headers(error))


def internal_error() -> Internal:
    """What a client learns about a bug of ours: that it is one. The log has the rest."""
    return Internal("internal error", code="internal_error", next_step="the peer's log has the details")


def from_http_exception(error: web.HTTPException, *, method: str, path: str) -> HttpFailure:
    """aiohttp's own refusals (no such route, body too large) in our shape; the Allow header survives."""
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    match error.status:
        case 404:
            return HttpFailure(404, f"no route {method} {path}", code="route_not_found")
        case 405:
            return HttpFailure(
                405, f"{path} does not take {method}", code="method_not_allowed", headers=headers
            )
        case 413:
            return HttpFailure(413, "the request body is too large", code="body_too_large")
        case _:
            return HttpFailure(error.status, error.reason, code="http_error", headers=headers)


def _headers(error: HexmeshError) -> dict[str, str]:
    headers = dict(error.headers) if isinstance(error, HttpFailure) else {}
    if isinstance(error, NotReady):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if _is_retry_pointless(error):
        headers["x-should-retry"] = "false"
    return headers


def _is_retry_pointless(error: HexmeshError) -> bool:
    """True where the SDKs' automatic retry, within seconds, cannot help or would double the load."""
    match error:
        case HttpFailure():
            return error.status not in (408, 409, 429)
        case Busy():
            return False
        case NotReady():
            return error.needed_bytes is not None
        case InvalidInput() | Internal() | Closed() | TimedOut():
            return True
        case Lost():
            return False
        case _:
            return status_of(error) < 500
