"""Drift: alarms when a model has got worse, and not by chance."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest

from maestro_backend.predictor.training import Alarm, Drift, Trouble

POINT, P90 = 100.0, 100.0 * 2**1.2816
"""Of lengths 100 * 2**N(0, 1)."""


def usual(seed: int, calls: int, shift: float = 0.0, spread: float = 1.0) -> Iterable[float]:
    random = Random(seed)
    return (100.0 * 2 ** (shift + spread * random.gauss(0, 1)) for _ in range(calls))


def wider(seed: int, calls: int) -> Iterable[float]:
    """The same part of them lies below the p90, and the others lie farther from the point."""
    for actual in usual(seed, calls):
        yield actual if actual >= POINT else actual / 16


def alarms(
    drift: Drift,
    actuals: Iterable[float],
    *,
    point: float = POINT,
    p90: float = P90,
    fallback: float = 300.0,
) -> list[Alarm]:
    found = (drift.add(actual, point, p90, fallback) for actual in actuals)
    return [alarm for alarm in found if alarm]


@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_stays_as_it_was_raises_no_alarm(seed: int) -> None:
    drift = Drift()
    assert alarms(drift, usual(seed, 4000)) == []
    assert drift.coverage == pytest.approx(0.9, abs=0.06)


def test_a_p90_that_covers_too_little_is_drift_and_told_once() -> None:
    drift = Drift()
    assert alarms(drift, usual(1, 1000)) == []
    [alarm] = alarms(drift, usual(2, 1000, shift=1.2), fallback=1000.0)
    assert alarm.trouble is Trouble.DRIFT
    assert "the 90th percentile covers" in alarm.reason


def test_a_p90_that_covers_too_much_is_drift() -> None:
    [alarm, *_] = alarms(Drift(), usual(1, 1000), p90=5000.0)
    assert alarm.trouble is Trouble.DRIFT


def test_a_median_error_that_grows_is_drift() -> None:
    drift = Drift()
    assert alarms(drift, usual(1, 1000)) == []
    [alarm] = alarms(drift, wider(2, 1000), fallback=1000.0)
    assert "the median error has grown from" in alarm.reason


def test_nothing_is_said_before_200_calls() -> None:
    assert alarms(Drift(), [5000.0] * 199, fallback=5000.0) == []
    found = alarms(Drift(), [5000.0] * 400, fallback=5000.0)
    assert {alarm.trouble for alarm in found} == {Trouble.DRIFT, Trouble.WORSE}


def test_lengths_that_always_equal_the_p90_are_no_drift() -> None:
    assert alarms(Drift(), [64.0] * 2000, point=64.0, p90=64.0) == []


def test_a_model_that_covered_all_when_it_was_judged_may_go_on_so() -> None:
    assert alarms(Drift(coverage=1.0), usual(1, 2000), p90=1e6) == []
    assert alarms(Drift(coverage=float("nan")), usual(1, 2000), p90=1e6) != []


def test_a_model_worse_than_the_tables_is_told_with_the_numbers() -> None:
    [alarm, *_] = alarms(Drift(), [50.0, 150.0] * 300, point=200.0, fallback=100.0)
    assert alarm.trouble is Trouble.WORSE
    assert "off by 100 tokens a call" in alarm.reason
    assert "the plain tables by 50" in alarm.reason


def test_a_tie_with_the_tables_is_not_worse() -> None:
    random = Random(3)
    drift = Drift()
    found = []
    for actual in usual(3, 6000):
        point, fallback = (POINT + random.gauss(0, 10) for _ in range(2))
        found.append(drift.add(actual, point, P90, fallback))
    assert [alarm for alarm in found if alarm] == []


def test_what_training_could_not_mend_becomes_the_usual() -> None:
    drift = Drift()
    assert len(alarms(drift, usual(1, 1000), p90=5000.0)) == 1
    drift.settle()
    assert alarms(drift, usual(2, 1000), p90=5000.0) == []
    [alarm] = alarms(drift, usual(3, 1000, shift=1.0, spread=2.0), p90=P90)
    assert alarm.trouble is Trouble.DRIFT, "new trouble is told again"
