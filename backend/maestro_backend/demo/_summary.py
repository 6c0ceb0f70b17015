"""What the demo shows at the end: the run's timeline as text, and lead time per stage."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from maestro_backend.gateway import CallRecord, CallStatus, lead_time_summary
from maestro_backend.workflows import Run

_WIDTH = 48


def timeline(calls: Sequence[CallRecord]) -> list[str]:
    """A bar per call over the run's time: `.` waiting, `#` in the engine."""
    zero = min(c.arrived for c in calls)
    end = max(c.ended or c.arrived for c in calls)
    scale = _WIDTH / max(end - zero, 1e-9)
    rows = [f"{'':<25} 0 s{'':<{_WIDTH - 11}}{end - zero:6.1f} s  tokens (predicted)"]
    for call in sorted(calls, key=lambda c: c.arrived):
        at = [
            int((t - zero) * scale)
            for t in (call.arrived, call.dispatched or call.arrived, call.ended or call.arrived)
        ]
        bar = " " * at[0] + "." * (at[1] - at[0]) + "#" * max(1, at[2] - at[1])
        tokens = f"{call.output_tokens} ({call.predicted_tokens:.0f})"
        rows.append(f"{call.stage}[{call.instance}]".ljust(25) + f" |{bar:<{_WIDTH}}| {tokens}")
    return rows


def lead_times(calls: Sequence[CallRecord]) -> list[str]:
    """Per stage: how long before its calls arrived it was known, median in seconds."""
    stages: dict[str, list[float | None]] = {}
    for call in calls:
        stages.setdefault(call.stage, []).append(call.lead_s)
    rows = []
    for stage, leads in stages.items():
        known = [lead for lead in leads if lead is not None]
        text = f"{median(known):6.2f} s" if known else "not announced"
        rows.append(f"{stage:<25} {text}  ({len(known)} of {len(leads)} calls)")
    return rows


def as_json(run: Run, calls: Sequence[CallRecord], answer: str, engine: str) -> dict[str, Any]:
    """The machine-readable result. Seconds and counts."""
    ends = [c.ended for c in calls if c.ended is not None]
    return {
        "calls": len(calls),
        "failed": sum(c.status is not CallStatus.DONE for c in calls),
        "lead_time_s": lead_time_summary(run),
        "announced_never_made": run.announced_never_made,
        "makespan_s": max(ends) - min(c.arrived for c in calls),
        "run": run.run,
        "workflow": run.workflow,
        "models": sorted({c.model for c in calls}),
        "output_tokens": sum(c.output_tokens for c in calls),
        "engine": engine,
        "answer": answer,
    }
