"""A live run's rest, and its forecast where nobody announces anything."""

from __future__ import annotations

import pytest
from workflows.story import LOOP, Story

from maestro_agents.protocol import END, Announcement, CallIdentity, Successor
from maestro_backend import scheduler as core
from maestro_backend.gateway._records import run_view
from maestro_backend.predictor import CallOutcome, CallShape


class Calls:
    """Tells a book of calls alone: no graph, no events, no announcement."""

    def __init__(self, workflow: str | None = "app", story: Story | None = None) -> None:
        self.book = (story or Story(None)).book
        self.workflow = workflow

    def arrive(
        self,
        stage: str,
        at: float,
        run: str,
        instance: int = 0,
        announcement: Announcement | None = None,
        named: bool = True,
    ) -> tuple[list[core.Event], float | None]:
        identity = self._identity(stage if named else None, run, instance)
        shape = CallShape("m", self.workflow or "", stage if named else "", stage)
        return self.book.call_arrived(identity, announcement, shape, None, at)

    def end(
        self,
        stage: str,
        at: float,
        run: str,
        instance: int = 0,
        tokens: int = 100,
        prompt: int = 1_000,
        named: bool = True,
    ) -> list[core.Event]:
        identity = self._identity(stage if named else None, run, instance)
        outcome = CallOutcome(prompt, tokens, finish="stop")
        return self.book.call_ended(identity, at, outcome, stage)

    def run(self, run: str, at: float, *stages: str, named: bool = True, over: bool = True) -> None:
        """A run of calls, 1 s each and 3 s apart; it ends by falling silent."""
        for number, stage in enumerate(stages):
            self.arrive(stage, at + 4 * number, run, number, named=named)
            prompt = 1_000 + 100 * number
            self.end(stage, at + 4 * number + 1, run, number, prompt=prompt, named=named)

    def foreseen(self, run: str) -> dict[str, float]:
        return {call.stage: call.probability for call in self.book.runs[run].forecast}

    def _identity(self, stage: str | None, run: str, instance: int) -> CallIdentity:
        return CallIdentity(run=run, workflow=self.workflow, stage=stage, instance=instance)


@pytest.mark.parametrize("workflow", ["app@1", None])
@pytest.mark.parametrize("named", [True, False])
def test_without_any_announcement_the_second_run_is_foreseen(
    workflow: str | None, named: bool
) -> None:
    calls = Calls(workflow)
    calls.run("first", 0.0, "plan", "write", "judge", named=named)
    assert [lead for _, lead in calls.book.runs["first"].lead_times_s] == [None, None, None]
    events, _ = calls.arrive("plan", 100.0, "second", named=named)
    assert any(isinstance(e, core.ForecastChanged) and e.calls for e in events)
    assert max(calls.foreseen("second"), key=lambda s: calls.foreseen("second")[s]) == "write"
    calls.end("plan", 101.0, "second", named=named)
    _, lead_s = calls.arrive("write", 104.0, "second", 1, named=named)
    assert lead_s == 4.0


def test_another_version_of_the_workflow_is_the_same_app() -> None:
    calls = Calls("app@1")
    calls.run("first", 0.0, "plan", "write")
    calls.workflow = "app@2"
    calls.arrive("plan", 100.0, "second")
    assert calls.foreseen("second")["write"] > 0.5


def test_the_forecast_knows_gaps_and_growing_prompts() -> None:
    calls = Calls()
    for number in range(3):
        calls.run(f"r{number}", 100.0 * number, "a", "b", "a", "b")
    calls.arrive("a", 900.0, "now")
    calls.end("a", 901.0, "now", prompt=2_000)
    calls.arrive("b", 904.0, "now", 1)
    again = next(c for c in calls.book.runs["now"].forecast if c.stage == "a")
    assert again.earliest_start_s == 3.0
    assert again.prompt_tokens == 2_200, "its last prompt, and as much more as before"


def test_what_is_announced_as_certain_overrides_what_was_learned() -> None:
    calls = Calls()
    for number in range(5):
        calls.run(f"r{number}", 100.0 * number, "plan", "write")
    said = Announcement(successors=(Successor(stage="ask", certain=True, width=3),))
    calls.arrive("plan", 900.0, "now", announcement=said)
    assert calls.foreseen("now")["ask"] == 1.0 and "write" not in calls.foreseen("now")
    calls.end("plan", 901.0, "now")
    forecast = calls.book.runs["now"].forecast
    assert [c.probability for c in forecast if c.stage == "ask"] == [1.0] * 3


def test_announced_candidates_keep_their_learned_odds() -> None:
    calls = Calls()
    for number in range(8):
        calls.run(f"r{number}", 100.0 * number, "plan", "write")
    said = Announcement(successors=(Successor(stage="ask"), Successor(stage="write")))
    calls.arrive("plan", 1_900.0, "now", announcement=said)
    odds = calls.book.next_of("now", "plan")
    assert odds["write"] > 0.7 > 0.3 > odds["ask"]


def test_a_run_tells_what_is_left_of_it() -> None:
    calls = Calls()
    for number in range(8):
        calls.run(f"r{number}", 100.0 * number, "a", "b", "c", "d")
    rests = []
    for number, stage in enumerate("abcd"):
        events, _ = calls.arrive(stage, 2_000.0 + 4 * number, "now", number)
        rest = calls.book.runs["now"].rest
        assert rest is not None and rest.p90 >= rest.p50
        assert [e.rest for e in events if isinstance(e, core.ForecastChanged)] == [rest]
        rests.append(rest)
        calls.end(stage, 2_001.0 + 4 * number, "now", number)
    future = [rest.p50 - 256 for rest in rests]  # the call itself: 256, nothing is known of it
    assert future == pytest.approx([300, 200, 100, 0], rel=0.25, abs=30)
    assert [round(rest.calls) for rest in rests] == [3, 2, 1, 0]
    view = run_view(calls.book.runs["now"], [])
    assert view["rest"]["p50"] == pytest.approx(0, abs=20)


def test_parallel_calls_are_not_each_others_past() -> None:
    calls = Calls()
    for run in ("r1", "r2"):
        calls.run(run, 0.0, "plan")
        for instance in range(3):
            calls.arrive("work", 5.0, run, instance)
        for instance in range(3):
            calls.end("work", 6.0 + instance, run, instance, tokens=10 * instance + 10)
        calls.arrive("join", 10.0, run)
        calls.end("join", 11.0, run, tokens=7)
    log = calls.book.runs["r2"].log
    made = log.examples("r2", "app").calls
    assert [c.parents for c in made] == [(), (0,), (0,), (0,), (1, 2, 3)]
    assert made[-1].shape.gap_s == 2.0


def test_a_failed_call_that_is_tried_again_is_one_call() -> None:
    calls = Calls()
    calls.arrive("a", 0.0, "r")
    calls.book.call_ended(CallIdentity(run="r", workflow="app", stage="a"), 1.0)
    calls.arrive("a", 2.0, "r")
    calls.end("a", 3.0, "r")
    calls.arrive("b", 4.0, "r")
    calls.end("b", 5.0, "r")
    made = calls.book.runs["r"].log.examples("r", "app").calls
    assert [(c.shape.stage, c.parents) for c in made] == [("a", ()), ("b", (0,))]


def test_a_failed_run_teaches_no_end() -> None:
    story = Story(None)
    calls = Calls(story.workflow, story)
    for number in range(3):
        calls.run(f"r{number}", 100.0 * number, "a", "b", "c")
    odds = dict(calls.book.outlook.journeys.branches.usual("team", "b", 1))
    calls.arrive("a", 900.0, "bad")
    calls.end("a", 901.0, "bad")
    calls.arrive("b", 902.0, "bad")
    calls.end("b", 903.0, "bad")
    calls.book.outlook.over(calls.book.runs["bad"], failed=True)
    assert calls.book.outlook.journeys.branches.usual("team", "b", 1) == odds


def test_an_announced_graph_tells_the_rest_before_any_run_was_seen() -> None:
    story = Story(LOOP)
    story.begin(0.0)
    start = story.book.runs["r"].rest
    story.enter("plan", 1.0)
    story.call("plan", 1.0)
    planning = story.book.runs["r"].rest
    story.call("write", 2.0)
    assert start is not None and planning is not None
    assert start.calls >= 3 and start.p50 >= 3 * 200, "plan, write, judge at 256 tokens each"
    assert planning.p50 == pytest.approx(start.p50, rel=0.5)


def test_a_certain_end_leaves_only_the_call_itself() -> None:
    story = Story(LOOP)
    calls = Calls(LOOP.id, story)
    calls.arrive(
        "judge",
        1.0,
        "r",
        announcement=Announcement(successors=(Successor(stage=END, certain=True),)),
    )
    rest = story.book.runs["r"].rest
    assert rest == core.Rest(256.0, 512.0, 0.0)


def test_the_event_with_a_rest_survives_the_recorder() -> None:
    event = core.ForecastChanged("r", (), core.Rest(10.0, 20.0, 2.5))
    assert core.decode_event(core.encode(event)) == event
    old = {"type": "ForecastChanged", "run": "r", "calls": ()}
    assert core.decode_event(old) == core.ForecastChanged("r", ())
