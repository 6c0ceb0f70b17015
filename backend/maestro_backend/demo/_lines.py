"""One line per thing that happens, as it happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from maestro_backend.gateway import CallRecord, CallStatus
from maestro_backend.scheduler import WorkerState

CALL_HEADER = "  time  stage                     model          what"


@dataclass(slots=True)
class Lines:
    """Turns changes of the gateway's feed into lines; `zero` is the time of the first, seconds."""

    zero: float
    _last: dict[str, str] = field(default_factory=dict)

    def worker(self, change: dict[str, Any], now: float) -> str | None:
        """None if it says what the line before it said of this model."""
        state = WorkerState(change["state"])
        text = "ready" if state is WorkerState.READY else change["detail"] or state.value
        model = change["model"]
        if self._last.get(model) == text:
            return None
        self._last[model] = text
        return f"{now - self.zero:5.1f}s  {model:<14} {text}"

    def call(self, change: dict[str, Any], now: float) -> str | None:
        """None for changes that are not worth a line."""
        record = CallRecord(**{k: v for k, v in change.items() if k != "type"})
        what = _what(record)
        if what is None:
            return None
        stage = f"{record.stage or '(no stage)'}[{record.instance}]"
        return f"{now - self.zero:5.1f}s  {stage:<25} {record.model:<14} {what}"


def _what(record: CallRecord) -> str | None:
    match record.status:
        case CallStatus.QUEUED:
            known = (
                "not announced" if record.lead_s is None else f"announced {record.lead_s:.2f} s ago"
            )
            again = f", again after: {record.error}" if record.error else ""
            return f"queued, {known}, ~{record.predicted_tokens:.0f} tokens predicted{again}"
        case CallStatus.RUNNING if record.first_token is not None:
            waited = record.first_token - (record.dispatched or record.arrived)
            return f"first token after {waited:.2f} s"
        case CallStatus.RUNNING:
            return f"to {record.worker}, waited {record.queued_s():.2f} s"
        case CallStatus.DONE:
            took = (record.ended or 0.0) - record.arrived
            return f"done: {record.output_tokens} tokens in {took:.2f} s"
        case _:
            return f"{record.status.value}{': ' * bool(record.error)}{record.error}"
