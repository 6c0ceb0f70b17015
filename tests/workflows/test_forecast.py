"""From a graph and a position to the expected calls."""

from __future__ import annotations

from typing import Any

import pytest

from maestro_agents.protocol import END, START, Edge, Join, Stage, Workflow
from maestro_backend.scheduler import ForecastCall, Length
from maestro_backend.workflows import Expected, Habits, Past, Transitions, forecast


def graph(
    *edges: tuple[str, str], maybe: tuple[tuple[str, str], ...] = (), joins: tuple[Join, ...] = ()
) -> Workflow:
    names = {n: None for e in (*edges, *maybe) for n in e}
    names |= {n: None for j in joins for n in (*j.sources, j.target)}
    return Workflow(
        name="w",
        stages=tuple(Stage(path=n) for n in names if not n.startswith("__")),
        edges=(
            *(Edge(source=s, target=t) for s, t in edges),
            *(Edge(source=s, target=t, candidate=True) for s, t in maybe),
        ),
        joins=joins,
    )


def one_second(stage: Stage) -> ForecastCall | None:
    if stage.path.startswith("tool"):
        return None
    return ForecastCall(stage.path, "", "m", 1.0, 0.0, 10, Length(5, 9), 1.0)


def expect(workflow: Workflow, *starts: Expected) -> dict[str, tuple[float, float]]:
    calls = forecast(workflow, starts, Habits(), one_second)
    return {c.stage: (c.probability, c.earliest_start_s) for c in reversed(calls)}


def test_a_chain_is_foreseen_to_its_end() -> None:
    chain = graph((START, "a"), ("a", "b"), ("b", "c"), ("c", END))
    assert expect(chain, Expected("b", 1.0)) == {"b": (1.0, 0.0), "c": (1.0, 1.0)}


def test_candidates_share_their_probability_and_their_successors_inherit_it() -> None:
    routed = graph(("x", "z"), ("y", "z"), maybe=(("r", "x"), ("r", "y")))
    seen = expect(routed, Expected("r", 1.0))
    assert seen["x"] == (0.5, 1.0) and seen["y"] == (0.5, 1.0)
    assert seen["z"] == (0.5, 2.0)


def test_a_stage_without_a_call_is_passed_through() -> None:
    tools = graph(("a", "tool"), ("tool", "b"))
    assert expect(tools, Expected("tool", 1.0)) == {"b": (1.0, 0.0)}


def test_a_loop_ends_and_the_very_unlikely_is_left_out() -> None:
    loop = graph(("a", "b"), maybe=(("b", "a"), ("b", END)))
    assert expect(loop, Expected("a", 1.0)) == {"a": (1.0, 0.0), "b": (1.0, 1.0)}
    assert expect(loop, Expected("a", 0.04)) == {}


def test_a_join_starts_after_its_slowest_source() -> None:
    join = graph(
        ("a", "long"), ("j", "after"), joins=(Join(sources=("long", "short"), target="j"),)
    )
    seen = expect(join, Expected("short", 1.0), Expected("a", 1.0))
    assert (seen["j"], seen["after"]) == ((1.0, 2.0), (1.0, 3.0))
    assert expect(join, Expected("j", 1.0))["j"] == (1.0, 0.0), "its sources are behind it"


def test_a_join_inside_a_loop_does_not_hang() -> None:
    loop = graph(("j", "a"), ("a", "b"), joins=(Join(sources=("a", "b"), target="j"),))
    assert set(expect(loop, Expected("j", 1.0))) == {"j", "a", "b"}


def test_a_stage_that_the_graph_does_not_know_is_ignored() -> None:
    assert expect(graph(("a", "b")), Expected("nowhere", 1.0)) == {}


def rounds(workflow: Workflow, habits: Habits, *starts: Expected, **past: Any) -> dict[str, Any]:
    """By stage, the probabilities of all its calls."""
    found: dict[str, list[float]] = {}
    for call in forecast(workflow, starts, habits, one_second, Past(**past)):
        found.setdefault(call.stage, []).append(pytest.approx(call.probability))
    return found


def test_every_round_of_a_loop_is_a_call_of_its_own() -> None:
    loop = graph(("a", "b"), maybe=(("b", "a"), ("b", END)))
    assert rounds(loop, Habits(), Expected("a", 1.0)) == {
        "a": [1.0, 0.5, 0.25, 0.125],
        "b": [1.0, 0.5, 0.25, 0.125],
    }


def test_a_loop_without_an_end_is_foreseen_for_some_rounds_only() -> None:
    endless = graph(("a", "b"), ("b", "a"))
    assert rounds(endless, Habits(), Expected("a", 1.0)) == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_a_join_is_as_likely_as_its_least_likely_source() -> None:
    join = graph(
        (START, "a"),
        maybe=((START, "b"), (START, END)),
        joins=(Join(sources=("a", "b"), target="j"),),
    )
    starts = (Expected("a", 1.0), Expected("b", 0.3, certain=False))
    assert expect(join, *starts)["j"][0] == pytest.approx(0.3)
    assert "j" not in expect(join, Expected("a", 1.0)), "a branch that is not taken holds it"
    ended = rounds(join, Habits(), Expected("a", 1.0), arrived=lambda source, target: source == "b")
    assert ended["j"] == [1.0]


def test_a_fan_out_is_so_many_calls_as_are_due() -> None:
    sent = graph(("plan", "x"), ("x", "y"))
    due = {"x": 3}
    seen = rounds(sent, Habits(), Expected("x", 1.0, width=3), copies=lambda s: due.get(s, 1))
    assert seen == {"x": [1.0] * 3, "y": [1.0]}


def test_how_wide_a_fan_out_will_be_is_learned() -> None:
    sent = graph(("x/a", "x/b"), ("x/b", "end"), maybe=(("plan", "x/a"),))
    habits = Habits()
    for width in (1, 2, 2, 3):
        habits.widths.learn((sent.id, "plan", "x/a"), width)
    seen = rounds(sent, habits, Expected("plan", 1.0))
    assert seen["x/a"] == seen["x/b"] == [1.0, 0.6, 0.2], "inside the subgraph as at its entry"
    assert seen["end"] == [1.0]


def test_a_wide_fan_out_does_not_make_a_long_forecast() -> None:
    sent = graph(("plan", "x"))
    seen = rounds(sent, Habits(), Expected("x", 1.0), copies=lambda stage: 100_000)
    assert len(seen["x"]) == 16


def test_further_calls_of_one_execution_are_learned() -> None:
    pair = graph(("a", "b"))
    habits = Habits()
    for number in (1, 2, 2):
        habits.calls.learn((pair.id, "a"), number)
    assert rounds(pair, habits, Expected("a", 1.0))["a"] == [1.0, 0.5]
    assert rounds(pair, habits, Expected("b", 1.0), running={"a": (1, 1)})["a"] == [0.5]
    assert "a" not in rounds(pair, habits, Expected("b", 1.0), running={"a": (1, 2)})


def test_what_runs_and_has_not_called_is_still_to_call() -> None:
    pair = graph(("a", "b"))
    assert rounds(pair, Habits(), Expected("b", 1.0), running={"a": (2, 1)}) == {
        "a": [1.0],
        "b": [1.0],
    }


def test_a_call_ahead_of_its_events_is_no_longer_to_come() -> None:
    chain = graph(("a", "b"), ("b", "c"))
    ahead = {"b": 1}
    seen = rounds(chain, Habits(), Expected("a", 1.0), ahead=lambda stage: ahead.get(stage, 0))
    assert seen == {"a": [1.0], "c": [1.0]}


def test_a_deferred_stage_starts_when_all_else_is_over() -> None:
    deferred = graph(("a", "last"), ("a", "b"), ("b", "c"))
    stages = (*(s for s in deferred.stages if s.path != "last"), Stage(path="last", deferred=True))
    deferred = deferred.model_copy(update={"stages": stages})
    seen = expect(deferred, Expected("a", 1.0))
    assert seen == {"a": (1.0, 0.0), "b": (1.0, 1.0), "c": (1.0, 2.0), "last": (1.0, 3.0)}


def test_routing_is_learned_from_choices() -> None:
    routed = graph(maybe=(("r", "x"), ("r", "y")))
    transitions = Transitions()
    for _ in range(8):
        transitions.learn(routed, "r", 1, "x")
    chances = transitions.probabilities(routed, "r", visit=2)
    assert chances == {"x": pytest.approx(0.9), "y": pytest.approx(0.1)}


def test_routing_is_learned_by_how_often_the_stage_has_run() -> None:
    loop = graph(maybe=(("r", "x"), ("r", END)))
    transitions = Transitions()
    for _ in range(20):
        transitions.learn(loop, "r", 1, "x")
        transitions.learn(loop, "r", 2, END)
    first, second, third = (transitions.probabilities(loop, "r", visit=n)["x"] for n in (1, 2, 3))
    assert first > 0.9 and second < 0.1
    assert third == pytest.approx(0.5), "nothing is known of a third visit but what all visits say"


def test_where_open_ended_routing_goes_is_learned() -> None:
    jumps = graph(("x", "y")).model_copy(update={"open_ended": ("x",), "edges": ()})
    transitions = Transitions()
    assert transitions.probabilities(jumps, "x") == {END: 1.0}
    for target in ("y", "y", "nowhere"):
        transitions.learn(jumps, "x", 1, target)
    chances = transitions.probabilities(jumps, "x")
    assert chances.keys() == {"y", END} and 0.8 < chances["y"] < 1.0
