"""A workflow book that writes down, in order, what it believed and what it was told."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_agents.protocol import (
    Announcement,
    CallIdentity,
    RunEvent,
    Slo,
    StageEnded,
    StageStarted,
)
from maestro_backend import scheduler as core
from maestro_backend.predictor import CallOutcome, CallShape, Predictor
from maestro_backend.workflows import WorkflowBook


@dataclass(frozen=True, slots=True)
class Believed:
    """From `at` on, these calls are expected of the run: stage and probability, one entry each."""

    run: str
    at: float
    calls: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Arrived:
    """A call arrived; it is counted once, however often it is tried."""

    run: str
    at: float
    stage: str
    lead_s: float | None


@dataclass(frozen=True, slots=True)
class Began:
    """An execution of a stage began: that its call follows is no announcement any more."""

    run: str
    at: float
    stage: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """A stage ended. `believed` is what was thought to follow it before anybody could know:
    when the stage began or made its last call. `chosen` is what routing said, None if nothing."""

    run: str
    at: float
    stage: str
    believed: dict[str, float]
    chosen: tuple[str, ...] | None


Entry = Believed | Arrived | Began | Stepped


class JournalBook(WorkflowBook):
    """Put it in the place of a gateway's `shell.book`; `journal` is what `score` reads.

    The journal grows without bound: it is for measuring, not for serving.
    """

    def __init__(self, predictor: Predictor, deadlines: dict[str, float | None]) -> None:
        super().__init__(predictor, deadlines)
        self.journal: list[Entry] = []
        self._calls: set[tuple[str, str, int]] = set()
        self._thought: dict[tuple[str, str, int], dict[str, float]] = {}
        self._beliefs: dict[str, tuple[tuple[str, float], ...]] = {}

    def call_arrived(
        self,
        identity: CallIdentity,
        announcement: Announcement | None,
        shape: CallShape,
        slo: Slo | None,
        now: float,
        call: str = "",
    ) -> tuple[list[core.Event], float | None]:
        told = super().call_arrived(identity, announcement, shape, slo, now, call)
        if identity.run and identity.stage:
            key = (identity.run, identity.stage, identity.instance)
            if key not in self._calls:
                self._calls.add(key)
                self.journal.append(Arrived(identity.run, now, identity.stage, told[1]))
            visit = self._visit(self.runs[identity.run], identity.stage)
            self._think(identity.run, identity.stage, visit)
            self._beliefs.pop(identity.run, None)  # what holds after a call is said anew
            self._believe(identity.run, now)
        return told

    def call_ended(
        self,
        identity: CallIdentity,
        now: float,
        outcome: CallOutcome | None = None,
        role: str = "",
        call: str = "",
    ) -> list[core.Event]:
        told = super().call_ended(identity, now, outcome, role, call)
        if identity.run is not None and identity.run in self.runs:
            self._believe(identity.run, now)
        return told

    def run_event(self, run: str, event: RunEvent, now: float) -> list[core.Event]:
        told = super().run_event(run, event, now)
        if isinstance(event, StageStarted):
            key = (run, event.stage, event.instance + 1)
            if key not in self._thought:  # a call, if it came before, told more
                self._think(*key)
            self.journal.append(Began(run, now, event.stage))
            self._beliefs.pop(run, None)
        if isinstance(event, StageEnded) and not event.failed:
            chosen = None if event.next is None else tuple(s.stage for s in event.next)
            believed = self._thought.get((run, event.stage, event.instance + 1), {})
            self.journal.append(Stepped(run, now, event.stage, believed, chosen))
        self._believe(run, now)
        return told

    def _think(self, run: str, stage: str, visit: int) -> None:
        self._thought[run, stage, visit] = self.next_of(run, stage)

    def _believe(self, run: str, now: float) -> None:
        calls = tuple((call.stage, call.probability) for call in self.runs[run].forecast)
        if self._beliefs.get(run) != calls:
            self._beliefs[run] = calls
            self.journal.append(Believed(run, now, calls))
