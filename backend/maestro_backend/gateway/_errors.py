"""OpenAI-shaped errors, made at the edge only."""

from __future__ import annotations

import json
from dataclasses import dataclass

from maestro_agents.protocol import MaestroError
from maestro_backend.scheduler import Reject, RejectReason

_STATUS = {
    RejectReason.UNKNOWN_MODEL: (404, "invalid_request_error", "model_not_found"),
    RejectReason.MODEL_TOO_LARGE: (422, "invalid_request_error", "model_too_large"),
    RejectReason.MODEL_FAILED: (503, "server_error", "model_failed"),
    RejectReason.QUEUE_FULL: (429, "rate_limit_error", "queue_full"),
    RejectReason.NO_NODE: (503, "server_error", "no_node"),
    RejectReason.RETRIES_EXHAUSTED: (502, "server_error", "worker_failed"),
}


@dataclass(eq=False)  # not frozen: Python itself writes to a raised exception
class ApiError(MaestroError):
    """An answer other than success. `param` names the field at fault; times in seconds."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        return headers

    def sse(self) -> bytes:
        """As the last event of a stream that had begun."""
        return b"data: " + self.body() + b"\n\ndata: [DONE]\n\n"


def invalid(message: str, param: str | None = None) -> ApiError:
    """400 naming the field."""
    return ApiError(400, message, param=param)


def rejected(command: Reject) -> ApiError:
    """What the client sees of a rejected call."""
    status, kind, code = _STATUS[command.reason]
    return ApiError(status, command.detail, kind, code, retry_after_s=command.retry_after_s)
