"""The scorer itself, on journals written by hand."""

from __future__ import annotations

from math import log

import pytest

from maestro_agents.protocol import END, Edge, Stage, Workflow
from maestro_backend.evaluation import Arrived, Began, Believed, Entry, Score, Stepped, score

TRUTH = Workflow(
    name="loop",
    stages=(Stage(path="a"), Stage(path="b")),
    edges=(
        Edge(source="a", target="b"),
        Edge(source="b", target="a", candidate=True),
        Edge(source="b", target=END, candidate=True),
    ),
)


def believed(**calls: float) -> Believed:
    return Believed("r", 0.0, tuple(calls.items()))


def called(stage: str, lead_s: float | None = None) -> Arrived:
    return Arrived("r", 0.0, stage, lead_s)


def stepped(stage: str, *chosen: str, **chances: float) -> Stepped:
    return Stepped("r", 0.0, stage, chances, chosen or None)


def judge(*entries: Entry) -> Score:
    return score(entries, TRUTH)


def test_the_first_call_of_a_run_need_not_be_expected() -> None:
    found = judge(called("a"))
    assert (found.calls, found.later_calls, found.coverage) == (1, 0, 1.0)


def test_what_is_said_after_a_call_does_not_count_for_it() -> None:
    assert judge(called("a"), called("b"), believed(b=1.0)).uncovered == ("b",)
    assert judge(called("a"), believed(b=1.0), called("b")).coverage == 1.0


def test_that_a_stage_has_begun_is_no_announcement() -> None:
    begun = (called("a"), Began("r", 0.0, "b"), believed(b=1.0), called("b"))
    found = judge(*begun)
    assert (found.uncovered, found.promises) == (("b",), 0)
    assert judge(begun[0], believed(b=1.0), *begun[1:]).coverage == 1.0


def test_a_call_may_come_before_its_stage_is_heard_to_begin() -> None:
    found = judge(
        called("a"), believed(b=1.0), called("b"), Began("r", 0.0, "b"), called("b"), called("b")
    )
    assert found.uncovered == ("b", "b")


def test_one_announcement_serves_one_call() -> None:
    assert judge(called("a"), believed(b=1.0), called("b"), called("b")).uncovered == ("b",)
    twice = Believed("r", 0.0, (("b", 1.0), ("b", 1.0)))
    found = judge(called("a"), twice, called("b"), believed(b=1.0), called("b"))
    assert (found.coverage, found.promises, found.broken) == (1.0, 2, 0)


def test_a_candidate_covers_but_promises_nothing() -> None:
    found = judge(called("a"), believed(b=0.1), called("b"))
    assert (found.coverage, found.promises) == (1.0, 0)


def test_a_promise_that_nobody_keeps_is_broken() -> None:
    found = judge(called("a"), believed(a=1.0, b=1.0), called("b"), believed(a=1.0), believed())
    assert (found.promises, found.never_came) == (2, ("a",))
    assert found.broken_share == 0.5


def test_a_promise_given_anew_is_a_promise_of_its_own() -> None:
    found = judge(called("a"), believed(b=1.0), believed(), believed(b=1.0), called("b"))
    assert (found.promises, found.broken) == (2, 0)
    found = judge(called("a"), believed(b=1.0), called("b"), believed(b=1.0))
    assert (found.promises, found.broken) == (2, 1)


def test_an_execution_without_a_call_leaves_none_due() -> None:
    found = judge(
        called("a"), Began("r", 0.0, "b"), stepped("b"), believed(b=1.0), called("b"), believed()
    )
    assert (found.coverage, found.promises, found.broken) == (1.0, 1, 0)


def test_choices_are_scored_against_one_who_knows_the_candidates() -> None:
    found = judge(
        stepped("a", "b", b=1.0),
        stepped("b", "a", a=0.75, **{END: 0.25}),
        stepped("b", END, a=0.75, **{END: 0.25}),
    )
    assert (found.choices["a"].loss, found.choices["a"].uniform, found.sure_share) == (
        0.0,
        0.0,
        1.0,
    )
    choice = found.choices["b"]
    assert choice.loss == pytest.approx((-log(0.75) - log(0.25)) / 2)
    assert choice.uniform == pytest.approx(log(2))
    assert found.calibration == pytest.approx(0.25)


def test_where_nobody_says_what_was_chosen_the_next_calls_do() -> None:
    on = judge(Stepped("r", 0.0, "b", {"a": 1.0}, None), called("b"), called("a"))
    assert on.choices["b"].loss == 0.0
    over = judge(Stepped("r", 0.0, "b", {"a": 1.0}, None), called("b"))
    assert over.choices["b"].loss > 5.0, "it ended, against all belief"


def test_who_believes_everything_has_little_belief_in_each() -> None:
    sure = judge(stepped("b", "a", a=1.0, b=1.0, **{END: 1.0}))
    assert sure.choices["b"].loss == pytest.approx(log(3))
    spread_out = judge(stepped("a", "b", a=1.0, b=1.0))
    assert spread_out.choices["a"].loss == pytest.approx(log(2))
    assert spread_out.sure_share == 0.0


def test_lead_times_are_by_stage() -> None:
    found = judge(called("a"), *(called("b", lead_s=n / 10) for n in range(11)))
    assert found.lead_s.keys() == {"b"}
    assert found.lead_quantiles("b") == pytest.approx((0.1, 0.5, 0.9))
    assert judge(called("b", 0.5)).lead_quantiles("b") == (0.5, 0.5, 0.5)


def test_faults_say_what_is_wrong() -> None:
    assert judge(called("a"), believed(b=1.0), called("b")).faults() == ()
    found = judge(
        called("a"),
        called("b"),
        believed(b=1.0),
        stepped("b", "a", a=0.01, **{END: 0.99}),
        stepped("a", "b", b=0.5),
    )
    unannounced, never, doubt, total, *stages = found.faults()
    assert "unannounced: ['b']" in unannounced
    assert "never came: ['b']" in never
    assert "0% of the time" in doubt
    assert "all in all" in total
    assert [fault.split()[1] for fault in stages] == ["a", "b"]
