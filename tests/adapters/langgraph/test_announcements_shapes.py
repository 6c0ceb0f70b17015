"""The announcement is right: six shapes against a real gateway, and cheats that must not score.

What the backend was told is taped once per shape. A cheat is the same tape with lies in it: what
another adapter might have announced of the very same runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gateway.gateways import gateway

from benchmarks.announcement_quality import TRUTHS, measure, truth
from maestro_agents.protocol import (
    START,
    Announcement,
    CallIdentity,
    Edge,
    RunEvent,
    StageEnded,
    Successor,
    ToolsRequested,
    Workflow,
)
from maestro_backend.evaluation import JournalBook, Score, score
from maestro_backend.predictor import Predictor

RUNS = 20


class TapedBook(JournalBook):
    """Keeps every message that it is told."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.messages: list[tuple[str, tuple[Any, ...]]] = []

    def put(self, workflow: Workflow) -> None:
        self.messages.append(("put", (workflow,)))
        super().put(workflow)

    def call_arrived(self, *told: Any, call: str = "") -> Any:
        told = (*told, call)
        self.messages.append(("call_arrived", told))
        return super().call_arrived(*told)

    def call_ended(self, *told: Any, call: str = "") -> Any:
        told = (*told, call)
        self.messages.append(("call_ended", told))
        return super().call_ended(*told)

    def run_event(self, *told: Any) -> Any:
        self.messages.append(("run_event", told))
        return super().run_event(*told)


@dataclass(frozen=True)
class Taped:
    shape: str
    score: Score
    messages: list[tuple[str, tuple[Any, ...]]]


@pytest.fixture(scope="module", params=list(TRUTHS))
def taped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taped:
    folder = tmp_path_factory.mktemp(request.param)
    return asyncio.run(tape(request.param, folder))


async def tape(shape: str, folder: Path) -> Taped:
    async with gateway(folder) as served:
        book = TapedBook(served.shell.predictor, {})
        found = await measure(served.shell, served.url, shape, "big", book, RUNS)
        return Taped(shape, found, book.messages)


# --- the honest adapter -------------------------------------------------------------------------


def test_every_call_was_announced_and_what_was_certain_came(taped: Taped) -> None:
    found = taped.score
    assert (found.runs, found.uncovered) == (RUNS, ())
    assert found.coverage == 1.0
    assert found.broken_share <= 0.01, found.never_came
    if taped.shape not in ("map_reduce", "supervisor"):  # there nearly everything is a choice
        assert found.promises > RUNS
    assert found.sure_share == 1.0
    assert found.faults() == ()


def test_candidates_are_no_worse_than_a_guess_and_better_where_there_is_something_to_learn(
    taped: Taped,
) -> None:
    found, graph = taped.score, truth(taped.shape)
    assert found.loss < found.uniform
    for stage, choice in found.choices.items():
        if choice.options == 1:
            assert choice.loss == 0.0, stage
        else:
            assert choice.loss <= choice.uniform + choice.chance, stage
    chosen = {stage for stage, choice in found.choices.items() if choice.options > 1}
    assert chosen == {e.source for e in graph.edges if e.candidate}, "each choice was put to it"


def test_lead_times_are_reported(taped: Taped) -> None:
    """How long they are depends on the machine; a candidate may come before its routing is told."""
    stages = {stage.path for stage in truth(taped.shape).stages}
    assert taped.score.lead_s and taped.score.lead_s.keys() <= stages
    for stage in taped.score.lead_s:
        low, middle, high = taped.score.lead_quantiles(stage)
        assert 0.0 <= low <= middle <= high


# --- cheats -------------------------------------------------------------------------------------


@dataclass
class Cheat:
    """Rewrites what an honest adapter said: the graph, each call's announcement, the routing."""

    stages: tuple[str, ...] = ()
    seen: set[str] = field(default_factory=set)

    def workflow(self, workflow: Workflow) -> Workflow | None:
        self.stages = tuple(stage.path for stage in workflow.stages)
        return workflow

    def announcement(self, identity: CallIdentity) -> Announcement | None:
        return None

    def event(self, event: RunEvent) -> RunEvent | None:
        if isinstance(event, ToolsRequested):
            return None
        if isinstance(event, StageEnded):
            return event.model_copy(update={"next": None})
        return event

    def first(self, identity: CallIdentity) -> bool:
        new = identity.run is not None and identity.run not in self.seen
        self.seen.add(identity.run or "")
        return new

    def everywhere(self, workflow: Workflow, *, candidate: bool, sources: Any) -> Workflow:
        edges = tuple(
            Edge(source=source, target=target, candidate=candidate)
            for source in sources
            for target in self.stages
        )
        return Workflow(name=workflow.name, stages=workflow.stages, edges=edges)


class SaysNothing(Cheat):
    def workflow(self, workflow: Workflow) -> None:
        return None


class AllCertainAtTheStart(Cheat):
    """Every stage, once and for all, as soon as a run begins."""

    def workflow(self, workflow: Workflow) -> Workflow:
        super().workflow(workflow)
        return self.everywhere(workflow, candidate=False, sources=(START,))

    def announcement(self, identity: CallIdentity) -> Announcement | None:
        if not self.first(identity):
            return None
        return Announcement(
            successors=tuple(Successor(stage=stage, certain=True) for stage in self.stages)
        )


class AllWithProbabilityOne(Cheat):
    """Every stage may follow every other, each for sure."""

    def workflow(self, workflow: Workflow) -> Workflow:
        super().workflow(workflow)
        return self.everywhere(workflow, candidate=True, sources=(START, *self.stages))

    def announcement(self, identity: CallIdentity) -> Announcement | None:
        return Announcement(
            successors=tuple(Successor(stage=stage, probability=1.0) for stage in self.stages)
        )


class AllAsCandidates(AllWithProbabilityOne):
    """Every stage may follow every other."""

    def announcement(self, identity: CallIdentity) -> Announcement | None:
        return Announcement(successors=tuple(Successor(stage=stage) for stage in self.stages))


def replayed(taped: Taped, cheat: Cheat | None) -> Score:
    """The same runs, as told by a cheat."""
    book = JournalBook(Predictor(), {})
    runs: set[str] = set()
    for name, told in taped.messages:
        run = told[0] if name == "run_event" else getattr(told[0], "run", None)
        if run is not None and run not in runs:
            runs.add(run)
            if len(runs) == RUNS + 1:
                book.journal.clear()
        if (message := told if cheat is None else rewritten(cheat, name, told)) is not None:
            getattr(book, name)(*message)
    return score(book.journal, truth(taped.shape))


def rewritten(cheat: Cheat, name: str, told: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if name == "put":
        workflow = cheat.workflow(told[0])
        if workflow is None:
            return None
        # The runs name the honest graph: the lie goes under its name.
        workflow.__dict__["content_hash"] = told[0].content_hash
        return (workflow,)
    if name == "call_arrived":
        identity, _, *rest = told
        return (identity, cheat.announcement(identity), *rest)
    if name == "run_event":
        run, event, now = told
        lie = cheat.event(event)
        return None if lie is None else (run, lie, now)
    return told


def test_a_tape_tells_the_same_as_the_runs_themselves(taped: Taped) -> None:
    again = replayed(taped, None)
    assert (again.calls, again.covered, again.promises, again.broken) == (
        taped.score.calls,
        taped.score.covered,
        taped.score.promises,
        taped.score.broken,
    )
    assert again.loss == pytest.approx(taped.score.loss)


def test_who_announces_nothing_covers_nothing_but_what_was_learned(taped: Taped) -> None:
    """In the first run of an app, each stage's first call comes as a surprise."""
    stages: list[str] = []
    book = JournalBook(Predictor(), {})
    first: str | None = None
    for name, told in taped.messages:
        run = told[0] if name == "run_event" else getattr(told[0], "run", None)
        first = first or run
        message = rewritten(SaysNothing(), name, told)
        if message is not None and run in (None, first):
            getattr(book, name)(*message)
            stages += [told[0].stage] if name == "call_arrived" else []
    found = score(book.journal, truth(taped.shape))
    assert {*stages} - {stages[0]} <= {*found.uncovered}
    assert found.faults()


def test_who_announces_everything_at_the_start_breaks_promises(taped: Taped) -> None:
    found = replayed(taped, AllCertainAtTheStart())
    assert found.broken_share > 0.05 or found.coverage < 0.9
    assert found.loss > found.uniform + 0.5
    assert found.faults()


@pytest.mark.parametrize("cheat", [AllWithProbabilityOne, AllAsCandidates])
def test_who_calls_everything_possible_or_sure_knows_nothing(
    taped: Taped, cheat: Callable[[], Cheat]
) -> None:
    found = replayed(taped, cheat())
    assert found.sure_share < 0.1
    assert found.loss > taped.score.loss + 0.02
    assert len(found.faults()) > 1
