"""Answers that are no answer: an HTTP status and OpenAI's error shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """The body.

        >>> Refusal(400, "no", param="n").content()["error"]["type"]
        'invalid_request_error'
        """
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
