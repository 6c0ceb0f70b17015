"""Agents with the least expected remaining latency first (Kairos, arXiv 2508.06948).

An agent is a stage of a workflow. From every run that comes to its end it is learned how long the
run still took after each of its calls had come; calls go by the mean of that for their agent, then
by the start of their run. Adapted: the mean stands for the paper's distances between distributions
of remaining latency; the latest runs count more. Left out: packing by predicted memory.
"""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import Policy, milliseconds

Agent = tuple[str, str]
"""Workflow and stage."""

_LATEST = 0.05
"""The share of the newest observation in a mean of many (ours)."""


class Kairos(Policy):
    """The agent whose runs have ended soonest after its calls goes first; unknown ones before."""

    name = "kairos"
    rekey_s = 5.0

    def __init__(self) -> None:
        self._expected_s: dict[Agent, float] = {}
        self._seen: dict[Agent, int] = {}
        self._came: dict[str, list[tuple[Agent, float]]] = {}
        """Run -> the agents of its ended calls, and when those had come, people's time left out."""

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        return (self._remaining_s(call, run), run.started if run else call.arrived)

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        return milliseconds(self._remaining_s(call, run))

    def ended(self, call: Call, run: Run, now: float) -> None:
        self._came.setdefault(run.run, []).append((_agent(call, run), call.arrived - run.paused_s))

    def run_over(self, run: Run, now: float) -> None:
        calls = self._came.pop(run.run, ())
        for agent, came in calls if run.ended else ():
            self._learn(agent, now - run.paused_s - came)

    def _learn(self, agent: Agent, latency_s: float) -> None:
        seen = self._seen[agent] = self._seen.get(agent, 0) + 1
        mean = self._expected_s.get(agent, 0.0)
        self._expected_s[agent] = mean + max(_LATEST, 1 / seen) * (latency_s - mean)

    def _remaining_s(self, call: Call, run: Run | None) -> float:
        return self._expected_s.get(_agent(call, run), 0.0)


def _agent(call: Call, run: Run | None) -> Agent:
    return (run.workflow if run else "", call.request.stage)
