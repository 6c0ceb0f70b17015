"""Workflow-aware order: the run with the least predicted work left goes first.

T_rem = T_current + T_future (Maestro, arXiv 2606.12950); T_future here is the longest likely path
of the forecast. Bounded waiting (ours): a call older than `max_wait_s` goes before all younger
ones, in order of arrival.
"""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import Policy, milliseconds


class Maestro(Policy):
    """Shortest predicted remaining run first, with bounded waiting (seconds)."""

    name = "maestro"

    def __init__(self, max_wait_s: float = 60.0) -> None:
        self.max_wait_s = max_wait_s

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        return (remaining_s(call, run),)

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        if now - call.arrived >= self.max_wait_s:
            return 0
        return milliseconds(remaining_s(call, run))


def remaining_s(call: Call, run: Run | None) -> float:
    """Predicted seconds to the run's end, from the start of `call`."""
    return call.request.service_s + (run.future_s if run else 0.0)
