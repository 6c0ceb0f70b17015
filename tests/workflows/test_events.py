"""What events tell beyond the graph, and calls that come before the events that lead to them."""

from __future__ import annotations

import pytest
from workflows.story import LOOP, Story

from maestro_agents.protocol import (
    END,
    START,
    Edge,
    RunEnded,
    RunPaused,
    RunResumed,
    RunStarted,
    Stage,
    StageEnded,
    StageStarted,
    Successor,
    ToolsRequested,
    Workflow,
)
from maestro_backend import scheduler as core

MAP = Workflow(
    name="map",
    stages=tuple(Stage(path=path) for path in ("plan", "work/ask", "work/sum", "write")),
    edges=(
        Edge(source=START, target="plan"),
        Edge(source="plan", target="work/ask", candidate=True),
        Edge(source="plan", target="write", candidate=True),
        Edge(source="work/ask", target="work/sum"),
        Edge(source="work/sum", target="write"),
    ),
)


def expected(story: Story, stage: str, run: str = "r") -> list[float]:
    return [c.probability for c in story.book.runs[run].forecast if c.stage == stage]


def fan_out(story: Story, width: int, run: str = "r") -> None:
    following = (Successor(stage="work/ask", certain=True, width=width),)
    story.book.run_event(run, StageEnded(stage="plan", next=following), 1.0)


def test_each_instance_of_a_fan_out_is_a_call() -> None:
    story = Story(MAP)
    story.begin(0.0)
    story.enter("plan", 0.0)
    story.call("plan", 0.0)
    fan_out(story, 3)
    assert expected(story, "work/ask") == expected(story, "work/sum") == [1.0] * 3
    assert expected(story, "write") == [1.0]
    for instance, lead_s in enumerate((2.0, 1.0, 1.0)):  # the first at P = 0.5 from the start
        story.enter("work/ask", 2.0)
        assert story.call("work/ask", 2.0, instance=instance) == lead_s
        assert len(expected(story, "work/ask")) == 2 - instance
    story.leave("work/ask", 3.0)
    story.enter("work/sum", 3.0)
    assert story.call("work/sum", 3.0) is not None
    assert expected(story, "work/sum") == [1.0] * 2, "the others are still asking"


def test_calls_that_overtake_their_events_are_not_expected_again() -> None:
    story = Story(MAP)
    story.begin(0.0)
    story.enter("plan", 0.0)
    story.call("plan", 0.0)
    for instance in range(2):
        story.call("work/ask", 1.0, instance=instance)
    assert expected(story, "work/ask") == []
    fan_out(story, 3)
    assert expected(story, "work/ask") == [1.0], "the third"
    for _ in range(3):
        story.enter("work/ask", 2.0)
    assert expected(story, "work/ask") == [1.0]
    assert story.book.runs["r"].announced_never_made == 0


def test_how_wide_it_was_is_what_to_expect_of_the_next_run() -> None:
    story = Story(MAP)
    for run in ("r0", "r1", "r2"):
        story.begin(0.0, run)
        story.enter("plan", 0.0, run)
        story.call("plan", 0.0, run)
        fan_out(story, 2, run)
        story.end(5.0, run)
    story.begin(6.0, "next")
    assert expected(story, "work/ask", "next") == pytest.approx([0.8, 0.8 * 3 / 4])


def test_a_call_before_its_runs_first_event_is_not_foreseen_once_more() -> None:
    story = Story()
    story.call("plan", 0.0)
    story.hang_up("plan", 1.0)
    story.begin(2.0)
    assert expected(story, "plan") == []
    story.enter("plan", 2.0)
    assert story.foreseen().keys() == {"tool", "write", "judge"}


def test_a_completion_that_asked_for_tools_brings_the_stage_back() -> None:
    story = Story(Workflow(name="w", stages=(Stage(path="agent"),)))
    story.begin(0.0)
    story.enter("agent", 0.0)
    story.call("agent", 0.0)
    assert story.foreseen() == {}
    story.book.run_event("r", ToolsRequested(stage="agent", tools=("search",)), 1.0)
    assert 0.5 < story.foreseen()["agent"] < 1.0
    assert story.call("agent", 3.0, instance=1) == 2.0
    assert story.foreseen() == {}


def test_a_routed_end_outdoes_a_request_for_tools() -> None:
    story = Story()
    story.begin(0.0)
    story.enter("plan", 0.0)
    story.call("plan", 0.0)
    story.book.run_event("r", ToolsRequested(stage="plan", tools=("hand_over",)), 1.0)
    assert "plan" in story.foreseen()
    story.leave("plan", 2.0, "tool")
    assert "plan" not in story.foreseen()


def test_an_unseen_choice_is_learned_from_what_begins_next() -> None:
    story = Story()
    for number in range(8):
        run = f"r{number}"
        story.begin(0.0, run)
        for stage in ("plan", "tool", "write", "judge"):
            story.enter(stage, 1.0, run)
            story.call(stage, 1.0, run)
            story.hang_up(stage, 2.0, run)
            story.leave(stage, 2.0, run=run)
        story.end(3.0, run)
    story.begin(9.0, "next")
    assert story.book.next_of("next", "judge")[END] > 0.8


def test_a_stage_that_calls_twice_is_expected_to_call_twice() -> None:
    story = Story(
        Workflow(name="w", stages=(Stage(path="s"),), edges=(Edge(source=START, target="s"),))
    )
    for number in range(12):
        run = f"r{number}"
        story.begin(0.0, run)
        story.enter("s", 0.0, run)
        for instance in range(2):
            story.call("s", 1.0, run, instance=instance)
        story.leave("s", 2.0, run=run)
        story.end(3.0, run)
    story.begin(4.0, "next")
    assert expected(story, "s", "next") == [1.0, pytest.approx(11 / 12)]
    story.enter("s", 4.0, "next")
    story.call("s", 5.0, "next")
    assert expected(story, "s", "next") == [pytest.approx(11 / 12)]


def test_a_task_that_is_tried_again_is_no_further_visit() -> None:
    story = Story()
    story.begin(0.0)
    for attempt in range(2):
        story.book.run_event("r", StageStarted(stage="plan", attempt=attempt), 1.0)
        story.call("plan", 1.0, instance=attempt)
        story.book.run_event("r", StageEnded(stage="plan", failed=attempt == 0), 2.0)
    assert story.book.runs["r"].position.visits["plan"] == 1
    assert story.foreseen().keys() == {"tool", "write", "judge"}


def test_a_paused_run_starts_its_stage_anew() -> None:
    story = Story()
    story.begin(0.0)
    story.enter("plan", 0.0)
    story.book.run_event("r", RunPaused(), 1.0)
    assert story.foreseen()["plan"] == 1.0
    story.book.run_event("r", RunResumed(), 9.0)
    story.enter("plan", 9.0)
    assert story.call("plan", 9.0) is not None


def test_calls_before_a_pause_do_not_make_a_stage_one_that_calls_several_times() -> None:
    story = Story()
    for number in range(3):
        run = f"r{number}"
        story.begin(0.0, run)
        story.enter("plan", 0.0, run)
        story.call("plan", 0.0, run)
        story.book.run_event(run, RunPaused(), 1.0)
        story.enter("plan", 9.0, run)
        story.call("plan", 9.0, run, instance=1)
        story.leave("plan", 9.0, run=run)
        story.end(10.0, run)
    story.begin(11.0, "next")
    assert expected(story, "plan", "next") == [1.0]


def test_a_run_that_failed_teaches_nothing_of_where_it_would_have_ended() -> None:
    story = Story()
    for number in range(5):
        story.begin(0.0, f"r{number}")
        story.enter("judge", 0.0, f"r{number}")
        story.leave("judge", 1.0, run=f"r{number}")
        story.book.run_event(f"r{number}", RunEnded(failed=True), 2.0)
    story.begin(3.0, "next")
    assert story.book.next_of("next", "judge") == {"write": 0.5, END: 0.5}


@pytest.mark.parametrize(
    ("conversation", "workflow", "ends"),
    [
        ("c", LOOP.id, True),
        ("other", LOOP.id, False),
        ("c", "other@1", False),
        (None, LOOP.id, False),
    ],
)
def test_a_conversation_that_goes_on_gives_up_its_paused_runs(
    conversation: str | None, workflow: str, ends: bool
) -> None:
    story = Story()
    story.book.run_event("old", RunStarted(workflow=LOOP.id, conversation="c"), 0.0)
    story.book.run_event("old", RunPaused(), 1.0)
    started = RunStarted(workflow=workflow, conversation=conversation)
    told = story.book.run_event("new", started, 2.0)
    assert (core.RunEnded("old") in told) is ends
    assert (story.book.runs["old"].ended is not None) is ends
    assert story.book.runs["new"].ended is None


def test_a_run_that_went_on_is_not_given_up() -> None:
    story = Story()
    started = RunStarted(workflow=LOOP.id, conversation="c")
    for event in (started, RunPaused(), RunResumed()):
        story.book.run_event("old", event, 0.0)
    told = story.book.run_event("new", started, 2.0)
    assert core.RunEnded("old") not in told
