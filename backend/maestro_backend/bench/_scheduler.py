"""What a decision costs: `Scheduler.handle`, timed event by event under a standing queue.

Pure computation, one thread: no engine, no network, no recording, no invariants checked. Python's
garbage collector is off while events are timed, and what there is before is frozen. Beside the time
on the clock stands that of the processor: on a busy machine, the first holds others' time slices.
"""

from __future__ import annotations

import gc
import hashlib
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

from maestro_backend.scheduler import Command, Event, Scheduler, Settings
from maestro_backend.scheduler.policies import policy

from ._engines import say
from ._scheduler_load import FILL_S, WINDOW, Load, Size


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured: `events` events for each number of queued calls and of workers."""

    calls: tuple[int, ...] = (1_000, 10_000, 100_000)
    workers: tuple[int, ...] = (10, 100, 1_000)
    models: int = 50
    policy: str = "maestro"
    events: int = 100_000
    seed: int = 0


def bench_scheduler(grid: Grid) -> dict[str, Any]:
    """One object for each cell of the grid; the time of a decision in microseconds."""
    cells = []
    for workers in grid.workers:
        for calls in grid.calls:
            cell = _cell(grid, Size(calls, workers, grid.models))
            say(
                f"{calls:,} calls, {workers:,} workers: {cell['p50_us']} us, p99 {cell['p99_us']} "
                f"us (set up in {cell['setup_s']} s)"
            )
            cells.append(cell)
    return {
        "bench": "scheduler",
        "policy": grid.policy,
        "seed": grid.seed,
        "window": WINDOW,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "garbage_collector": "off while measured",
        "cells": cells,
        "growth": list(_growth(grid, cells)),
    }


def _cell(grid: Grid, size: Size) -> dict[str, Any]:
    """Fill the queues; let a tenth of the events pass; time the others."""
    core = Scheduler(policy(grid.policy), Settings(max_queued=2 * size.calls + WINDOW))
    watch = _Watch(core)
    load = Load(size, grid.seed, watch.tell)
    began = time.monotonic()
    with _no_garbage_collected():
        load.fill()
        while watch.events < grid.events // 10:
            load.step()
        gc.collect()
        gc.freeze()
        setup_s = time.monotonic() - began
        watch.start()
        queued, since = core.calls.waiting, load.now
        while watch.events < grid.events:
            load.step()
    return {
        "calls": size.calls,
        "workers": size.workers,
        "models": len(load.models),
        "queued": [queued, core.calls.waiting],
        "running": len(core.calls.by_id) - core.calls.waiting,
        "simulated_s": round(load.now - since, 3),
        "setup_s": round(setup_s, 1),
        "commands": watch.commands,
        "decisions_sha256": watch.digest.hexdigest(),
        **_spread([took for kind in watch.took.values() for took in kind]),
        "kinds": {kind: _spread(took) for kind, took in sorted(watch.took.items())},
    }


Took = tuple[int, int]
"""Nanoseconds of one event: on the clock, and of the processor."""


class _Watch:
    """Stands between load and scheduler, and times what is handled."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._handle = scheduler.handle
        self.start()

    def start(self) -> None:
        """Forget what was so far."""
        self.took: dict[str, list[Took]] = {}
        self.events = self.commands = 0
        self.digest = hashlib.sha256()
        """Of all commands: the same decisions have the same."""

    def tell(self, event: Event, now: float) -> list[Command]:
        used = time.thread_time_ns()
        began = time.perf_counter_ns()
        commands = self._handle(event, now)
        took = time.perf_counter_ns() - began
        used = time.thread_time_ns() - used
        if now < FILL_S:
            return commands
        self.took.setdefault(type(event).__name__, []).append((took, used))
        self.events += 1
        self.commands += len(commands)
        for command in commands:
            self.digest.update(repr(command).encode())
        return commands


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _spread(took: Sequence[Took]) -> dict[str, Any]:
    """Microseconds of so many events, and how many of them a second has."""
    ranked = sorted(wall for wall, _ in took)
    used = sorted(cpu for _, cpu in took)
    return {
        "events": len(ranked),
        "decisions_per_s": round(len(ranked) / sum(ranked) * 1e9),
        "p50_us": _rank(ranked, 0.5),
        "p99_us": _rank(ranked, 0.99),
        "max_us": _rank(ranked, 1.0),
        "cpu_p99_us": _rank(used, 0.99),
        "cpu_max_us": _rank(used, 1.0),
    }


def _rank(ranked: Sequence[int], share: float) -> float:
    return round(ranked[ceil(len(ranked) * share) - 1] / 1e3, 1)


def _growth(grid: Grid, cells: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """How many times as long a decision takes with the most queued calls as with the fewest."""
    least, most = min(grid.calls), max(grid.calls)
    found = {(cell["calls"], cell["workers"]): cell for cell in cells}
    for workers in grid.workers:
        few, many = found[least, workers], found[most, workers]
        ratios = {rank: round(many[f"{rank}_us"] / few[f"{rank}_us"], 2) for rank in ("p50", "p99")}
        yield {"workers": workers, "calls": [least, most], **ratios}


_COLUMNS = {
    "events": 10,
    "decisions_per_s": 17,
    "p50_us": 8,
    "p99_us": 10,
    "max_us": 10,
    "cpu_p99_us": 12,
    "cpu_max_us": 12,
}
"""What a row of the table shows, and how wide."""


def scheduler_table(result: Mapping[str, Any]) -> Iterator[str]:
    """The result for people, line by line."""
    yield f"{'calls':>8} {'workers':>8}  {'event':<16}" + "".join(
        f"{name:>{width}}" for name, width in _COLUMNS.items()
    )
    for cell in result["cells"]:
        start = f"{cell['calls']:>8,} {cell['workers']:>8,}"
        for kind, row in (("all", cell), *cell["kinds"].items()):
            yield f"{start}  {kind:<16}" + "".join(
                f"{row[name]:>{width},}" for name, width in _COLUMNS.items()
            )
            start = " " * len(start)
    for row in result["growth"]:
        few, many = row["calls"]
        yield (
            f"{row['workers']:,} workers, {few:,} -> {many:,} calls: "
            f"p50 x {row['p50']}, p99 x {row['p99']}"
        )
    yield (
        f"policy {result['policy']}, seed {result['seed']}, {result['implementation']} "
        f"{result['python']}, garbage collector {result['garbage_collector']}"
    )
