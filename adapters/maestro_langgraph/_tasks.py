"""What the handler remembers of a run in progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from maestro_agents.protocol import Barrier

from ._supersteps import Supersteps


@dataclass(slots=True, eq=False)
class Run:
    """One execution of a wrapped graph. `outside` are the names of graphs around it that are not
    wrapped. `frames` are the callback runs to forget when it is over."""

    id: str
    conversation: str | None
    outside: tuple[str, ...]
    steps: Supersteps
    frames: set[UUID] = field(default_factory=set)
    paused: bool = False


@dataclass(slots=True, eq=False)
class Task:
    """One run of a node. `names` is its path; `inner` counts the steps of the graph it is."""

    key: str
    names: tuple[str, ...]
    step: int
    parent: Task | None
    steps: Supersteps
    inner: Supersteps
    followers: list[Frame] = field(default_factory=list)

    @property
    def node(self) -> str:
        return self.names[-1]

    @property
    def path(self) -> str:
        return "/".join(self.names)

    @property
    def prefix(self) -> str:
        return "/".join(self.names[:-1])

    def barrier(self) -> Barrier | None:
        """The innermost superstep around the task that has siblings, else the outermost."""
        found: Barrier | None = None
        task: Task | None = self
        while task is not None:
            if width := task.steps.width(task.step):
                found = Barrier(step=task.step, width=width)
                if width > 1:
                    break
            task = task.parent
        return found


@dataclass(slots=True, eq=False)
class Frame:
    """One callback run inside a Run, and the task it belongs to.

    `owner` is the handler that follows the run; `opened` is the Run or Task that ends with it.
    """

    owner: object
    run: Run
    task: Task | None = None
    opened: Run | Task | None = None
    output: Any = None
