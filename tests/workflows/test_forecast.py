"""From a graph and a position to the expected calls."""

from __future__ import annotations

import pytest

from maestro_agents.protocol import END, START, Edge, Join, Stage, Workflow
from maestro_backend.scheduler import ForecastCall, Length
from maestro_backend.workflows import Expected, Transitions, forecast


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
    calls = forecast(workflow, starts, Transitions(), one_second)
    return {c.stage: (c.probability, c.earliest_start_s) for c in calls}


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


def test_routing_is_learned_from_choices() -> None:
    routed = graph(maybe=(("r", "x"), ("r", "y")))
    transitions = Transitions()
    for _ in range(8):
        transitions.learn(routed.id, "r", "x")
    assert transitions.probabilities(routed, "r") == {
        "x": pytest.approx(0.9),
        "y": pytest.approx(0.1),
    }
