"""Where cells are simulated: everything that they share, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from maestro_backend.simulator import Cluster, Foresight, SimRun, Template
from maestro_backend.workloads import Due

Draw = Callable[[float, int, int], Iterator[SimRun]]
"""Runs/s, calls, seed -> runs in order of arrival, without deadlines."""


@dataclass(frozen=True, slots=True)
class Scene:
    """`due` by the deadline as it was asked for. `idle_s`: what a run of a template takes alone,
    models resident, gaps and people included. `saturation`: runs/s that are load 1.0. `told`: what
    the head of the results says of all this.
    """

    cluster: Cluster
    foresight: Foresight
    draw: Draw
    due: Mapping[str, Callable[[Template], Due]]
    idle_s: Callable[[Template], float]
    saturation: float
    told: Mapping[str, Any] = field(default_factory=dict)

    def due_at(self, run: SimRun, deadline: str) -> float:
        """On the simulation's clock, with what people take in the run."""
        due = self.due[deadline](run.template)
        return run.at + due.deadline_s + due.pauses_s
