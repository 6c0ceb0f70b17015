"""What finished runs teach of branches, loops, fan-outs, gaps, growth and remaining work."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from workflows.recorded import call, chain

from maestro_agents.protocol import END
from maestro_backend.evaluation import Forecaster, foresee, futures_summary, kendall_tau
from maestro_backend.predictor import CallOutcome, CallShape, RunExamples
from maestro_backend.workflows import NEW, Journey, Journeys, steps


def past(*stages: str, finish: str = "") -> Journey:
    journey = Journey()
    for stage in stages:
        journey.add(CallShape("m", "app", stage, stage), CallOutcome(10, 100, finish=finish))
    return journey


def taught(*runs: RunExamples) -> Journeys:
    journeys = Journeys()
    for run in runs:
        journeys.learn(run)
    return journeys


def test_a_branch_is_learned_from_one_run_and_surer_after_more() -> None:
    once = taught(chain("plan", "write", "judge")).odds("app", past("plan"))
    often = taught(*[chain("plan", "write", "judge")] * 9).odds("app", past("plan"))
    assert sum(once.values()) == pytest.approx(1.0)
    known = [once[stage] for stage in ("plan", "judge", END)]
    assert once["write"] > 2 * max(known), "the most likely of what is known"
    assert often["write"] > max(0.85, once["write"])
    assert min(often[END], often[NEW]) > 0


def test_a_loop_ends_after_as_many_rounds_as_it_did() -> None:
    journeys = taught(*[chain(*["write", "judge"] * 3, "publish")] * 12)
    for rounds, following in ((1, "write"), (2, "write"), (3, "publish")):
        odds = journeys.odds("app", past(*["write", "judge"] * rounds))
        assert max(odds, key=lambda s: odds[s]) == following and odds[following] > 0.5


def test_a_call_that_asked_for_tools_leads_elsewhere_than_one_that_did_not() -> None:
    def run(*finishes: str) -> RunExamples:
        stages = ["agent", *("agent" if f == "tool_calls" else "user" for f in finishes[:-1])]
        calls = [
            call(s, at, *([at - 1] if at else []), finish=f)
            for at, (s, f) in enumerate(zip(stages, finishes, strict=True))
        ]
        return RunExamples("here", "r", tuple(calls))

    journeys = taught(*[run("tool_calls", "stop", "stop"), run("stop", "stop")] * 12)
    asked = journeys.odds("app", past("agent", finish="tool_calls"))
    silent = journeys.odds("app", past("agent", finish="stop"))
    assert asked["agent"] > 0.7 > 0.3 > asked["user"]
    assert silent["user"] > 0.5 > silent["agent"]


def test_the_longest_of_parallel_branches_counts_and_a_join_waits_for_it() -> None:
    run = RunExamples(
        "here",
        "r",
        (
            call("plan", 0, tokens=10),
            call("work", 1, 0, tokens=20),
            call("work", 2, 0, tokens=70),
            call("work", 3, 0, tokens=30),
            call("join", 4, 1, 2, 3, tokens=5),
        ),
    )
    found = list(steps(run))
    assert [(s.tokens, s.calls) for s in found] == [(75, 2), (5, 1), (5, 1), (5, 1), (0, 0)]
    assert [s.chosen for s in found] == [("work",), ("join",), ("join",), ("join",), (END,)]
    assert [s.before.calls for s in found] == [0, 1, 1, 1, 4], "no sibling is past"
    journeys = taught(*(RunExamples("here", str(n), run.calls) for n in range(40)))
    assert journeys.widths.further(("app", "plan", "work")) == pytest.approx((40 / 41, 40 / 41))
    future = journeys.future("app", run.calls[0].shape, Journey())
    assert future.p50 == pytest.approx(75, rel=0.15) and future.calls == pytest.approx(2, rel=0.2)


def test_gaps_and_growth_are_medians_with_back_off() -> None:
    journeys = taught(chain("a", "b", "a", "b", "a"))
    assert journeys.gap_s("app@1", "a", "b") == 2.0
    assert journeys.gap_s("app", "never seen", "b") == 2.0
    assert journeys.growth_tokens("app", "a", "a") == 100
    assert journeys.gap_s("another app", "a", "b") == journeys.growth_tokens("x", "a") == 0.0


def test_remaining_tokens_fall_as_a_run_goes_on() -> None:
    journeys = taught(*[chain("a", "b", "c", "d", run=str(n)) for n in range(8)])
    rest = [
        journeys.future("app", CallShape("m", "app", s, s), past(*before)).p50
        for s, before in (("a", ""), ("b", "a"), ("c", "ab"), ("d", "abc"))
    ]
    assert rest == pytest.approx([300, 200, 100, 0], rel=0.15)


def test_habits_that_changed_are_forgotten() -> None:
    journeys = taught(*[chain("a", "b", run=str(n)) for n in range(300)])
    for number in range(500):
        journeys.learn(chain("a", "c", run=f"new {number}"))
    odds = journeys.odds("app", past("a"))
    assert odds["c"] > 2 * odds["b"]


def test_an_app_that_was_never_seen_has_odds_that_sum_to_one() -> None:
    odds = taught(chain("a", "b")).odds("new", past("x"))
    assert odds.keys() == {"x", END, NEW} and sum(odds.values()) == pytest.approx(1.0)
    assert Journeys().future("app", CallShape("m"), Journey()).p50 == 0.0


def test_what_was_learned_survives_as_plain_json() -> None:
    journeys = taught(*[chain("a", "b", "a", "c", run=str(n)) for n in range(4)])
    other = Journeys()
    assert other.restore(json.loads(json.dumps(journeys.state())))
    shape = CallShape("m", "app", "b", "b")
    assert other.odds("app", past("a")) == pytest.approx(journeys.odds("app", past("a")))
    mine, theirs = journeys.future("app", shape, past("a")), other.future("app", shape, past("a"))
    assert (theirs.p50, theirs.p90) == pytest.approx((mine.p50, mine.p90), rel=1e-3)
    assert other.gap_s("app", "a", "b") == journeys.gap_s("app", "a", "b")
    assert other.widths.further(("app", "a", "b")) == journeys.widths.further(("app", "a", "b"))
    assert json.dumps(other.state()) == json.dumps(journeys.state())
    assert not other.restore({"version": "another"})


def test_memory_is_bounded_whatever_names_come() -> None:
    journeys = taught(*[chain(f"s{n}", f"t{n}", app=f"app {n % 7}") for n in range(3_000)])
    assert len(journeys.branches.stages("app 1")) == 64
    state = journeys.state()
    assert len(state["branches"]["counts"]) <= 20_000
    assert len(state["futures"]["contexts"]) <= 20_000
    assert len(json.dumps(state)) < 8_000_000


def test_later_calls_change_no_earlier_prediction() -> None:
    """The leak test: another future of the same run, the same beliefs up to there."""
    earlier = [chain("a", "b", "c", "d", run=str(n), tokens=50 + n) for n in range(6)]
    run = chain("a", "b", "c", "d", "b", "e", run="judged")
    for cut in range(1, len(run.calls)):
        changed = tuple(
            replace(c, outcome=CallOutcome(9, 7_777, finish="stop")) if c.index >= cut else c
            for c in run.calls
        )
        found = [
            list(foresee(earlier, [RunExamples("here", "judged", x)])) for x in (run.calls, changed)
        ]
        for mine, theirs in list(zip(*found, strict=True))[: cut + 1]:
            assert (mine.p50, mine.p90, mine.paper) == (theirs.p50, theirs.p90, theirs.paper)
        for mine, theirs in list(zip(*found, strict=True))[:cut]:
            assert mine.branch == theirs.branch


def test_online_judging_learns_each_run_only_at_its_end() -> None:
    runs = [chain("a", "b", "c", run=str(n)) for n in range(8)]
    online = list(foresee([], runs, online=True))
    forecaster = Forecaster()
    for run in runs[:-1]:
        forecaster.learn(run)
    assert online[-3:] == list(forecaster.judge(runs[-1]))
    losses = [c.branch.ours for c in online if c.branch is not None]
    assert losses[-1] < losses[0]


def test_the_summary_compares_with_the_baselines() -> None:
    runs = [chain("a", "b", "a", "b", "c", run=str(n)) for n in range(40)]
    summary = futures_summary(foresee(runs[:20], runs[20:]))
    branch, rest = summary["branch"]["macro"], summary["t_rem"]["macro"]
    assert branch["top1_accuracy"] == 1.0
    assert branch["log_loss"] < min(branch["uniform_log_loss"], branch["last_seen_log_loss"])
    assert rest["mae_tokens"] < 30 and rest["kendall_tau"] > 0.9
    assert summary["t_rem"]["micro"]["calls"] == 100
    given = foresee(runs[:20], runs[20:21], t_current={("20", 0): 1_000.0})
    assert next(given).p50 > 1_300


def test_kendall_tau_is_the_pairwise_count() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 2, 3], [1, 3, 2, 2]) == pytest.approx(2 / 5)
    assert kendall_tau([1, 1], [1, 2]) == 0.0
