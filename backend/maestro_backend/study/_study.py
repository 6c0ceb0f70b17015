"""All cells of a plan, and what they say together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from maestro_backend.simulator import CallSpan, MemorySample, Outcome, SimCall, SimRun, simulate

from ._dump import dumping
from ._figures import JobResult, measure
from ._parallel import in_processes
from ._plan import Job, Plan
from ._progress import Progress
from ._scene import Scene
from ._summary import summary

Play = Callable[..., Outcome]
"""`simulate`, or what stands in for it."""
FORMAT = 1
"""Of the JSON: raised when a field changes its meaning or goes."""
_SHOWN_CALLS = 16
"""Of a run with about so many calls each one is drawn."""
_FIRST = 200
NOTES = (
    "latency_s: from a run's start to its last call's end, over finished measured runs, with tool "
    "time and human pauses; slowdown: latency over what the run takes alone, pauses included",
    "goodput: measured runs in time, per second of the span in which measured runs arrived",
    "throughput, KV byte seconds, stalls and other sums: of the whole simulation, warm-up included",
    "unfinished: measured runs that had not ended when every measured run could have had twice its "
    "deadline; they count as missed",
    "jain: Jain's index over sources of the mean of idle time over latency",
    "load 1.0: the runs/s at which fcfs on this node level is saturated (closed system, 64 runs in "
    "progress per device)",
    "intervals: 95 %, Student's t over seeds; differences are paired by seed",
)


@dataclass(slots=True)
class Drawn:
    """What plots need, by policy, of the highest load and the first deadline: the quantiles of
    latency of each seed, memory and one run of the first seed."""

    latencies: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    memory: dict[str, tuple[MemorySample, ...]] = field(default_factory=dict)
    spans: dict[str, tuple[CallSpan, ...]] = field(default_factory=dict)


def run_study(
    plan: Plan,
    scene: Scene,
    *,
    jobs: int,
    dump: Path | None = None,
    pictures: bool = False,
    step: Callable[[], None] = lambda: None,
    play: Play = simulate,
) -> tuple[dict[str, Any], Drawn]:
    """The results as JSON holds them: the same for any number of `jobs` at once.

    Raises:
        CellError: a simulation failed.
        ConfigError: the dump cannot be written.
    """
    drawn = Drawn()
    cells: list[dict[str, Any]] = []
    shown = _shown_run(plan, scene) if pictures else None
    work = list(plan.jobs(shown))
    with (
        dumping(dump) as rows,
        closing(in_processes(lambda job: run_job(job, plan, scene, play), work, jobs)) as results,
    ):
        for job, result in zip(work, results, strict=True):
            for found in result.cells:
                cells.append(found.figures)
                if rows is not None:
                    rows.add(found)
            if pictures:
                _keep(drawn, plan, job, result)
            step()
    return _document(plan, scene, cells), drawn


def run_job(job: Job, plan: Plan, scene: Scene, play: Play = simulate) -> JobResult:
    """One simulation, judged by each of its deadlines."""
    outcome = play(
        scene.cluster,
        job.system,
        runs_of(job, plan, scene),
        scene.foresight,
        horizon_s=_horizon_s(job, plan, scene),
        trace_run=job.trace_run,
    )
    return measure(job, outcome, scene)


def runs_of(job: Job, plan: Plan, scene: Scene) -> Iterator[SimRun]:
    """The same for every policy."""
    due = scene.due[job.deadlines[0]]
    for run in scene.draw(job.load * scene.saturation, plan.calls, job.seed):
        yield replace(run, deadline_s=due(run.template).deadline_s)


def _horizon_s(job: Job, plan: Plan, scene: Scene) -> float:
    """Twice over, all runs that are measured could have come to their deadlines, or taken what
    they take alone. It is the same for every policy."""
    latest = 0.0
    for run in _measured(scene.draw(job.load * scene.saturation, plan.calls, job.seed)):
        due = max(scene.due_at(run, deadline) for deadline in plan.deadlines)
        longest_s = max(due - run.at, scene.idle_s(run.template))
        latest = max(latest, run.at + 2 * longest_s)
    return latest


def _measured(runs: Iterable[SimRun]) -> Iterator[SimRun]:
    """Of runs that never end: those that are not measured come before and after."""
    begun = False
    for run in runs:
        if run.measured:
            begun = True
            yield run
        elif begun:
            return


def progress(plan: Plan) -> Progress:
    """On stderr, a step for each simulation."""
    return Progress(len(list(plan.jobs())), sys.stderr)


def _shown_run(plan: Plan, scene: Scene) -> str | None:
    """Of the first measured runs of a size that can be drawn, one on many models."""
    runs = scene.draw(max(plan.loads) * scene.saturation, plan.calls, 0)
    first = islice(_measured(runs), _FIRST)
    shown = min(first, key=lambda run: _fitness(run.template.calls), default=None)
    return None if shown is None else shown.run


def _fitness(calls: Sequence[SimCall]) -> tuple[bool, int, int]:
    """The least is the best to be drawn."""
    away = abs(len(calls) - _SHOWN_CALLS)
    return away > _SHOWN_CALLS // 2, -len({call.model for call in calls}), away


def _keep(drawn: Drawn, plan: Plan, job: Job, result: JobResult) -> None:
    first = result.cells[0]
    if first.cell.deadline == plan.deadlines[0] and job.load == max(plan.loads):
        drawn.latencies.setdefault(job.system.name, []).append(first.latencies)
        if job.trace_run is not None:
            drawn.memory[job.system.name] = result.memory
            drawn.spans[job.system.name] = result.spans


def _document(plan: Plan, scene: Scene, cells: list[dict[str, Any]]) -> dict[str, Any]:
    told: Mapping[str, Any] = scene.told
    return {
        "format": FORMAT,
        **told,
        "policies": {system.name: system.about for system in plan.systems},
        "loads": list(plan.loads),
        "deadlines": list(plan.deadlines),
        "seeds": plan.seeds,
        "calls": plan.calls,
        "saturation_runs_per_s": scene.saturation,
        "notes": list(NOTES),
        "summary": summary(cells, plan.systems),
        "cells": cells,
    }
