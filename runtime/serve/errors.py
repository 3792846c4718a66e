"""Errors in the form that OpenAI's clients expect. Knows nothing about requests or models.

{"error": {"message": "…", "type": "invalid_request_error", "param": "seed", "code": null}}
"""

import json
from typing import Any

from fastapi import HTTPException
from fastapi.responses import Response

from graphs.errors import MistralcError

RETRY_AFTER_S = 1  # rows become free every few tokens, so the queue has moved on after a second
MAX_PARAM = 100  # characters; the client may have made the name up
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """An error with its HTTP status and the message for the client."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, str(MistralcError(message)), _headers(status))  # one paragraph
        self.param, self.code = None if param is None else param[:MAX_PARAM], code

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the response."""
        return error_body(self.status_code, str(self.detail), self.param, self.code)

    def response(self) -> Response:
        """Return the whole response."""
        return JsonResponse(self.body(), self.status_code, dict(self.headers or {}))


class JsonResponse(Response):
    """JSON in ASCII: a message may quote half of a surrogate pair, which is not valid UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error object for an HTTP status."""
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _headers(status: int) -> dict[str, str] | None:
    if status in (429, 503):
        return {"Retry-After": str(RETRY_AFTER_S)}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return None
