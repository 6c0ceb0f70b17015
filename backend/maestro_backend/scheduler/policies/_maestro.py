"""Workflow- and deadline-aware order: earliest deadline first among the runs that can make it.

T_rem = T_current + T_future (Maestro, arXiv 2606.12950), the seconds that a run still takes. A run
is given up where even an optimistic T_rem is too long for its deadline: the 1st percentile, taken
from the predicted median and 90th percentile as of a log-normal. Runs that are given up come after
all others, the shortest T_rem first. So the less is known, the more this is EDF, down to EDF with
late runs last. A run without a deadline is due some minutes and some multiple of its work after its
start, and never given up. All of this but T_rem is ours.

Bounded waiting (ours): a call older than `max_wait_s` goes before all younger ones, in order of
arrival.
"""

from __future__ import annotations

import math

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import Policy
from ._remaining import Remaining

_PATIENT_S = 600.0
_PATIENT_TIMES = 5.0
"""A run without a deadline is due so long after its start, and so many times its work: after those
that have one soon, the shortest first, but whoever waits comes nearer."""
_GIVEN_UP = 2**30
"""Engine priorities of runs that were given up are above this."""


class Maestro(Policy):
    """Earliest deadline first; those that can no longer make it last, shortest first."""

    name = "maestro"
    shares = True
    uses_deadlines = True

    def __init__(self, max_wait_s: float = 1800.0) -> None:
        self.max_wait_s = max_wait_s
        self._remaining = Remaining()

    def arrived(self, call: Call, run: Run, now: float) -> None:
        self._remaining.arrived(call, run, now)

    def ended(self, call: Call, run: Run, now: float) -> None:
        self._remaining.ended(run, now)

    def run_over(self, run: Run, now: float) -> None:
        self._remaining.over(run)

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        least_s, likely_s = self._remaining.of(call, run)
        if run is None or run.deadline is None:
            since = call.arrived if run is None else run.started + run.paused_s
            return (0.0, since + _PATIENT_S + _PATIENT_TIMES * likely_s)
        if run.deadline - least_s < now:
            return (1.0, likely_s)
        return (0.0, run.deadline, run.deadline - least_s)

    def turns_at(self, key: Key) -> float:
        """When a call of this key is given up, if its run has not come further by then."""
        return key[2] if len(key) > 2 else math.inf

    def may_preempt(self, key: Key, victim: Key) -> bool:
        """Only a run that can make it, from one that was given up."""
        return victim[0] > key[0]

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        if now - call.arrived >= self.max_wait_s:
            return 0
        given_up, seconds, *_ = self.key(call, run, now)
        urgency = int(min(max(0.0, seconds), _GIVEN_UP - 1))
        return urgency + _GIVEN_UP if given_up else urgency
