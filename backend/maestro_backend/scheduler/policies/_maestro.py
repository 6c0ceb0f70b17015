"""Workflow-aware order: the run with the least predicted work left goes first.

T_rem = T_current + T_future (Maestro, arXiv 2606.12950); T_future here is the longest likely path
of the forecast. Bounded waiting (ours): a call older than `max_wait_s` goes before all younger
ones, in order of arrival.
"""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call
from maestro_backend.scheduler._runs import Run

_MAX_PRIORITY = 2**31 - 1


class Maestro:
    """Shortest predicted remaining run first, with bounded waiting (seconds)."""

    name = "maestro"

    def __init__(self, max_wait_s: float = 60.0) -> None:
        self.max_wait_s = max_wait_s

    def key(self, call: Call, run: Run | None, now: float) -> tuple[float, ...]:
        if now - call.arrived >= self.max_wait_s:
            return (0.0, call.order, 0.0)
        return (1.0, _remaining_s(call, run), call.order)

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        if now - call.arrived >= self.max_wait_s:
            return 0
        return min(int(_remaining_s(call, run) * 1000), _MAX_PRIORITY)


def _remaining_s(call: Call, run: Run | None) -> float:
    return call.request.service_s + (run.future_s() if run else 0.0)
