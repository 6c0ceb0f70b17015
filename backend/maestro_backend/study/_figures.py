"""From the outcome of a simulation to the figures of its cells. The only reader of `Outcome`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from statistics import fmean
from typing import Any

import numpy as np

from maestro_backend.evaluation import plain
from maestro_backend.simulator import CallSpan, MemorySample, Outcome

from ._plan import Cell, Job
from ._scene import Scene

QUANTILES = 201
"""Points of a latency's distribution that are kept for drawing."""


@dataclass(frozen=True, slots=True)
class RunRow:
    """One measured run of a cell; seconds on the simulation's clock, nan if it did not finish.

    `deadline` has in it what people took. `idle_s` is what the run takes alone.
    """

    slo: str
    source: str
    workflow_id: str
    arrival: float
    deadline: float
    finish: float
    idle_s: float

    @property
    def met(self) -> bool:
        return self.finish <= self.deadline

    @property
    def latency_s(self) -> float:
        """From its start to its last call's end, tools and people included; nan if unfinished."""
        return self.finish - self.arrival


@dataclass(frozen=True, slots=True)
class CellResult:
    """`figures` are what JSON holds of the cell; `latencies` its quantiles, inf if unfinished."""

    cell: Cell
    figures: dict[str, Any]
    rows: tuple[RunRow, ...]
    latencies: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class JobResult:
    """The cells of a job; `memory` and `spans` only where they are to be drawn."""

    cells: tuple[CellResult, ...]
    memory: tuple[MemorySample, ...] = ()
    spans: tuple[CallSpan, ...] = ()


def measure(job: Job, outcome: Outcome, scene: Scene) -> JobResult:
    """One result for each deadline that the job is judged by."""
    totals = _totals(outcome)
    cells = []
    for cell in job.cells:
        rows = run_rows(outcome, scene, cell.deadline)
        named = {"policy": cell.policy, "load": cell.load, "deadline": cell.deadline}
        figures = {**named, "seed": cell.seed, **run_figures(rows), **totals}
        cells.append(CellResult(cell, plain(figures), rows, _distribution(rows)))
    if job.trace_run is None:
        return JobResult(tuple(cells))
    return JobResult(tuple(cells), tuple(outcome.memory), tuple(outcome.spans))


def run_rows(outcome: Outcome, scene: Scene, deadline: str) -> tuple[RunRow, ...]:
    """The measured runs in order of arrival."""
    return tuple(
        RunRow(
            slo=ended.run.template.slo,
            source=ended.run.template.source,
            workflow_id=ended.run.template.name,
            arrival=ended.run.at,
            deadline=scene.due_at(ended.run, deadline),
            finish=ended.finish,
            idle_s=scene.idle_s(ended.run.template),
        )
        for ended in outcome.runs
    )


def run_figures(rows: Sequence[RunRow]) -> dict[str, Any]:
    """What the measured runs say.

    `goodput`: runs in time per second of the span over which measured runs arrived. `jain`: Jain's
    index over sources of their mean idle time / latency, 0 for a run that did not finish.
    """
    done = [row for row in rows if isfinite(row.finish)]
    span_s = max((row.arrival for row in rows), default=nan) - min(
        (row.arrival for row in rows), default=nan
    )
    met = sum(row.met for row in rows)
    return {
        "runs": len(rows),
        "unfinished": len(rows) - len(done),
        "slo_attainment": _share(row.met for row in rows),
        "slo_attainment_by_class": {
            slo: _share(row.met for row in rows if row.slo == slo)
            for slo in sorted({row.slo for row in rows})
        },
        "latency_s": _spread([row.latency_s for row in done]),
        "slowdown": _spread([row.latency_s / row.idle_s for row in done if row.idle_s > 0]),
        "goodput": met / span_s if span_s > 0 else nan,
        "jain": jain(_speed_by_source(rows)),
    }


def jain(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 where all are alike, 1/n where one has everything (Jain 1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else nan


def _speed_by_source(rows: Sequence[RunRow]) -> list[float]:
    by_source: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        speed = row.idle_s / row.latency_s if isfinite(row.finish) and row.latency_s > 0 else 0.0
        by_source[row.source].append(speed)
    return [fmean(speeds) for _, speeds in sorted(by_source.items())]


def _totals(outcome: Outcome) -> dict[str, Any]:
    """What is summed over the whole simulation, warm-up included."""
    seconds = outcome.simulated_s or nan
    return {
        "calls": outcome.calls_ended,
        "rejected": outcome.calls_rejected,
        "simulated_s": outcome.simulated_s,
        "throughput": {
            "calls_s": outcome.calls_ended / seconds,
            "output_tokens_s": outcome.output_tokens / seconds,
        },
        "cached_prompt_share": _ratio(outcome.cached_tokens, outcome.prompt_tokens),
        "kv_reserved_byte_s": outcome.kv_reserved_byte_s,
        "kv_used_byte_s": outcome.kv_used_byte_s,
        "stalls": outcome.stalls,
        "preemptions": outcome.preemptions,
        "recomputed_tokens": outcome.recomputed_tokens,
        "cold_starts": outcome.cold_starts,
        "activations": {
            str(tier): count for tier, count in sorted(outcome.activations.items()) if count
        },
        "activation_s": outcome.activation_s,
        "exposed_s": outcome.exposed_s,
        "switch_time_hidden": 1.0 - min(_ratio(outcome.exposed_s, outcome.activation_s), 1.0),
        "lead_time_s": _ratio(outcome.lead_s, outcome.lead_calls),
        "max_wait_s": outcome.max_wait_s,
        "queue_wait_s": _ratio(outcome.queue_wait_s, outcome.calls_ended),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return dict.fromkeys(("mean", "p50", "p95", "p99"), nan)
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"mean": fmean(values), "p50": p50, "p95": p95, "p99": p99}


def _distribution(rows: Sequence[RunRow]) -> tuple[float, ...]:
    """Of all measured runs at evenly spaced shares from 0 to 1."""
    found = sorted(row.latency_s if isfinite(row.finish) else inf for row in rows)
    if not found:
        return ()
    last = len(found) - 1
    return tuple(found[round(at * last / (QUANTILES - 1))] for at in range(QUANTILES))


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else nan
