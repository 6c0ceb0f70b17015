"""From where a run stands to its expected calls. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from maestro_agents.protocol import END, Stage, Workflow
from maestro_backend.scheduler import ForecastCall

from ._transitions import Transitions

_FLOOR = 0.05
"""Stages less likely than this are left out (ours)."""

Predict = Callable[[Stage], ForecastCall | None]
"""A stage's expected call, with probability 1 and start 0; None if it makes none."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A stage that may start next, with what is believed of it now."""

    stage: str
    probability: float


def next_stages(
    workflow: Workflow, stage: str, transitions: Transitions, chosen: Iterable[Expected] | None
) -> list[Expected]:
    """What follows `stage`: what routing chose if that is known, else the graph's belief."""
    if chosen is not None:
        return [e for e in chosen if e.stage != END]
    chances = transitions.probabilities(workflow, stage)
    return [Expected(s, p) for s, p in chances.items() if s != END]


def forecast(
    workflow: Workflow, starts: Iterable[Expected], transitions: Transitions, predict: Predict
) -> tuple[ForecastCall, ...]:
    """The expected calls from `starts` on, in order of earliest start.

    A stage appears once, at its first visit: a loop's further rounds are not foreseen. A stage
    reached over several paths has the largest of their probabilities; a join starts after its
    slowest source. Seconds count from the end of what runs now.
    """
    best: dict[str, tuple[float, float]] = {}
    agenda = [(-e.probability, 0.0, e.stage) for e in starts]
    heapq.heapify(agenda)
    while agenda:
        negative, at, stage = heapq.heappop(agenda)
        known = best.get(stage)
        if known is not None or -negative < _FLOOR or stage not in workflow.stage_by_path:
            if known is not None and workflow.join_sources(stage):
                best[stage] = (known[0], max(known[1], at))
            continue
        best[stage] = (-negative, at)
        call = predict(workflow.stage_by_path[stage])
        end = at + (call.service_s if call else 0.0)
        for following in next_stages(workflow, stage, transitions, None):
            heapq.heappush(agenda, (negative * following.probability, end, following.stage))
    return _calls(workflow, best, predict)


def _calls(
    workflow: Workflow, best: dict[str, tuple[float, float]], predict: Predict
) -> tuple[ForecastCall, ...]:
    calls = []
    for stage, (probability, at) in sorted(best.items(), key=lambda item: (item[1][1], item[0])):
        if call := predict(workflow.stage_by_path[stage]):
            calls.append(
                ForecastCall(
                    stage=call.stage,
                    role=call.role,
                    model=call.model,
                    probability=probability,
                    earliest_start_s=at,
                    prompt_tokens=call.prompt_tokens,
                    length=call.length,
                    service_s=call.service_s,
                )
            )
    return tuple(calls)
