"""Deadlines, against runs whose longest way is reckoned by hand."""

from __future__ import annotations

import pytest
from workloads.making import mix

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import SimCall, Template
from maestro_backend.workloads import Due, DueTimes, longest_way, parse_deadline

RUN = Template(
    "made",
    "one",
    (
        SimCall("plan", "m", 100, 10),
        SimCall("left", "m", 100, 40, after=(0,), gap_s=5.0),
        SimCall("right", "m", 100, 20, after=(0,), gap_s=30.0, human=True),
        SimCall("join", "m", 100, 10, after=(1, 2), gap_s=1.0, prefix_of=0, prefix_tokens=100),
    ),
    slo="interactive",
)


def service_s(model: str, prompt: int, output: int, cached: int) -> float:
    """One second per answer's token, one per ten of the prompt that are not cached."""
    return output + (prompt - cached) / 10


@pytest.mark.parametrize(
    ("factor", "way"),
    [
        (1.0, (20 + 30 + 30 + 1 + 10, 30.0)),  # by way of the person: 91, the other is 86
        (2.0, (40 + 5 + 100 + 1 + 20, 0.0)),  # by way of the long answer: 166, the other is 151
    ],
)
def test_the_longest_way_is_that_of_gaps_and_work(factor: float, way: tuple[float, float]) -> None:
    assert longest_way(RUN, service_s, factor) == pytest.approx(way)


def test_a_proportional_deadline_leaves_out_people() -> None:
    due = DueTimes(parse_deadline("proportional:1", mix()), service_s)
    assert due(RUN) == Due(deadline_s=61.0, pauses_s=30.0)
    assert due.deadline.kind == "proportional:1"


def test_a_fixed_deadline_is_the_classs() -> None:
    due = DueTimes(parse_deadline("fixed:fixed", mix()), service_s)
    assert due(RUN) == Due(deadline_s=60.0, pauses_s=30.0)
    batch = Template("made", "two", RUN.calls, slo="batch")
    with pytest.raises(ConfigError, match="nothing of class 'batch'"):
        due(batch)


def test_each_template_is_reckoned_once() -> None:
    asked = []

    def counted(model: str, prompt: int, output: int, cached: int) -> float:
        asked.append(model)
        return 1.0

    due = DueTimes(parse_deadline("proportional:2.5", mix()), counted)
    assert due(RUN) is due(RUN)
    assert len(asked) == 4


@pytest.mark.parametrize(
    "wrong", ["", "proportional", "proportional:0", "proportional:inf", "fixed:none", "soon:1"]
)
def test_deadlines_that_are_none_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"proportional:FACTOR.*fixed:fixed"):
        parse_deadline(wrong, mix())
