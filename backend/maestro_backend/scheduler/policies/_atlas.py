"""ATLAS: attained service on the longest completed path (Agentix, arXiv 2502.13965).

As PLAS, for programs with several threads: a call's attained service is the longest path of ended
calls that leads to it, that of its parents and their own service. Adapted: parents are the stages
that the call joins (`waits_for`); without any, the call of the run that ended last before it came.
Left out: as in PLAS.
"""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call
from maestro_backend.scheduler._runs import Run

from ._levels import Levels

_LAST = ""
"""In place of a stage: the call that ended last."""


class Atlas(Levels):
    """The call with the shortest completed path behind it goes first, by levels."""

    name = "atlas"

    def __init__(self, first_s: float = 1.0, levels: int = 16, beta: float = 10.0) -> None:
        super().__init__(first_s, levels, beta)
        self._ended: dict[str, dict[str, float]] = {}
        """Run -> stage -> the longest path up to the end of a call of it, in seconds."""
        self._before: dict[str, dict[str, float]] = {}
        """Run -> call without named parents -> the path that led to it."""

    def attained_s(self, call: Call, run: Run) -> float:
        if call.request.waits_for:
            ended = self._ended.get(run.run, {})
            return max((ended.get(stage, 0.0) for stage in call.request.waits_for), default=0.0)
        return self._before.get(run.run, {}).get(call.call, 0.0)

    def arrived(self, call: Call, run: Run, now: float) -> None:
        if (ended := self._ended.get(run.run)) and not call.request.waits_for:
            self._before.setdefault(run.run, {})[call.call] = ended[_LAST]

    def ended(self, call: Call, run: Run, now: float) -> None:
        path_s = self.attained_s(call, run) + now - call.started
        self._before.get(run.run, {}).pop(call.call, None)
        ended = self._ended.setdefault(run.run, {})
        stage = call.request.stage
        ended[stage] = max(path_s, ended.get(stage, 0.0))
        ended[_LAST] = path_s

    def run_over(self, run: Run, now: float) -> None:
        self._ended.pop(run.run, None)
        self._before.pop(run.run, None)
