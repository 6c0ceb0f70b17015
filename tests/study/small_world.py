"""A scene by hand, and a simulator that gives known outcomes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import nan
from typing import Any

from maestro_backend.scheduler import Residency
from maestro_backend.simulator import (
    SYSTEMS,
    CallSpan,
    Cluster,
    MemorySample,
    Outcome,
    RunOutcome,
    SimCall,
    SimRun,
    System,
    Template,
)
from maestro_backend.study import Plan, Scene
from maestro_backend.workloads import Due

IDLE_S = {"quick": 10.0, "slow": 40.0}
FACTORS = {"proportional:2": 2.0, "proportional:4": 4.0}
CALLS = (SimCall("a", "m", 100, 10), SimCall("b", "m", 100, 10, after=(0,)))


def template(source: str, slo: str) -> Template:
    return Template(source, f"{source}-0", CALLS, "app", slo)


TEMPLATES = (template("quick", "interactive"), template("slow", "batch"))


def draw(rate: float, calls: int, seed: int) -> Iterator[SimRun]:
    """One run each 1 / rate seconds; the first and the last are not measured."""
    many = calls // 2
    for number in range(many):
        yield SimRun(
            f"r{number}",
            number / rate,
            TEMPLATES[(number + seed) % 2],
            measured=0 < number < many - 1,
        )


def due(factor: float, pauses_s: float = 0.0) -> Any:
    return lambda t: Due(factor * IDLE_S[t.source], pauses_s)


def scene(**changes: Any) -> Scene:
    made = Scene(
        cluster=Cluster("made-up", (), {}),
        foresight={},
        draw=draw,
        due={kind: due(factor) for kind, factor in FACTORS.items()},
        idle_s=lambda t: IDLE_S[t.source],
        saturation=0.5,
        told={"cluster": "made-up"},
    )
    return replace(made, **changes)


def plan(*policies: str, **changes: Any) -> Plan:
    systems = tuple(SYSTEMS[name] for name in policies or ("fcfs", "edf", "oracle"))
    return replace(Plan(systems, (0.5, 1.0), tuple(FACTORS), 3, 24), **changes)


def play(
    cluster: Cluster,
    system: System,
    runs: Iterable[SimRun],
    foresight: object,
    *,
    horizon_s: float | None = None,
    trace_run: str | None = None,
) -> Outcome:
    """Runs take 3 times their idle time, with `edf` 1.5 times; every fifth does not end."""
    times = {"edf": 1.5, "oracle": 1.0}.get(system.name, 3.0)
    found = Outcome(simulated_s=100.0, calls_ended=40, output_tokens=400, stalls=2)
    found.kv_reserved_byte_s, found.kv_used_byte_s = 2.0**40, 2.0**39
    found.activations.update({Residency.HOST: 3})
    found.activation_s, found.exposed_s = 8.0, 2.0
    for number, run in enumerate(run for run in runs if run.measured):
        finish = nan if number % 5 == 4 else run.at + times * IDLE_S[run.template.source]
        found.runs.append(RunOutcome(run, finish))
    if trace_run is not None:
        found.memory = [
            MemorySample(float(at), f"gpu{gpu}", 10 << 30, 30 << 30, at << 28, at << 27)
            for at in range(0, 100, 10)
            for gpu in range(2)
        ]
        found.spans = [
            CallSpan(0, "a", "m", "w", 1.0, 2.0, 3.0, 9.0),
            CallSpan(1, "b", "m", "w", 9.0, 9.0, 10.0, 20.0),
        ]
    return found


def play_badly(*args: Any, **options: Any) -> Outcome:
    """A bug in one cell."""
    _, system, *_ = args
    if system.name == "edf":
        raise KeyError("lost")
    return play(*args, **options)


def play_and_die(*args: Any, **options: Any) -> Outcome:
    """As when memory runs out."""
    _, system, *_ = args
    if system.name == "edf":
        os._exit(9)
    return play(*args, **options)
