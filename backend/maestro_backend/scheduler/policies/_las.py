"""Least attained service, forgotten with a half-life: after llm-d's program-aware LAS.

Source: the router of llm-d (program-aware fairness, least attained service with a half-life).
Adapted: service is the time that the run's ended calls spent on workers, for theirs is a weighted
count of tokens; a program is a run. Left out: their weights for tenants.

All services decay by the same factor, so the order of two runs stays until one of them is served.
A run's service is therefore kept as what it would have been worth at time zero, as a logarithm.
"""

from __future__ import annotations

import math

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import Policy


class Las(Policy):
    """The run that has had the least service lately goes first."""

    name = "las"

    def __init__(self, half_life_s: float = 60.0) -> None:
        self._half_life_s = half_life_s
        self._attained: dict[str, float] = {}
        """Run -> log2 of its service, each second of it counted as 2^(when / half-life)."""

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        return (self._attained.get(call.request.run, -math.inf),)

    def ended(self, call: Call, run: Run, now: float) -> None:
        service_s = now - call.started
        if service_s > 0:
            new = math.log2(service_s) + now / self._half_life_s
            old = self._attained.get(run.run, -math.inf)
            high, low = max(old, new), min(old, new)
            self._attained[run.run] = high + math.log2(1 + 2 ** (low - high))

    def run_over(self, run: Run, now: float) -> None:
        self._attained.pop(run.run, None)
