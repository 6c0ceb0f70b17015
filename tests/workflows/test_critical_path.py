"""Remaining tokens over a graph: branches, fan-outs, joins, loops."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from maestro_agents.protocol import END, Edge, Join, Stage, Workflow
from maestro_backend.scheduler import ForecastCall, Length
from maestro_backend.workflows import Expected, Future, Habits, Past, critical_path

SIZES = {"a": 10.0, "b": 20.0, "c": 300.0, "d": 5.0}
DIAMOND = Workflow(
    name="w",
    stages=tuple(Stage(path=p) for p in SIZES),
    edges=(Edge(source="a", target="b"), Edge(source="a", target="c")),
    joins=(Join(sources=("b", "c"), target="d"),),
)


def rest(
    workflow: Workflow,
    *starts: Expected,
    sizes: Mapping[str, float] = SIZES,
    spread: float = 1.0,
    habits: Habits | None = None,
    past: Past | None = None,
) -> tuple[Future, bool]:
    def predict(stage: Stage) -> ForecastCall | None:
        if stage.path not in sizes:
            return None
        length = Length(sizes[stage.path], spread * sizes[stage.path])
        return ForecastCall(stage.path, "", "m", 1.0, 0.0, 10, length, 1.0)

    return critical_path(workflow, starts, habits or Habits(), predict, past)


def test_a_join_waits_for_its_slowest_source() -> None:
    future, certain = rest(DIAMOND, Expected("a", 1.0))
    assert (future.p50, future.p90, future.calls, certain) == (315, 315, 3, True)


def test_a_join_with_one_source_to_come_is_reached() -> None:
    future, _ = rest(DIAMOND, Expected("b", 1.0), past=Past(arrived=lambda s, t: s == "c"))
    assert (future.p50, future.calls) == (25, 2)


def test_a_stage_that_never_calls_takes_nothing() -> None:
    future, _ = rest(DIAMOND, Expected("a", 1.0), sizes={"a": 10.0, "d": 5.0})
    assert (future.p50, future.calls) == (15, 2)


def test_a_branch_is_taken_as_often_as_it_was() -> None:
    fork = Workflow(
        name="f",
        stages=(Stage(path="a"), Stage(path="b")),
        edges=(
            Edge(source="a", target="b", candidate=True),
            Edge(source="a", target=END, candidate=True),
        ),
    )
    habits = Habits()
    for number in range(100):
        habits.transitions.learn(fork, "a", 1, "b" if number % 4 == 0 else END)
    future, certain = rest(fork, Expected("a", 1.0), habits=habits)
    assert (future.p50, future.p90, certain) == (10, 30, False)
    assert future.calls == pytest.approx(1.25, abs=0.15)


def test_a_loop_is_gone_round_until_it_is_left() -> None:
    loop = Workflow(
        name="l",
        stages=(Stage(path="a"),),
        edges=(
            Edge(source="a", target="a", candidate=True),
            Edge(source="a", target=END, candidate=True),
        ),
    )
    habits = Habits()
    for _ in range(100):
        habits.transitions.learn(loop, "a", 1, "a")
        habits.transitions.learn(loop, "a", 2, END)
    future, _ = rest(loop, Expected("a", 1.0), habits=habits)
    assert future.p50 == 20


def test_a_wide_fan_out_lasts_as_long_as_its_longest_instance() -> None:
    one, _ = rest(DIAMOND, Expected("c", 1.0), spread=3.0)
    many, _ = rest(DIAMOND, Expected("c", 1.0, width=8), spread=3.0, past=Past(copies=lambda s: 8))
    assert many.p50 > 1.5 * one.p50
    same, _ = rest(DIAMOND, Expected("c", 1.0), past=Past(copies=lambda s: 8))
    assert same.p50 == 300, "alike instances take no longer than one"


def test_the_same_question_has_the_same_answer() -> None:
    assert rest(DIAMOND, Expected("a", 1.0), spread=2.0) == rest(
        DIAMOND, Expected("a", 1.0), spread=2.0
    )


def test_nothing_to_come_is_certain() -> None:
    future, certain = rest(DIAMOND)
    assert (future.p50, future.calls, certain) == (0, 0, True)


def graph(*edges: str, joins: tuple[Join, ...] = ()) -> Workflow:
    """Certain edges, each written as source and target: "a b"."""
    pairs = [edge.split() for edge in edges]
    stages = dict.fromkeys(stage for pair in pairs for stage in pair)
    return Workflow(
        name="g",
        stages=tuple(Stage(path=stage) for stage in stages),
        edges=tuple(Edge(source=a, target=b) for a, b in pairs),
        joins=joins,
    )


def test_where_ways_merge_the_longer_one_counts() -> None:
    merging = graph("r x", "r w", "w y", "x z", "y z")
    sizes = {"r": 1.0, "x": 10.0, "w": 100.0, "y": 100.0, "z": 500.0}
    future, certain = rest(merging, Expected("r", 1.0), sizes=sizes)
    assert (future.p50, future.calls, certain) == (701, 4, True)


def test_the_longer_way_counts_though_the_shorter_one_has_more_stages() -> None:
    merging = graph("r x", "x y", "y z", "r z", "r w", "w z")
    sizes = {"r": 1.0, "x": 1.0, "y": 1.0, "w": 100.0, "z": 5.0}
    future, _ = rest(merging, Expected("r", 1.0), sizes=sizes)
    assert (future.p50, future.calls) == (106, 3)


def test_calls_are_those_on_the_longest_way() -> None:
    split = graph("a b1", "b1 b2", "b2 b3", "b3 b4", "a d", "d c")
    sizes = dict.fromkeys(("a", "b1", "b2", "b3"), 10.0) | {"b4": 100.0, "d": 50.0, "c": 1000.0}
    future, _ = rest(split, Expected("a", 1.0), sizes=sizes)
    assert (future.p50, future.calls) == (1060, 3)


def test_of_equally_long_ways_that_with_more_calls_counts() -> None:
    split = graph("a b", "b c", "a d")
    sizes = {"a": 10.0, "b": 10.0, "c": 10.0, "d": 20.0}
    future, _ = rest(split, Expected("a", 1.0), sizes=sizes)
    assert (future.p50, future.calls) == (30, 3)


def test_a_call_ahead_of_its_stage_is_not_to_come_again() -> None:
    chain = graph("a b", "b c")
    sizes = {"a": 10.0, "b": 20.0, "c": 300.0}
    future, certain = rest(
        chain, Expected("b", 1.0), sizes=sizes, past=Past(ahead=lambda s: int(s == "b"))
    )
    assert (future.p50, future.calls, certain) == (300, 1, True)


def test_a_loop_that_must_be_left_somewhere_ends() -> None:
    loop = graph("a b", "b a")
    future, _ = rest(loop, Expected("a", 1.0), sizes={"a": 10.0, "b": 1.0})
    assert future.p50 == 44, "four rounds are foreseen"
