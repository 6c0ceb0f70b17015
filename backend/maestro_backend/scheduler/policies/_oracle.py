"""What one could do who knew the future: a bound for comparisons, no rival (ours).

The truth comes as data: the simulator tells true lengths with the calls and true forecasts. Least
slack first among the runs that can still make their deadline, then the others by the shortest
remaining time, among them those that have none. Left out: looking ahead over several models, so it
is no optimum.
"""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import Policy


class Oracle(Policy):
    """Least slack first, where there is any; then the shortest remaining run."""

    name = "oracle"
    uses_deadlines = True
    rekey_s = 1.0

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        remaining = call.request.service_s + (run.future_s if run else 0.0)
        latest = None if run is None or run.deadline is None else run.deadline - remaining
        return (1, remaining) if latest is None or latest < now else (0, latest)

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        return int(self.key(call, run, now)[0])
