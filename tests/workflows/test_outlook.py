"""What a run's rest is made of, and what a run may teach: graphs, models, pauses, silence."""

from __future__ import annotations

import pytest
from workflows.story import Story

from maestro_agents.protocol import (
    END,
    START,
    Announcement,
    CallIdentity,
    Edge,
    RunEnded,
    RunPaused,
    RunStarted,
    Stage,
    StageEnded,
    StageStarted,
    Successor,
    Workflow,
)
from maestro_backend.predictor import CallOutcome, CallShape, Prediction
from maestro_backend.scheduler import Length, Rest
from maestro_backend.workflows import Run, WorkflowBook

CHAIN = Workflow(
    name="chain",
    stages=(Stage(path="plan"), Stage(path="write"), Stage(path="check")),
    edges=(
        Edge(source=START, target="plan"),
        Edge(source="plan", target="write"),
        Edge(source="write", target="check"),
        Edge(source="check", target=END),
    ),
)
FORK = Workflow(
    name="chain",
    stages=CHAIN.stages,
    edges=(
        *CHAIN.edges[:2],
        Edge(source="write", target="check", candidate=True),
        Edge(source="write", target=END, candidate=True),
    ),
)


class Calls:
    """Tells a book of calls of one workflow, each under a name of its own."""

    def __init__(self, workflow: Workflow | None = CHAIN) -> None:
        self.book: WorkflowBook = Story(workflow).book
        self.workflow = (workflow or CHAIN).id

    def arrive(
        self,
        stage: str,
        at: float,
        run: str = "r",
        call: str = "",
        said: Announcement | None = None,
    ) -> Run:
        shape = CallShape("m", self.workflow, stage)
        self.book.call_arrived(self._identity(stage, run), said, shape, None, at, call=call)
        return self.book.runs[run]

    def predict(
        self,
        stage: str,
        own: float,
        rest: float | None = None,
        run: str = "r",
        call: str = "",
    ) -> Run:
        told = None if rest is None else (rest, 2.0 * rest)
        prediction = Prediction(1_000, Length(own, 2.0 * own), 1_000, 1.0, told)
        self.book.call_predicted(self._identity(stage, run), "", prediction, call=call)
        return self.book.runs[run]

    def end(self, stage: str, at: float, run: str = "r", call: str = "", tokens: int = 100) -> Run:
        outcome = CallOutcome(1_000, tokens, finish="stop")
        self.book.call_ended(self._identity(stage, run), at, outcome, call=call)
        return self.book.runs[run]

    def run(self, run: str, at: float, *stages: str) -> None:
        for number, stage in enumerate(stages):
            self.arrive(stage, at + 4 * number, run)
            self.end(stage, at + 4 * number + 1, run)

    def follows(self, stage: str) -> dict[str, float]:
        return self.book.outlook.journeys.branches.usual("chain", stage, 1)

    def _identity(self, stage: str, run: str) -> CallIdentity:
        return CallIdentity(run=run, workflow=self.workflow, stage=stage)


# --- certain graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [0, 30])
def test_where_all_is_certain_the_graph_alone_counts(learned: int) -> None:
    calls = Calls()
    for number in range(learned):
        calls.run(f"r{number}", 1_000.0 * number, "plan", "write", "check")
    now = 1_000.0 * learned
    calls.run("now", now, "plan", "write")
    calls.arrive("check", now + 8, "now")
    assert calls.predict("check", 80.0, 9_000.0, "now").rest == Rest(80.0, 160.0, 0.0)
    assert calls.end("check", now + 9, "now").rest == Rest(0.0, 0.0, 0.0)


def test_a_certain_graph_counts_though_a_model_says_otherwise_all_along() -> None:
    calls = Calls()
    calls.arrive("plan", 0.0)
    rest = calls.predict("plan", 80.0, 90_000.0).rest
    assert rest is not None and rest.calls == 2
    assert rest.p50 == pytest.approx(80 + 2 * 256, rel=0.2), "of the others nothing is known"


def test_with_events_a_call_ahead_of_its_stage_is_counted_once() -> None:
    calls = Calls()
    book = calls.book
    book.run_event("r", RunStarted(workflow=CHAIN.id), 0.0)
    for at, stage in enumerate(("plan", "write")):
        book.run_event("r", StageStarted(stage=stage), 4.0 * at)
        calls.arrive(stage, 4.0 * at)
        calls.end(stage, 4.0 * at + 1)
        book.run_event("r", StageEnded(stage=stage), 4.0 * at + 2)
    calls.arrive("check", 9.0)
    assert calls.predict("check", 80.0, 9_000.0).rest == Rest(80.0, 160.0, 0.0)
    book.run_event("r", StageStarted(stage="check"), 9.5)
    assert book.runs["r"].rest == Rest(80.0, 160.0, 0.0)


def test_where_a_choice_is_left_the_model_has_its_share() -> None:
    calls = Calls(FORK)
    calls.arrive("plan", 0.0)
    graph = calls.book.runs["r"].rest
    mixed = calls.predict("plan", 256.0, 90_000.0).rest
    assert graph is not None and mixed is not None
    assert 2 * graph.p50 < mixed.p50 < 90_000


def test_a_stage_that_the_graph_lacks_makes_nothing_certain() -> None:
    calls = Calls()
    calls.arrive("other", 0.0)
    rest = calls.predict("other", 80.0, 9_000.0).rest
    assert rest is not None and rest.p50 > 500, "the model has its share"


def test_of_parallel_calls_each_quantile_is_the_largest() -> None:
    calls = Calls()
    calls.run("r", 0.0, "plan", "write")
    calls.arrive("check", 8.0, call="one")
    calls.arrive("check", 8.0, call="two")
    for call, length in (("one", Length(100.0, 110.0)), ("two", Length(90.0, 900.0))):
        identity = CallIdentity(run="r", workflow=CHAIN.id, stage="check")
        calls.book.call_predicted(identity, "", Prediction(1_000, length, 1_000, 1.0), call=call)
    assert calls.book.runs["r"].rest == Rest(100.0, 900.0, 0.0)


# --- calls by name ------------------------------------------------------------------------------


def test_parallel_calls_of_one_instance_are_told_apart_by_name() -> None:
    calls = Calls()
    calls.arrive("plan", 0.0, call="one")
    calls.arrive("plan", 0.0, call="two")
    calls.predict("plan", 10.0, call="one")
    calls.predict("plan", 20.0, call="two")
    log = calls.book.runs["r"].log
    assert [call.current.p50 for call in log.open.values()] == [10.0, 20.0]
    calls.end("plan", 1.0, call="two", tokens=222)
    assert [call.call for call in log.open.values()] == ["one"]
    calls.end("plan", 2.0, call="one", tokens=111)
    assert [c.outcome.output_tokens for c in log.examples("r", "chain").calls] == [111, 222]


def test_an_unknown_name_ends_no_other_call() -> None:
    calls = Calls()
    calls.arrive("plan", 0.0, call="one")
    calls.end("plan", 1.0, call="gone")
    assert len(calls.book.runs["r"].log.open) == 1


def test_without_names_the_oldest_call_is_meant() -> None:
    calls = Calls()
    calls.arrive("plan", 0.0)
    calls.arrive("plan", 0.5)
    calls.end("plan", 1.0)
    assert [call.index for call in calls.book.runs["r"].log.open.values()] == [1]


# --- what teaches an end ------------------------------------------------------------------------


def test_a_long_tool_is_no_end() -> None:
    calls = Calls(None)
    calls.run("r", 0.0, "plan")
    calls.run("other", 90.0, "plan", "write")
    calls.run("r", 95.0, "write")
    assert END not in calls.follows("plan")
    calls.run("later", 2_000.0, "plan")
    assert END in calls.follows("write")


def test_a_long_last_call_is_learned_once_it_has_ended() -> None:
    calls = Calls(None)
    calls.run("r", 0.0, "plan")
    calls.arrive("write", 10.0)
    calls.run("other", 2_000.0, "look")
    calls.end("write", 2_500.0)
    calls.run("other", 2_600.0, "look")
    assert END not in calls.follows("write")
    calls.run("other", 4_000.0, "look")
    assert calls.follows("write") == {END: 1.0}


def paused(calls: Calls) -> None:
    """A run of a conversation that asks a human while a call runs."""
    start = RunStarted(workflow=calls.workflow, conversation="c")
    calls.book.run_event("r", start, 0.0)
    calls.book.run_event("r", StageStarted(stage="plan"), 0.0)
    calls.arrive("plan", 0.0)
    calls.end("plan", 1.0)
    calls.book.run_event("r", StageEnded(stage="plan"), 1.0)
    calls.book.run_event("r", StageStarted(stage="write"), 2.0)
    calls.arrive("write", 2.0)
    calls.book.run_event("r", RunPaused(), 3.0)


def test_a_pause_strikes_the_calls_in_progress() -> None:
    calls = Calls()
    paused(calls)
    log = calls.book.runs["r"].log
    assert not log.open
    calls.end("write", 4.0)
    assert [c.shape.stage for c in log.examples("r", "chain").calls] == ["plan"]


@pytest.mark.parametrize("given_up", [True, False])
def test_a_run_that_never_came_back_teaches_no_end(given_up: bool) -> None:
    calls = Calls()
    paused(calls)
    if given_up:
        start = RunStarted(workflow=calls.workflow, conversation="c")
        calls.book.run_event("next", start, 60.0)
    else:
        calls.book.run_event("r", RunEnded(), 60.0)
    assert calls.book.runs["r"].ended == 60.0
    assert END not in calls.follows("plan") and END not in calls.follows("write")
    assert not calls.book.outlook.journeys.futures.state()["contexts"]


def test_a_certain_end_that_a_call_announced_counts() -> None:
    calls = Calls(FORK)
    calls.run("r", 0.0, "plan")
    said = Announcement(successors=(Successor(stage=END, certain=True),))
    calls.arrive("write", 4.0, said=said)
    assert calls.predict("write", 80.0, 9_000.0).rest == Rest(80.0, 160.0, 0.0)
