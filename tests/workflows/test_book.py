"""A run followed from its messages: forecasts, lead times, what never came."""

from __future__ import annotations

import pytest
from workflows.story import Story

from maestro_agents.protocol import (
    Announcement,
    CallIdentity,
    Join,
    Slo,
    Stage,
    Successor,
    Workflow,
)
from maestro_backend import scheduler as core


def test_a_run_foresees_its_whole_graph_from_the_start() -> None:
    story = Story()
    started, changed = story.begin(0.0)
    assert isinstance(started, core.RunStarted) and started.deadline_s == 120.0
    assert isinstance(changed, core.ForecastChanged)
    assert story.foreseen() == {"plan": 1.0, "tool": 1.0, "write": 1.0, "judge": 1.0}


def test_lead_time_counts_from_the_moment_a_stage_was_likely() -> None:
    story = Story()
    story.begin(0.0)
    story.enter("plan", 1.0)
    assert story.call("plan", 1.0) == 1.0
    story.leave("plan", 3.0)
    story.enter("tool", 3.0)
    story.leave("tool", 4.0)
    assert story.call("write", 4.5) == 4.5
    assert story.call("judge", 7.0) == 7.0


def test_a_call_that_nobody_foresaw_has_no_lead_time() -> None:
    story = Story()
    assert story.call("write", 5.0) is None
    assert story.book.runs["r"].lead_times_s == [("write", None)]


def test_a_second_round_counts_from_its_own_routing() -> None:
    story = Story()
    for number in range(2):
        story.whole_run(f"teaches that one round is enough {number}")
    story.begin(0.0)
    for at, stage in ((1.0, "write"), (2.0, "judge")):
        story.enter(stage, at)
        story.call(stage, at)
        story.hang_up(stage, at + 0.5)
        story.leave(stage, at + 0.5, *(("write",) if stage == "judge" else ()))
    lead_s = story.call("write", 4.0)
    assert lead_s is not None and lead_s <= 2.5


def test_a_tool_stage_is_no_broken_promise_and_is_learned() -> None:
    story = Story()
    story.whole_run("first")
    first = story.book.runs["first"]
    assert first.announced_never_made == 2, "judge -> write -> judge at P = 0.5, but it ended"
    story.begin(10.0, "second")
    assert "tool" not in story.foreseen("second")
    assert story.foreseen("second").keys() == {"plan", "write", "judge"}


def test_what_routing_teaches_lowers_the_promise() -> None:
    story = Story()
    for number in range(4):
        story.whole_run(f"r{number}")
    assert story.book.runs["r3"].announced_never_made == 0


def test_a_run_that_ends_early_leaves_its_promises_unkept() -> None:
    story = Story()
    story.begin(0.0)
    story.enter("plan", 1.0)
    story.call("plan", 1.0)
    story.end(2.0)
    never = ("tool", "write", "judge", "write again, at P = 0.5", "judge again")
    assert story.book.runs["r"].announced_never_made == len(never)


def test_a_late_stage_end_does_not_announce_what_has_begun() -> None:
    story = Story()
    story.begin(0.0)
    story.enter("plan", 1.0)
    story.call("plan", 1.0)
    story.call("write", 2.0)
    story.leave("plan", 2.1, "write")
    assert story.foreseen() == {"judge": 1.0, "write": 0.5}, "write has begun: it may come again"


def test_headers_alone_advance_the_run_at_each_call() -> None:
    story = Story()
    story.call("plan", 1.0)
    story.hang_up("plan", 2.0)
    assert set(story.foreseen()) >= {"write", "judge"}
    lead_s = story.call("write", 3.0)
    assert lead_s is not None and 0 < lead_s <= 2.0


def test_headers_alone_teach_which_stage_never_calls() -> None:
    story = Story()
    for number in range(2):
        for at, stage in enumerate(("plan", "write", "judge"), start=1):
            story.call(stage, at, f"r{number}")
            story.hang_up(stage, at + 0.5, f"r{number}")
        story.end(9.0, f"r{number}")
    story.begin(10.0, "next")
    assert "tool" not in story.foreseen("next")


def test_a_run_that_is_first_seen_in_its_middle_does_not_expect_its_beginning() -> None:
    story = Story()
    story.call("judge", 1.0)
    assert story.foreseen() == {"write": 0.5, "judge": 0.5}


def test_an_unregistered_workflow_is_known_from_its_announcements() -> None:
    story = Story(workflow=None)
    announcement = Announcement(successors=(Successor(stage="next", certain=True),))
    story.call("first", 1.0, announcement=announcement)
    assert story.foreseen() == {"next": 1.0}
    assert story.call("next", 2.5) == 1.5


def test_a_narrowed_announcement_beats_the_graph() -> None:
    story = Story()
    narrowed = Announcement(successors=(Successor(stage="write", certain=True),))
    story.call("judge", 1.0, announcement=narrowed)
    assert story.foreseen()["write"] == 1.0


def test_a_join_is_told_with_its_sources() -> None:
    join = Workflow(
        name="j",
        stages=(Stage(path="a"), Stage(path="b"), Stage(path="c")),
        joins=(Join(sources=("a", "b"), target="c"),),
    )
    story = Story(join)
    identity = CallIdentity(run="r", workflow=join.id, stage="c")
    assert story.book.waits_for(identity) == ("a", "b")
    assert story.book.waits_for(CallIdentity(run="r", workflow=join.id, stage="a")) == ()


@pytest.mark.parametrize(
    ("slo", "deadline_s"),
    [
        (Slo(class_="interactive"), 20.0),
        (Slo(class_="interactive", deadline_s=1.0), 20.0),
        (Slo(class_="interactive", deadline_s=60.0), 60.0),
        (Slo(class_="batch", deadline_s=1.0), None),
        (Slo(class_="never-heard-of"), 120.0),
    ],
)
def test_no_client_claims_a_deadline_tighter_than_its_class(
    slo: Slo, deadline_s: float | None
) -> None:
    assert Story().book.deadline_s(slo) == deadline_s
