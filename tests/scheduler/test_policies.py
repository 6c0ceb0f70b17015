"""Policies by name, and the order of each as its source says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from scheduler.scenes import arrival, dispatched, scheduler, worker

from maestro_agents.protocol import ConfigError
from maestro_backend.scheduler import (
    CallFinished,
    CallPredicted,
    Event,
    ForecastCall,
    ForecastChanged,
    Length,
    RunEnded,
    RunPaused,
    RunResumed,
    RunStarted,
    Scheduler,
    Tick,
)
from maestro_backend.scheduler.policies import POLICIES, policy


def test_every_policy_knows_its_own_name() -> None:
    assert {name: policy(name).name for name in POLICIES} == {name: name for name in POLICIES}


def test_an_unknown_policy_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="edf, fcfs, kairos, las, maestro"):
        policy("none")


Timed = tuple[float, Event]
BUSY: Timed = (0.0, arrival("busy", "other"))
"""The one place is taken until all have come."""


def order(rule: str, *events: Timed, until: float = 20.0) -> list[str]:
    """The calls in the order in which they start on one place, a second each, from `until` on."""
    core = scheduler(worker(window=1, kv=10**6), rule=rule)
    for now, event in sorted((BUSY, *events), key=lambda timed: timed[0]):
        core.handle(event, now)
    started, now = ["busy"], until
    while core.calls.by_id:
        started += dispatched(core.handle(CallFinished(started[-1]), now))
        core.validate()
        now += 1.0
    return started[1:]


def lasting(call: str, run: str, start: float, end: float, stage: str = "s") -> list[Timed]:
    """A call of another model, that the run has had before."""
    return [(start, arrival(call, run, stage=stage, model="x")), (end, CallFinished(call))]


def served(rule: str, *events: Timed, until: float = 20.0) -> list[str]:
    """As `order`, with a second model on which runs have their service before that."""
    core = scheduler(worker(window=1, kv=10**6), worker("x", window=9, kv=10**6), rule=rule)
    for now, event in sorted((BUSY, *events), key=lambda timed: timed[0]):
        core.handle(event, now)
    started, now = ["busy"], until
    while core.calls.by_id:
        started += dispatched(core.handle(CallFinished(started[-1]), now))
        now += 0.01
    return started[1:]


def rest(run: str, service_s: float) -> ForecastChanged:
    call = ForecastCall("t", "", "m", 1.0, 0.0, 10, Length(8, 16), service_s)
    return ForecastChanged(run, (call,))


def test_fcfs_takes_them_as_they_came() -> None:
    calls = [(1.0, arrival("b", "r1", service_s=9)), (2.0, arrival("a", "r2", service_s=1))]
    assert order("fcfs", *calls) == ["b", "a"]


def test_sjf_takes_the_shortest_call_whatever_its_run_has_before_it() -> None:
    events = [
        (1.0, arrival("long", "r1", service_s=9)),
        (2.0, arrival("short", "r2", service_s=1)),
        (2.0, rest("r2", 500.0)),
        (3.0, arrival("same", "r3", service_s=1)),
    ]
    assert order("sjf", *events) == ["short", "same", "long"]
    better = (4.0, CallPredicted("long", Length(1, 1), 10, 0.5))
    assert order("sjf", *events, better) == ["long", "short", "same"]


def test_edf_goes_by_the_deadline_of_the_run_and_stops_its_clock_with_a_pause() -> None:
    events = [
        (0.5, RunStarted("late", deadline_s=100)),
        (0.5, RunStarted("soon", deadline_s=50)),
        (1.0, arrival("never")),
        (1.0, arrival("l", "late")),
        (1.0, arrival("s", "soon")),
    ]
    assert order("edf", *events) == ["s", "l", "never"]
    paused = [(2.0, RunPaused("soon")), (90.0, RunResumed("soon"))]
    assert order("edf", *events, *paused, until=95.0) == ["l", "s", "never"]


def test_maestro_takes_the_run_that_is_done_soonest() -> None:
    events = [
        (1.0, arrival("short", "r1", service_s=1)),
        (1.5, rest("r1", 50.0)),
        (2.0, arrival("long", "r2", service_s=9)),
    ]
    assert order("maestro", *events) == ["long", "short"]
    assert order("maestro", *events, (3.0, rest("r1", 2.0))) == ["short", "long"]


def test_las_takes_the_run_that_has_had_the_least_service_lately() -> None:
    """Eight seconds have shrunk to less than five in one half-life."""
    past = [*lasting("p", "much", 1, 9), *lasting("q", "some", 64, 69)]
    calls = [
        (70.0, arrival("s", "some")),
        (70.0, arrival("m", "much")),
        (71.0, arrival("n", "new")),
    ]
    assert served("las", *past, *calls, until=80.0) == ["n", "m", "s"]


def test_plas_takes_the_lowest_level_of_service_and_inside_the_first() -> None:
    past = [*lasting("p", "five", 1, 6), *lasting("q", "seven", 1, 8), *lasting("t", "two", 1, 3)]
    calls = [(10.0, arrival("7", "seven")), (11.0, arrival("5", "five"))]
    calls += [(12.0, arrival("2", "two")), (13.0, arrival("0", "new"))]
    assert served("plas", *past, *calls, until=14.0) == ["0", "2", "7", "5"]


def test_plas_promotes_who_has_waited_ten_times_its_service() -> None:
    past = lasting("p", "starved", 1, 5)
    calls = [(10.0, arrival("old", "starved")), (51.0, arrival("new", "new"))]
    assert served("plas", *past, *calls, (52.0, Tick()), until=54.0) == ["old", "new"]
    assert served("plas", *past, *calls, (44.0, Tick()), until=51.5)[0] == "old"
    calls = [(30.0, arrival("old", "starved")), (51.0, arrival("new", "new"))]
    assert served("plas", *past, *calls, (52.0, Tick()), until=54.0) == ["new", "old"]


def test_atlas_counts_the_longest_path_and_not_what_went_beside_it() -> None:
    """Four calls of four seconds side by side are a path of four; two in a row are one of eight."""
    beside = [event for i in range(4) for event in lasting(f"b{i}", "wide", 1, 5, f"b{i}")]
    chain = [*lasting("c0", "deep", 1, 5, "c0"), *lasting("c1", "deep", 5, 9, "c1")]
    join = replace(arrival("w", "wide"), waits_for=("b0", "b1", "b2", "b3"))
    calls = [(9.5, arrival("d", "deep")), (10.0, join)]
    assert served("atlas", *beside, *chain, *calls, until=12.0) == ["w", "d"]
    assert served("plas", *beside, *chain, *calls, until=12.0) == ["d", "w"]


def test_kairos_learns_which_agents_have_most_of_their_run_before_them() -> None:
    past: list[Timed] = [(0.5, RunStarted("p", "app"))]
    past += [*lasting("p1", "p", 1, 5, "plan"), *lasting("p2", "p", 5, 7, "write")]
    past += [(7.0, RunEnded("p"))]
    now: list[Timed] = [(8.0, RunStarted("a", "app")), (8.5, RunStarted("b", "app"))]
    now += [(9.0, arrival("a1", "a", stage="plan")), (9.5, arrival("b2", "b", stage="write"))]
    now += [(9.6, arrival("c", "other", stage="plan"))]
    assert served("kairos", *past, *now) == ["c", "b2", "a1"]
    assert served("kairos", *past[:-1], *now) == ["c", "a1", "b2"], "the run is not over"


def test_oracle_takes_the_least_slack_that_can_be_kept_then_the_shortest() -> None:
    events = [
        (0.5, RunStarted("tight", deadline_s=25)),
        (0.5, RunStarted("loose", deadline_s=60)),
        (0.5, RunStarted("lost", deadline_s=21)),
        (1.0, arrival("none", "none", service_s=2)),
        (1.0, arrival("l", "loose", service_s=1)),
        (1.0, arrival("x", "lost", service_s=3)),
        (1.0, arrival("t", "tight", service_s=1)),
        (2.0, rest("lost", 4.0)),
    ]
    assert order("oracle", *events) == ["t", "l", "none", "x"]


def mirrored(core: Scheduler, call: str, now: float) -> tuple[float, tuple[float, ...], int]:
    """Where a call stands, by a rule without heaps."""
    it = core.calls.by_id[call]
    if now - it.arrived >= core.policy.max_wait_s:
        return 0, (), it.order
    return 1, core.policy.key(it, core.runs.get(it.request.run), now), it.order


def held(core: Scheduler, call: str) -> bool:
    """Whether an earlier call of a stage that it joins is live."""
    mine = core.calls.by_id[call]
    return any(
        c.request.run == mine.request.run
        and c.request.stage in mine.request.waits_for
        and c.order < mine.order
        for c in core.calls.by_id.values()
    )


@pytest.mark.parametrize("rule", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(4))
def test_what_starts_is_what_sorting_the_whole_queue_would_start(rule: str, seed: int) -> None:
    dice = Random(seed)
    core = scheduler(worker(window=1, kv=10**6), rule=rule)
    now, busy, calls = 0.0, "", 0
    often: list[Callable[[str], Event]] = [
        lambda run: rest(run, dice.uniform(0, 50)),
        lambda run: RunStarted(run, "w", deadline_s=dice.uniform(0, 90)),
        RunPaused,
        RunResumed,
        RunEnded,
    ]
    for _ in range(400):
        now += 6.0 if core.policy.rekey_s or rule == "maestro" else 0.1
        run, events = f"r{dice.randrange(6)}", list[Event]()
        if busy and dice.random() < 0.4:
            events.append(CallFinished(busy))
        elif dice.random() < 0.3:
            events.append(dice.choice(often)(run))
        elif len(core.calls.by_id) < 30:
            calls += 1
            joins = ("s0",) if dice.random() < 0.3 else ()
            stage, service_s = f"s{len(joins)}", dice.uniform(0, 20)
            events.append(
                arrival(f"c{calls}", run, stage=stage, service_s=service_s, waits_for=joins)
            )
        for event in events:
            started = dispatched(core.handle(event, now))
            core.validate()
            busy = next(iter(core.calls.on_worker("n/m")), "")
            waiting = [c for c in core.calls.queued("m") if not held(core, c)]
            assert busy or not waiting
            for call in started:
                first = mirrored(core, call, now)
                assert all(first < mirrored(core, c, now) for c in waiting)
