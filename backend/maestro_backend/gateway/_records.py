"""What happened to each call, for people: live lines, run views, metrics. Never prompt text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median
from typing import Any

from maestro_backend.workflows import Run

_MAX_CALLS = 20_000


class CallStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"


ENDED = (CallStatus.DONE, CallStatus.FAILED, CallStatus.CANCELLED, CallStatus.REJECTED)


@dataclass(slots=True)
class CallRecord:
    """One call. Times are seconds on the gateway's clock, counted from its start."""

    call: str
    run: str
    workflow: str
    stage: str
    instance: int
    role: str
    model: str
    arrived: float
    predicted_tokens: float
    lead_s: float | None = None
    status: CallStatus = CallStatus.QUEUED
    worker: str = ""
    dispatched: float | None = None
    first_token: float | None = None
    ended: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    attempts: int = 0
    error: str = ""

    def queued_s(self) -> float:
        return (self.dispatched if self.dispatched is not None else self.arrived) - self.arrived


class Records:
    """The live calls and the last 20,000 or so that ended, by id and by run."""

    def __init__(self) -> None:
        self.calls: OrderedDict[str, CallRecord] = OrderedDict()
        self._by_run: dict[str, list[str]] = {}

    def add(self, record: CallRecord) -> None:
        self.calls[record.call] = record
        if record.run:
            self._by_run.setdefault(record.run, []).append(record.call)
        if len(self.calls) > _MAX_CALLS:
            self._drop_oldest_ended()

    def _drop_oldest_ended(self) -> None:
        """A live call's record is never dropped: the shell still writes to it."""
        old = next((r for r in self.calls.values() if r.status in ENDED), None)
        if old is None:
            return
        del self.calls[old.call]
        if mine := self._by_run.get(old.run):
            mine.remove(old.call)
            if not mine:
                del self._by_run[old.run]

    def of_run(self, run: str) -> list[CallRecord]:
        return [self.calls[call] for call in self._by_run.get(run, ())]

    def live(self) -> Iterator[CallRecord]:
        return (r for r in self.calls.values() if r.status not in ENDED)


def run_view(run: Run, calls: list[CallRecord]) -> dict[str, Any]:
    """A run as `GET /v1/maestro/runs/{run}` shows it. Seconds; times on the gateway's clock."""
    ends = [c.ended for c in calls if c.ended is not None]
    return {
        "run": run.run,
        "workflow": run.workflow,
        "conversation": run.conversation,
        "slo": run.slo.model_dump(by_alias=True),
        "started": run.started,
        "ended": run.ended,
        "failed": run.failed,
        "calls": [asdict(call) for call in calls],
        "forecast": [asdict(call) for call in run.forecast],
        "rest": asdict(run.rest) if run.rest is not None else None,
        "announced_never_made": run.announced_never_made,
        "lead_time_s": lead_time_summary(run),
        "makespan_s": max(ends) - run.started if ends else None,
    }


def lead_time_summary(run: Run) -> dict[str, float | int | None]:
    """Over the calls that were foreseen, in seconds; `unforeseen` counts the others."""
    known = [lead for _, lead in run.lead_times_s if lead is not None]
    return {
        "median": median(known) if known else None,
        "min": min(known, default=None),
        "max": max(known, default=None),
        "foreseen": len(known),
        "unforeseen": len(run.lead_times_s) - len(known),
    }
