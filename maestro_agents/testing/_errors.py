"""Errors as an OpenAI-compatible server words them."""

from __future__ import annotations

import json


class ApiError(Exception):
    """An HTTP error with an OpenAI-shaped body; `param` names the field at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


class RefusedError(ApiError):
    """A refusal of the control API, whose errors are plain text."""

    def body(self) -> bytes:
        return json.dumps({"error": str(self)}).encode()
