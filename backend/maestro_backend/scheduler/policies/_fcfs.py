"""First come, first served: what an engine does by itself."""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import Policy


class Fcfs(Policy):
    """Order of arrival; all calls the same engine priority."""

    name = "fcfs"
    follows_runs = False

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        return (call.order,)
