"""A run told to a book, second by second."""

from __future__ import annotations

from maestro_agents.protocol import (
    END,
    START,
    Announcement,
    CallIdentity,
    Edge,
    RunEnded,
    RunStarted,
    Stage,
    StageEnded,
    StageStarted,
    Successor,
    Workflow,
)
from maestro_backend import scheduler as core
from maestro_backend.predictor import CallShape, Predictor
from maestro_backend.workflows import WorkflowBook

DEADLINES = {"interactive": 20.0, "standard": 120.0, "batch": None}

LOOP = Workflow(
    name="team",
    stages=(Stage(path="plan"), Stage(path="tool"), Stage(path="write"), Stage(path="judge")),
    edges=(
        Edge(source=START, target="plan"),
        Edge(source="plan", target="tool"),
        Edge(source="tool", target="write"),
        Edge(source="write", target="judge"),
        Edge(source="judge", target="write", candidate=True),
        Edge(source="judge", target=END, candidate=True),
    ),
)


class Story:
    """Tells a book what happens at which second."""

    def __init__(self, workflow: Workflow | None = LOOP) -> None:
        self.book = WorkflowBook(Predictor(), DEADLINES)
        self.workflow = (workflow or LOOP).id
        if workflow:
            self.book.put(workflow)

    def begin(self, at: float, run: str = "r") -> list[core.Event]:
        return self.book.run_event(run, RunStarted(workflow=self.workflow), at)

    def enter(self, stage: str, at: float, run: str = "r") -> None:
        self.book.run_event(run, StageStarted(stage=stage), at)

    def leave(self, stage: str, at: float, *chosen: str, run: str = "r") -> None:
        """`chosen`: what routing chose; END alone is an empty choice on the wire."""
        following = tuple(Successor(stage=s, certain=True) for s in chosen if s != END)
        event = StageEnded(stage=stage, next=following if chosen else None)
        self.book.run_event(run, event, at)

    def call(
        self,
        stage: str,
        at: float,
        run: str = "r",
        announcement: Announcement | None = None,
        instance: int = 0,
    ) -> float | None:
        identity = CallIdentity(run=run, workflow=self.workflow, stage=stage, instance=instance)
        shape = CallShape("m", self.workflow, stage)
        _, lead_s = self.book.call_arrived(identity, announcement, shape, None, at)
        return lead_s

    def hang_up(self, stage: str, at: float, run: str = "r") -> None:
        identity = CallIdentity(run=run, workflow=self.workflow, stage=stage)
        self.book.call_ended(identity, at)

    def end(self, at: float, run: str = "r") -> None:
        self.book.run_event(run, RunEnded(), at)

    def foreseen(self, run: str = "r") -> dict[str, float]:
        """By stage, how likely its next call is."""
        found: dict[str, float] = {}
        for call in self.book.runs[run].forecast:
            found[call.stage] = max(call.probability, found.get(call.stage, 0.0))
        return found

    def whole_run(self, run: str) -> None:
        self.begin(0, run)
        for at, stage in enumerate(("plan", "tool", "write", "judge"), start=1):
            self.enter(stage, at, run)
            if stage != "tool":
                self.call(stage, at, run)
                self.hang_up(stage, at, run)
            self.leave(stage, at, *((END,) if stage == "judge" else ()), run=run)
        self.end(9, run)
