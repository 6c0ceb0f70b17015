"""Earliest deadline first (Liu and Layland, 1973), by the deadline of the whole run.

Adapted: the deadline is the run's, not the call's, and it moves by the time that the run waits for
a person. Left out: admission control; what is late already still goes first.
"""

from __future__ import annotations

import math

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import MOST_PRIORITY, Policy


class Edf(Policy):
    """The run whose deadline is next goes first, runs without one last."""

    name = "edf"
    uses_deadlines = True

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        return (_deadline(run),)

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        deadline = _deadline(run)
        return int(min(MOST_PRIORITY, max(0.0, deadline)))  # seconds: they last for 68 years


def _deadline(run: Run | None) -> float:
    return math.inf if run is None or run.deadline is None else run.deadline
