"""Calls and what is kept of them: retries, runs that go on after their end, bounds."""

from __future__ import annotations

from collections.abc import Sized

import pytest
from workflows.story import Story

from maestro_agents.protocol import CallIdentity, Edge, Stage, Workflow
from maestro_backend.predictor import CallShape
from maestro_backend.scheduler import RunStarted
from maestro_backend.workflows import Run


@pytest.mark.parametrize("instance", [0, 3])
@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_retry_has_the_lead_time_of_its_first_attempt(instance: int, hangs_up: bool) -> None:
    story = Story()
    story.begin(0.0)
    assert story.call("plan", 2.0, instance=instance) == 2.0
    if hangs_up:
        story.hang_up("plan", 3.0)
    assert story.call("plan", 4.0, instance=instance) == 2.0
    assert story.book.runs["r"].lead_times_s == [("plan", 2.0)]


def test_a_retry_after_an_unforeseen_call_is_no_second_one() -> None:
    story = Story(None)
    for at in (1.0, 2.0):
        assert story.call("s", at, instance=1) is None
    assert story.book.runs["r"].lead_times_s == [("s", None)]


def test_another_instance_is_no_retry() -> None:
    story = Story(None)
    for instance in range(3):
        story.call("s", 1.0, instance=instance)
    assert len(story.book.runs["r"].lead_times_s) == 3


def test_each_attempt_that_ends_frees_the_stage_once() -> None:
    story = Story()
    for _ in range(2):
        story.call("plan", 1.0)
    story.hang_up("plan", 2.0)
    assert story.book.runs["r"].live("plan")
    for _ in range(2):  # one end more than there were calls
        story.hang_up("plan", 3.0)
    assert not story.book.runs["r"].live("plan")
    story.call("plan", 4.0, instance=1)
    assert story.book.runs["r"].live("plan")


def test_a_call_after_the_end_starts_the_run_anew() -> None:
    story = Story()
    story.whole_run("r")
    identity = CallIdentity(run="r", workflow=story.workflow, stage="plan")
    events, lead_s = story.book.call_arrived(identity, None, CallShape("m"), None, 20.0)
    run = story.book.runs["r"]
    assert (run.ended, run.started, run.announced_never_made) == (None, 20.0, 0)
    assert (lead_s, run.lead_times_s) == (None, [("plan", None)])
    assert RunStarted("r", story.workflow, "standard", 120.0) in events
    assert story.foreseen().keys() == {"write", "judge"}
    story.hang_up("plan", 21.0)
    assert story.call("write", 22.0) == 2.0


def test_a_run_that_begins_again_forgets_what_it_was() -> None:
    story = Story()
    story.whole_run("r")
    story.begin(20.0)
    assert story.book.runs["r"].started == 20.0
    assert story.call("plan", 21.0) == 1.0


def test_a_late_event_does_not_wake_a_run() -> None:
    story = Story()
    story.whole_run("r")
    story.enter("plan", 10.0)
    story.leave("plan", 10.0)
    run = story.book.runs["r"]
    assert (run.ended, run.forecast, run.live("plan")) == (9, (), False)


def test_a_call_still_open_when_the_run_ends_can_end_later() -> None:
    story = Story()
    story.call("write", 0.0)
    story.end(1.0)
    story.call("plan", 2.0)
    story.hang_up("write", 3.0)
    run = story.book.runs["r"]
    assert (run.live("write"), run.live("plan")) == (False, True)


def sizes(run: Run) -> dict[str, int]:
    kept = {name: getattr(run, name) for name in run.__slots__}
    kept |= {name: getattr(run.position, name) for name in run.position.__slots__}
    return {name: len(value) for name, value in kept.items() if isinstance(value, Sized)}


def test_a_run_keeps_no_more_than_its_last_thousand_calls() -> None:
    story = Story(None)
    for number in range(1_100):
        story.call(f"s{number}", number)
        story.hang_up(f"s{number}", number)
    run = story.book.runs["r"]
    assert run.lead_times_s[-1][0] == "s1099"
    assert max(sizes(run).values()) == 1_000
    assert run.calling == {}


def test_a_run_keeps_no_more_than_a_thousand_open_stages() -> None:
    story = Story(None)
    for number in range(1_010):
        story.enter(f"never ends {number}", 0.0)
    story.leave("x", 1.0, *(f"never begins {number}" for number in range(1_010)))
    assert max(sizes(story.book.runs["r"]).values()) == 1_000
    assert len(story.book.runs["r"].position.pending) == 256


def test_a_client_with_ever_new_names_is_forgotten_not_remembered() -> None:
    story = Story(None)
    for number in range(10_050):
        name = f"n{number}"
        shape = CallShape("m", name, name)
        identity = CallIdentity(run=name, workflow=name, stage=name)
        story.book.call_arrived(identity, None, shape, None, 0.0)
    assert len(story.book.runs) == 10_000
    assert "n0" not in story.book.runs and "n10049" in story.book.runs


def test_what_was_learned_of_the_oldest_stage_goes_first() -> None:
    graph = Workflow(
        name="w",
        stages=(Stage(path="a"), Stage(path="tool", calls=False)),
        edges=(Edge(source="a", target="tool"),),
    )
    story = Story(graph)
    story.call("tool", 0.0, "teaches")
    story.call("a", 1.0, "knows")
    assert story.foreseen("knows") == {"tool": 1.0}
    for number in range(10_001):
        story.call(f"n{number}", 2.0, f"r{number}")
    story.call("a", 3.0, "forgot")
    assert story.foreseen("forgot") == {}
