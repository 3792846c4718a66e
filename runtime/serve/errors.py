"""Errors as OpenAI's clients expect them. Knows nothing about requests or models.

{"error": {"message": "…", "type": "invalid_request_error", "param": "seed", "code": null}}
"""

import json
from typing import Any

from fastapi import HTTPException
from fastapi.responses import Response

from graphs.errors import MistralcError

RETRY_AFTER_S = (
    1  # a row is free after some tokens; a client that waits a second meets another queue
)

LONGEST_PARAM = 100  # characters; it may be a name that the client made up
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """A refusal or a failure with its HTTP status, and what the client is told."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, str(MistralcError(message)), _headers(status))  # one paragraph
        self.param, self.code = None if param is None else param[:LONGEST_PARAM], code

    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        return error_body(self.status_code, str(self.detail), self.param, self.code)

    def response(self) -> Response:
        """The whole response."""
        return JsonResponse(self.body(), self.status_code, dict(self.headers or {}))


class JsonResponse(Response):
    """JSON in ASCII: a message may quote half of a surrogate pair, which UTF-8 cannot hold."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object for an HTTP status."""
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _headers(status: int) -> dict[str, str] | None:
    if status in (429, 503):
        return {"Retry-After": str(RETRY_AFTER_S)}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return None
