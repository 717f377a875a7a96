"""What goes wrong for a client, in the shape that OpenAI's clients read: {"error": {message, type, param, code}}."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from shrew.errors import ShrewError, UsageError

# status -> (type, code); OpenAI's own words where it has them, because clients compare them.
KINDS = {
    400: ("invalid_request_error", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    411: ("invalid_request_error", "length_required"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    499: ("invalid_request_error", "client_closed_request"),  # never sent: it is what the counters call it
    500: ("server_error", "internal_error"),
    503: ("server_error", "service_unavailable"),
    504: ("timeout_error", "deadline_exceeded"),
}


class Fault(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        kind, usual = KINDS[status]
        self.kind, self.code, self.headers = kind, code or usual, dict(headers or {})

    def body(self) -> dict[str, Any]:
        # A client may have sent half a character in a name that is quoted here
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return reply(self.body(), self.status, self.headers)


def reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(content), status, dict(headers or {}), "application/json")


def busy(message: str, seconds: float) -> Fault:
    """429 that says when to come again."""
    return Fault(429, message, headers={"retry-after": str(max(1, round(seconds)))})


def fault_of(error: BaseException) -> Fault | None:
    """The answer to an error that was foreseen; None for one that is a bug of ours."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, HTTPException):  # the router's 404 and 405
        status = error.status_code if error.status_code in KINDS else 400
        return Fault(status, f"{HTTPStatus(status).phrase}; /openapi.json has what there is.", headers=error.headers)
    wait = getattr(error, "retry_after", None)
    if isinstance(error, ShrewError) and isinstance(wait, int | float):
        return busy(str(error), wait)
    if isinstance(error, UsageError):
        return Fault(400, str(error))
    if isinstance(error, TimeoutError):
        return Fault(504, "The answer took longer than this server allows; ask for less, or raise --timeout.")
    return None
