"""Queues by attained service in powers of two, with promotion of who has waited too long.

What PLAS and ATLAS of Agentix (Autellix, arXiv 2502.13965) have in common.
"""

from __future__ import annotations

import math

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import Policy


class Levels(Policy):
    """Level 0 holds what has attained less than `first_s` seconds, each further level twice that.

    First come, first served inside. A call goes to level 0 once what its run has waited is at least
    `beta` times what it was served.
    """

    rekey_s = 1.0

    def __init__(self, first_s: float = 1.0, levels: int = 16, beta: float = 10.0) -> None:
        self._first_s = first_s
        self._levels = levels
        self._beta = beta

    def attained_s(self, call: Call, run: Run) -> float:
        """What counts as attained by the time of `call`, in seconds."""
        raise NotImplementedError

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        return (self._level(call, run, now), call.order)

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        return self._level(call, run, now)

    def _level(self, call: Call, run: Run | None, now: float) -> int:
        if run is None:
            return 0
        waited_s = run.waited_s + now - call.arrived
        if waited_s >= self._beta * max(run.attained_s, self._first_s):
            return 0
        attained = self.attained_s(call, run) / self._first_s
        return 0 if attained < 1 else min(int(math.log2(attained)) + 1, self._levels - 1)
