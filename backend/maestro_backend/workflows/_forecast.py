"""From where a run stands to its expected calls. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from maestro_agents.protocol import Stage, Workflow
from maestro_backend.scheduler import ForecastCall

from ._nouns import Expected, Habits, Past
from ._reach import FLOOR, Node, Reach, Reached, start_times

_COPIES = 16
"""Most calls of one stage in a forecast: a wider fan-out shows as so many (ours)."""

_MOST = 1000
"""So many calls ahead of their events are told apart at most (ours)."""
NOW = -1
"""The round of what runs already."""

Due = tuple[int, float]
"""A call: its round, and its probability."""

Predict = Callable[[Stage], ForecastCall | None]
"""A stage's expected call, with its probability once the stage runs, and start 0; None if none."""


def forecast(
    workflow: Workflow,
    starts: Iterable[Expected],
    habits: Habits,
    predict: Predict,
    past: Past | None = None,
    reached: Mapping[Node, Reached] | None = None,
) -> tuple[ForecastCall, ...]:
    """The expected calls from `starts` on, in order of earliest start.

    A stage appears once per round of a loop and instance of a fan-out. Reached over several
    paths it has the largest of their probabilities; a join that of its least likely source, and
    it starts after the slowest. Seconds count from the end of what runs now. Prompts grow from
    round to round as they did before. `reached`: from the same starts, if known already.
    """
    past = past or Past()
    reached = Reach(workflow, habits, past).of(starts) if reached is None else reached
    nodes: dict[str, list[tuple[int, Reached]]] = {stage: [] for stage in past.running}
    for (stage, round_), found in reached.items():
        nodes.setdefault(stage, []).append((round_, found))
    calls = {s: predict(workflow.stage_by_path[s]) for s in nodes if s in workflow.stage_by_path}
    service_s = {s: c.service_s for s, c in calls.items() if c}
    begins = start_times(workflow, reached, service_s, habits.gap_s)
    expected: list[ForecastCall] = []
    for stage, call in calls.items():
        if call is not None:
            chances = (1.0, *habits.calls.further((workflow.id, stage)))
            due = _running(*past.running.get(stage, (0, 0)), chances)
            due += _coming(nodes[stage], past.copies(stage), chances)[past.ahead(stage) :]
            expected += (
                replace(
                    call,
                    probability=chance * call.probability,
                    earliest_start_s=begins.get((stage, round_), 0.0),
                    prompt_tokens=call.prompt_tokens
                    + int(max(0, round_) * habits.growth_tokens(stage)),
                )
                for round_, chance in due[:_COPIES]
                if chance * call.probability >= FLOOR
            )
    return tuple(sorted(expected, key=lambda call: (call.earliest_start_s, call.stage)))


def _running(executions: int, made: int, chances: tuple[float, ...]) -> list[Due]:
    """What those that run have still to call; `chances` are those of a first, a second ... call."""
    silent = max(0, executions - made)
    due = [(NOW, chance) for chance in chances for _ in range(min(silent, _COPIES))]
    if executions > silent:
        each = made // executions
        due += [(NOW, chance / chances[each - 1]) for chance in chances[each:] if each]
    return due


def _coming(nodes: list[tuple[int, Reached]], copies: int, chances: tuple[float, ...]) -> list[Due]:
    """The calls of executions to come, the next ones first; `copies` of them are due for sure."""
    due: list[Due] = []
    for round_, node in nodes:
        many = min(copies, _MOST) if round_ == 0 else 1
        instances = (1.0,) * many if many > 1 else (1.0, *node.further)
        each = [n * p * node.chance for n in instances for p in chances]
        due += [(round_, chance) for chance in sorted(each, reverse=True)]
    return due
