"""First come, first served: what an engine does by itself."""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call
from maestro_backend.scheduler._runs import Run


class Fcfs:
    """Order of arrival; all calls the same engine priority."""

    name = "fcfs"

    def key(self, call: Call, run: Run | None, now: float) -> tuple[float, ...]:
        return (call.order,)

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        return 0
