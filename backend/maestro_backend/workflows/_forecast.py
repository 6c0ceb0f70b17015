"""From where a run stands to its expected calls. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from maestro_agents.protocol import END, Announcement, Stage, Workflow
from maestro_backend.scheduler import ForecastCall

from ._transitions import Transitions

_FLOOR = 0.05
"""Stages less likely than this are left out (ours)."""

Predict = Callable[[Stage], ForecastCall | None]
"""A stage's expected call, with probability 1 and start 0; None if it makes none."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A stage that may start next, with what is believed of it now.

    A candidate is not `certain`, however likely; `after` is the stage whose end it waited for.
    """

    stage: str
    probability: float
    certain: bool = True
    after: str = ""


def next_stages(
    workflow: Workflow,
    stage: str,
    transitions: Transitions,
    announcement: Announcement | None = None,
) -> list[Expected]:
    """What follows `stage`: the graph's belief, narrowed by what its call announced."""
    chances = transitions.probabilities(workflow, stage)
    certain = {*workflow.successors(stage).certain}
    if announcement is not None and announcement.successors:
        chances = _narrowed(chances, announcement)
        certain |= {s.stage for s in announcement.successors if s.certain}
    return [Expected(s, p, s in certain, stage) for s, p in chances.items() if s != END]


def _narrowed(graph: dict[str, float], announcement: Announcement) -> dict[str, float]:
    """The announced successors: certain ones, then by stated, then by learned probability.

    Candidates of which nothing is known share what the others leave. An open-ended list says
    nothing of what is missing in it: there the graph stays believed and nothing is shared out.
    """
    successors = announcement.successors
    certain = dict.fromkeys((s.stage for s in successors if s.certain), 1.0)
    stated = {s.stage: s.probability for s in successors if s.probability is not None}
    chances = {s.stage: graph[s.stage] for s in successors if s.stage in graph} | stated
    rest = max(0.0, 1.0 - sum(p for stage, p in chances.items() if stage not in certain))
    chances |= certain
    if announcement.open_ended:
        return graph | chances
    unknown = {s.stage: 0.0 for s in successors if s.stage not in chances}
    return chances | dict.fromkeys(unknown, rest / max(1, len(unknown)))


def leads(workflow: Workflow, source: str, target: str, closed: Collection[str]) -> bool:
    """Whether a path goes from `source` to `target`, passing through no stage of `closed`."""
    seen, agenda = {source}, [source]
    while agenda:
        certain, candidates = workflow.successors(agenda.pop())
        following = {*certain, *candidates} - seen
        if target in following:
            return True
        seen |= following
        agenda.extend(stage for stage in following if stage not in closed)
    return False


def forecast(
    workflow: Workflow, starts: Iterable[Expected], transitions: Transitions, predict: Predict
) -> tuple[ForecastCall, ...]:
    """The expected calls from `starts` on, in order of earliest start.

    A stage appears once, at its first visit: a loop's further rounds are not foreseen. A stage
    reached over several paths has the largest of their probabilities; a join starts after its
    slowest source. Seconds count from the end of what runs now.
    """
    starts = list(starts)
    chances = _probabilities(workflow, starts, transitions)
    calls = {stage: predict(workflow.stage_by_path[stage]) for stage in chances}
    service = {stage: call.service_s if call else 0.0 for stage, call in calls.items()}
    begins = _start_times(workflow, [e.stage for e in starts], transitions, service)
    expected = [
        replace(call, probability=chances[stage], earliest_start_s=begins[stage])
        for stage, call in calls.items()
        if call is not None
    ]
    return tuple(sorted(expected, key=lambda call: (call.earliest_start_s, call.stage)))


def _probabilities(
    workflow: Workflow, starts: list[Expected], transitions: Transitions
) -> dict[str, float]:
    """The most likely path to each stage that can be reached with at least 5%."""
    best: dict[str, float] = {}
    agenda = [(-e.probability, e.stage) for e in starts]
    heapq.heapify(agenda)
    while agenda:
        negative, stage = heapq.heappop(agenda)
        if stage in best or -negative < _FLOOR or stage not in workflow.stage_by_path:
            continue
        best[stage] = -negative
        for following in next_stages(workflow, stage, transitions):
            heapq.heappush(agenda, (negative * following.probability, following.stage))
    return best


def _start_times(
    workflow: Workflow, starts: list[str], transitions: Transitions, service: dict[str, float]
) -> dict[str, float]:
    """When each stage of `service` could start: after its first cause, a join after its last."""
    open_sources = {s: {j for j in workflow.join_sources(s) if j in service} for s in service}
    begins: dict[str, float] = {}
    agenda = [(0.0, stage, "") for stage in starts]
    heapq.heapify(agenda)
    while agenda:
        at, stage, cause = heapq.heappop(agenda)
        if stage in begins or stage not in service:
            continue
        open_sources[stage].discard(cause)
        if open_sources[stage] and agenda:  # with nothing else left, a loop holds the join open
            continue
        begins[stage] = at
        for following in next_stages(workflow, stage, transitions):
            heapq.heappush(agenda, (at + service[stage], following.stage, stage))
    last = max(begins.values(), default=0.0)
    return {stage: begins.get(stage, last) for stage in service}
