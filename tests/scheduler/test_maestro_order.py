"""The order of `maestro`: earliest deadline first, what cannot be kept last, nothing for sure."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from scheduler.scenes import FLOOR, MOST, arrival, dispatched, scheduler, tiered, worker

from maestro_backend.scheduler import (
    CallFinished,
    Event,
    ForecastCall,
    ForecastChanged,
    Length,
    Preempt,
    Rest,
    RunPaused,
    RunResumed,
    RunStarted,
    Scheduler,
    Settings,
    Tick,
)
from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run
from maestro_backend.scheduler.policies import policy

Timed = tuple[float, Event]
SURE = Length(100, 100)
"""Nobody doubts it: what is optimistic is what is likely."""


def free(call: str, service_s: float, length: Length = SURE) -> list[Timed]:
    """A run without a deadline, and its call."""
    return [(1.0, replace(arrival(call, f"run {call}", service_s=service_s), length=length))]


def due(call: str, deadline_s: float, service_s: float, length: Length = SURE) -> list[Timed]:
    """A run that is to be done so long after 0, and its call."""
    start = RunStarted(f"run {call}", "w", deadline_s=deadline_s)
    return [(0.0, start), *free(call, service_s, length)]


def queue(*runs: list[Timed]) -> Scheduler:
    """The one place is taken until all have come."""
    core = scheduler(worker(window=1, kv=10**6), rule="maestro")
    core.handle(arrival("busy", "busy"), 0.0)
    for now, event in sorted((one for run in runs for one in run), key=lambda timed: timed[0]):
        core.handle(event, now)
    return core


def order(*runs: list[Timed], at: float) -> list[str]:
    """The calls in the order in which they start, all of them at that time."""
    core, started = queue(*runs), ["busy"]
    core.handle(Tick(), at)
    while core.calls.by_id:
        started += dispatched(core.handle(CallFinished(started[-1]), at))
        core.validate()
    return started[1:]


# --- who goes first -----------------------------------------------------------------------------


def test_the_earliest_deadline_goes_first_however_long_it_takes() -> None:
    assert order(due("late", 90, 1), due("soon", 50, 30), at=10.0) == ["soon", "late"]


def test_of_equal_deadlines_the_longer_run_goes_first() -> None:
    assert order(due("short", 90, 1), due("long", 90, 30), at=10.0) == ["long", "short"]


def test_runs_that_cannot_make_it_go_last_the_shortest_first() -> None:
    runs = due("lost", 20, 40), due("lost too", 30, 25), due("late", 90, 30), free("free", 100)
    assert order(*runs, at=10.0) == ["late", "free", "lost too", "lost"]


def test_what_a_run_still_has_before_it_counts_too() -> None:
    ahead = ForecastCall("t", "", "m", 1.0, 0.0, 10, SURE, 60.0)
    lost = [*due("lost", 50, 1), (2.0, ForecastChanged("run lost", (ahead,)))]
    assert order(lost, due("late", 90, 1), at=10.0) == ["late", "lost"]


def test_a_run_without_a_deadline_is_due_ten_minutes_and_five_times_its_work_later() -> None:
    assert order(due("r", 700.9, 1), free("f", 20), at=2.0) == ["r", "f"]
    assert order(due("r", 701.1, 1), free("f", 20), at=2.0) == ["f", "r"]
    assert order(free("long", 3.0), free("short", 1.0), at=2.0) == ["short", "long"]


def test_a_run_without_a_deadline_is_never_given_up() -> None:
    assert order(free("f", 500), due("lost", 100, 1), at=9e3) == ["f", "lost"]
    assert policy("maestro").turns_at(key("f", None, 9e3)) == math.inf


def test_pauses_move_what_a_run_without_a_deadline_is_due_at() -> None:
    paused: list[Timed] = [(2.0, RunPaused("run f")), (40.0, RunResumed("run f"))]
    runs = free("f", 0.1), due("r", 635, 1)
    assert order(*runs, at=41.0) == ["f", "r"]
    assert order(*runs, paused, at=41.0) == ["r", "f"]


def test_a_queued_call_is_given_up_when_its_time_has_come_and_nothing_else_has() -> None:
    runs = due("tight", 50, 10), due("loose", 90, 1)
    for now, first in (39.9, "tight"), (40.1, "loose"):
        core = queue(*runs)
        assert core.handle(Tick(), now) == []
        assert dispatched(core.handle(CallFinished("busy"), now + 0.01)) == [first]


def test_whoever_has_waited_too_long_goes_before_all_others() -> None:
    runs = due("lost", 20, 40), due("late", 9000, 1)
    assert order(*runs, at=1800.0) == ["late", "lost"]
    assert order(*runs, at=1801.0) == ["lost", "late"], "in order of arrival"


# --- the less is known, the less is given up ----------------------------------------------------


def test_nothing_doubtful_is_given_up_before_its_deadline_has_passed() -> None:
    doubtful = due("doubtful", 50, 100, Length(100, 10**5))
    sure = due("sure", 50, 100)
    for now in 2.0, 30.0, 49.9:
        assert order(doubtful, due("late", 90, 1), at=now) == ["doubtful", "late"]
        assert order(sure, due("late", 90, 1), at=now) == ["late", "sure"]
    assert order(doubtful, due("late", 90, 1), at=50.1) == ["late", "doubtful"]


def key(run: str, deadline: float | None, now: float, *, length: Length = SURE) -> Key:
    """Of a call that takes 10 seconds."""
    call = Call(replace(arrival("c", run, service_s=10.0), length=length), 0.0, 0)
    return policy("maestro").key(call, Run(run, deadline=deadline), now)


@given(st.floats(1.0, 1e4), st.floats(1.0, 1e3))
def test_a_run_is_given_up_where_the_first_percentile_comes_too_late(
    p50: float, times: float
) -> None:
    """Of a log-normal with this median and 90th percentile."""
    normal = NormalDist()
    sigma = math.log(times) / normal.inv_cdf(0.9)
    least_s = 10.0 * math.exp(sigma * normal.inv_cdf(0.01))
    length = Length(p50, p50 * times)
    assert key("r", 100.0, 100.0 - least_s * 1.02, length=length)[0] == 0.0
    assert key("r", 100.0, 100.0 - least_s * 0.98, length=length)[0] == 1.0
    assert policy("maestro").turns_at(key("r", 100.0, 0.0, length=length)) == pytest.approx(
        100.0 - least_s, abs=0.02 * least_s
    )


# --- what it still takes, by experience ---------------------------------------------------------


def remaining(rest: Rest, *ahead: ForecastCall) -> float:
    """T_rem of a run's second call, of 10 seconds; a token takes its workflow a tenth of one, and
    the second call has come 6 seconds after the end of the first."""
    core = queue(due("a", 1000, 10), [(0.5, CallFinished("busy"))])
    core.handle(CallFinished("a"), 11.0)
    core.handle(ForecastChanged("run a", ahead, rest), 12.0)
    core.handle(arrival("busy 2", "b"), 13.0)
    core.handle(replace(arrival("a2", "run a", service_s=10.0), length=SURE), 17.0)
    call = core.calls.by_id["a2"]
    assert call.key is not None and call.key[0] == 0.0
    return call.key[1] - call.key[2]


def test_t_rem_is_by_experience_where_the_forecast_does_not_reach_far() -> None:
    """The mean gap is 3 seconds: none before the first call, and six before the second."""
    assert remaining(Rest(500, 500)) == pytest.approx(50.0)
    assert remaining(Rest(500, 500, calls=4)) == pytest.approx(50.0 + 4 * 3.0)
    assert remaining(Rest(500, 5000)) == pytest.approx(10.0), "no less than the call itself"


def test_t_rem_is_the_forecast_s_where_that_is_longer() -> None:
    ahead = ForecastCall("t", "", "m", 1.0, 40.0, 10, SURE, 50.0)
    assert remaining(Rest(500, 500), ahead) == pytest.approx(100.0)


# --- engines ------------------------------------------------------------------------------------


def priority(deadline: float | None, now: float = 10.0, arrived: float = 0.0) -> int:
    call = Call(replace(arrival("c", service_s=10.0), length=SURE), arrived, 0)
    return policy("maestro").priority(call, Run("r", deadline=deadline), now)


def test_engines_are_told_the_same_order_where_less_is_sooner() -> None:
    assert priority(30.0) < priority(90.0) < priority(10.0 + 1e9) < priority(15.0)
    assert priority(90.0) < priority(None) < priority(900.0), "due at 650"
    assert priority(15.0, now=1800.0) == 0 < priority(30.0), "it has waited for too long"


@given(st.none() | st.floats(0.0, 1e300), st.floats(0.0, 1e9), st.floats(0.0, 1e9))
def test_engine_priorities_fit_in_31_bits(
    deadline: float | None, now: float, arrived: float
) -> None:
    assert 0 <= priority(deadline, now, min(now, arrived)) < 2**31


def preempts(victim_s: float | None, own_s: float | None, *, patience_s: float = 10.0) -> bool:
    """Whether a short call takes the KV memory of one of 500 seconds; seconds to deadlines."""
    core = scheduler(
        tiered(kv=MOST), rule="maestro", settings=Settings(preempt_patience_s=patience_s)
    )
    core.handle(RunStarted("r1", deadline_s=victim_s), 0.0)
    core.handle(RunStarted("r2", deadline_s=own_s), 0.0)
    long = replace(arrival("long", "r1", kv=MOST, service_s=500.0), length=SURE)
    assert dispatched(core.handle(long, 1.0)) == ["long"]
    core.handle(replace(arrival("short", "r2", kv=FLOOR), length=SURE), 1.5)
    return [type(c) for c in core.handle(Tick(), 1.5 + patience_s)] == [Preempt]


def test_only_a_run_that_was_given_up_loses_its_place_to_one_that_can_make_it() -> None:
    assert preempts(20.0, 900.0)
    assert preempts(20.0, None)
    assert not preempts(900.0, 100.0), "it is only later"
    assert not preempts(None, 100.0)
    assert not preempts(20.0, 5.0), "both are lost"


def test_who_has_had_more_than_a_fifth_of_its_service_keeps_its_place() -> None:
    assert preempts(20.0, None, patience_s=99.0)
    assert not preempts(20.0, None, patience_s=100.0)


# --- anything -----------------------------------------------------------------------------------

times = st.integers(1, 60).map(float)
anybody = st.lists(st.tuples(st.none() | times, times, st.sampled_from([100, 200, 10**5])))


@given(anybody.filter(lambda some: len(some) > 1), times)
@hypothesis(max_examples=60, deadline=None)
def test_all_are_served_in_one_order_that_anyone_can_tell(
    some: list[tuple[float | None, float, int]], at: float
) -> None:
    """Of the keys as they are described, and of arrivals."""
    runs, told = [], []
    for i, (deadline, service_s, p90) in enumerate(some):
        length = Length(100, p90)
        if deadline is None:
            runs.append(free(f"c{i}", service_s, length))
            told.append((0.0, 601.0 + 5 * service_s, -math.inf, i))
            continue
        runs.append(due(f"c{i}", deadline, service_s, length))
        least_s = service_s * (100 / p90) ** (2.326 / 1.282)
        lost = deadline - least_s < at
        told.append((1.0, service_s, 0.0, i) if lost else (0.0, deadline, -least_s, i))
    assert order(*runs, at=at) == [f"c{i}" for *_, i in sorted(told)]
