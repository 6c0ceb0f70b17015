"""What is simulated: cells, and the simulations that they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from maestro_backend.simulator import System


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the results. `deadline` as it was asked for, such as `proportional:2.5`."""

    policy: str
    load: float
    deadline: str
    seed: int

    def __str__(self) -> str:
        return f"{self.policy}, load {self.load:g}, {self.deadline}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Job:
    """One simulation. Runs carry the first of `deadlines`; the others are judged afterwards."""

    system: System
    load: float
    seed: int
    deadlines: tuple[str, ...]
    trace_run: str | None = None
    """The run whose calls are written down one by one."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(Cell(self.system.name, self.load, d, self.seed) for d in self.deadlines)

    def __str__(self) -> str:
        return str(self.cells[0])


@dataclass(frozen=True, slots=True)
class Plan:
    """Every policy at every load, deadline and seed. `calls`: about so many are
    made in each cell, warm-up included."""

    systems: tuple[System, ...]
    loads: tuple[float, ...]
    deadlines: tuple[str, ...]
    seeds: int
    calls: int

    def jobs(self, trace_run: str | None = None) -> Iterator[Job]:
        """In the order of the results. `trace_run` is of the highest load and the first seed."""
        for system in self.systems:
            for load in self.loads:
                for seed in range(self.seeds):
                    shown = trace_run if load == max(self.loads) and seed == 0 else None
                    for deadlines in self._together(system):
                        yield Job(system, load, seed, deadlines, shown)

    def _together(self, system: System) -> list[tuple[str, ...]]:
        if system.uses_deadlines:
            return [(deadline,) for deadline in self.deadlines]
        return [self.deadlines]
