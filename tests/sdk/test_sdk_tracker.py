from itertools import count

import pytest

from maestro_agents import _tracker
from maestro_agents._tracker import Tracker
from maestro_agents.protocol import (
    END,
    START,
    Barrier,
    Edge,
    RunEnded,
    RunPaused,
    RunResumed,
    RunStarted,
    Slo,
    Stage,
    StageEnded,
    StageStarted,
    Successor,
    ToolEnded,
    ToolStarted,
    Workflow,
)

WORKFLOW = Workflow(
    name="team",
    stages=(Stage(path="plan", role="planner"), Stage(path="work"), Stage(path="check")),
    edges=(
        Edge(source=START, target="plan"),
        Edge(source="plan", target="work"),
        Edge(source="work", target="check"),
        Edge(source="check", target="work", candidate=True),
        Edge(source="check", target=END, candidate=True),
    ),
    open_ended=("work",),
)
SLO = Slo(class_="interactive", deadline_s=5)


@pytest.fixture
def tracker() -> Tracker:
    ticks = count(100)
    return Tracker(WORKFLOW, slo=SLO, tenant="acme", clock=lambda: float(next(ticks)))


def test_a_run_from_start_to_end(tracker: Tracker) -> None:
    told = [
        *tracker.run_started("r", "thread"),
        *tracker.stage_started("r", "x1", "plan", step=1),
        *tracker.tool_started("r", "x1", "t1", "search"),
        *tracker.tool_ended("r", "t1"),
        *tracker.stage_ended("r", "x1"),
        *tracker.run_paused("r"),
        *tracker.run_resumed("r"),
        *tracker.run_ended("r", failed=True),
    ]
    assert told == [
        RunStarted(at=100, workflow=WORKFLOW.id, conversation="thread", slo=SLO, tenant="acme"),
        StageStarted(at=101, stage="plan", instance=0, step=1),
        ToolStarted(at=102, stage="plan", tool="search"),
        ToolEnded(at=103, stage="plan", tool="search", duration_s=1),
        StageEnded(at=104, stage="plan"),
        RunPaused(at=105),
        RunResumed(at=106),
        RunEnded(at=107, failed=True),
    ]


def test_a_call_says_who_and_what_follows(tracker: Tracker) -> None:
    tracker.run_started("r", "thread")
    tracker.stage_started("r", "x1", "plan")
    call = tracker.call_started("r", "x1", barrier=Barrier(step=1, width=2))
    assert call is not None
    assert call.identity.model_dump() == {
        "run": "r",
        "workflow": WORKFLOW.id,
        "stage": "plan",
        "instance": 0,
        "conversation": "thread",
    }
    assert call.annotation.role == "planner"
    assert (call.annotation.slo, call.annotation.tenant) == (SLO, "acme")
    announcement = call.annotation.announcement
    assert announcement is not None
    assert announcement.successors == (Successor(stage="work", certain=True),)
    assert announcement.barrier == Barrier(step=1, width=2)


def test_candidates_are_not_certain_and_the_end_is_no_stage(tracker: Tracker) -> None:
    tracker.run_started("r")
    tracker.stage_started("r", "x1", "check")
    call = tracker.call_started("r", "x1")
    assert call and call.annotation.announcement
    assert call.annotation.announcement.successors == (Successor(stage="work", certain=False),)
    assert not call.annotation.announcement.open_ended


def test_open_ended_stages_say_so(tracker: Tracker) -> None:
    tracker.run_started("r")
    tracker.stage_started("r", "x1", "work")
    call = tracker.call_started("r", "x1")
    assert call and call.annotation.announcement and call.annotation.announcement.open_ended


def test_instances_count_the_calls_of_a_stage_within_a_run(tracker: Tracker) -> None:
    for run in ("r", "s"):
        tracker.run_started(run)
        tracker.stage_started(run, f"{run}1", "work")
        tracker.stage_started(run, f"{run}2", "work")
        tracker.stage_started(run, f"{run}3", "check")
    seen = [
        (call.identity.run, call.identity.stage, call.identity.instance)
        for run, execution in [("r", "r1"), ("r", "r2"), ("r", "r1"), ("r", "r3"), ("s", "s2")]
        if (call := tracker.call_started(run, execution))
    ]
    assert seen == [
        ("r", "work", 0),
        ("r", "work", 1),
        ("r", "work", 2),
        ("r", "check", 0),
        ("s", "work", 0),
    ]


def test_known_routing_narrows_the_announcement_and_is_told_at_the_end(tracker: Tracker) -> None:
    chosen = (Successor(stage="work", certain=True, width=3),)
    tracker.run_started("r")
    tracker.stage_started("r", "x1", "check")
    tracker.routed("r", "x1", chosen)
    call = tracker.call_started("r", "x1")
    assert call and call.annotation.announcement
    assert call.annotation.announcement.successors == chosen
    (ended,) = tracker.stage_ended("r", "x1")
    assert isinstance(ended, StageEnded)
    assert ended.next == chosen


def test_a_stage_outside_the_graph_goes_on_to_what_its_nearest_ancestor_does(
    tracker: Tracker,
) -> None:
    tracker.run_started("r")
    tracker.stage_started("r", "x1", "plan/deep/model")
    tracker.stage_started("r", "x2", "plan/deep/other", role="expert")
    call = tracker.call_started("r", "x1")
    assert call and call.annotation.announcement
    assert call.annotation.announcement.successors == (Successor(stage="work"),)
    assert call.annotation.announcement.open_ended
    assert call.annotation.role == "model"
    other = tracker.call_started("r", "x2")
    assert other and other.annotation.role == "expert"


def test_what_is_unknown_gives_nothing(tracker: Tracker) -> None:
    assert tracker.stage_started("nobody", "x1", "plan") == ()
    assert tracker.call_started("nobody", "x1") is None
    tracker.run_started("r")
    unknown = tracker.call_started("r", "x9")
    assert unknown and (unknown.identity.run, unknown.identity.stage) == ("r", None)
    assert tracker.stage_ended("r", "x9") == ()
    assert tracker.tool_ended("r", "t9") == ()
    tracker.run_ended("r")
    assert tracker.run_ended("r") == ()
    assert tracker.run_paused("r") == ()
    assert tracker.run_resumed("r") == ()


def test_the_number_of_runs_is_bounded(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tracker, "MAX_RUNS", 3)
    for run in range(5):
        tracker.run_started(str(run))
    assert [bool(tracker.run_ended(str(run))) for run in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
