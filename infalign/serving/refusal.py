"""An answer that is none: an HTTP status and OpenAI's error shape."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request is refused or has failed.

    Args:
        status: of HTTP.
        message: one line for the caller: what, the value got, what is allowed, what to do.
        param: the field at fault.
        code: a word for programs.
        headers: of HTTP, e.g. `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.status, self.headers = status, headers

    def response(self) -> Response:
        """The answer; in ASCII, because the name of a field may hold half a surrogate pair."""
        return Response(json.dumps({"error": self.error}), self.status, self.headers, "application/json")
