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
