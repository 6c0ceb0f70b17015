"""What the handler remembers of a run in progress."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from maestro_agents.adapter import CallContext, Settings, Tracker
from maestro_agents.protocol import Barrier

from ._supersteps import Supersteps


@dataclass(slots=True, eq=False)
class Run:
    """One execution of a followed graph. `backend` is who is told of it; `frames` are the callback
    runs to forget when it ends; `interrupted`: a task has asked a human."""

    id: str
    conversation: str | None
    backend: Settings
    tracker: Tracker
    frames: set[UUID] = field(default_factory=set)
    paused: bool = False
    interrupted: bool = False


@dataclass(slots=True, eq=False)
class GraphRun:
    """One execution of one graph, the root or a nested one, by the prefix of its stages.

    `failures` counts the errors of each task, by its checkpoint namespace.
    """

    prefix: str
    steps: Supersteps
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class Task:
    """One run of the node `node`, or of a `@task`, in superstep `step` of the graph it is in.

    `call` is its latest.
    """

    key: str
    node: str
    namespace: str
    step: int
    within: GraphRun
    parent: Task | None
    call: CallContext | None = None
    followers: list[Frame] = field(default_factory=list)

    @property
    def path(self) -> str:
        prefix = self.within.prefix
        return f"{prefix}/{self.node}" if prefix else self.node

    def barrier(self) -> Barrier | None:
        """The innermost superstep around the task that has siblings, else the outermost."""
        found: Barrier | None = None
        task: Task | None = self
        while task is not None:
            if width := task.within.steps.width(task.step):
                found = Barrier(step=task.step, width=width)
                if width > 1:
                    break
            task = task.parent
        return found


@dataclass(slots=True, eq=False)
class Frame:
    """One callback run inside a Run, and the task it belongs to.

    `owner` is the handler that follows the run; `opened` is the Run or Task that ends with it;
    `graph` is there once a task has begun directly below: then this is the run of a graph.
    """

    owner: object
    run: Run
    task: Task | None = None
    opened: Run | Task | None = None
    name: str = ""
    graph: GraphRun | None = None
    output: Any = None
