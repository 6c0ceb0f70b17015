"""What is learned of each model's calls, and where they go for it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from scheduler.scenes import arrival

from maestro_backend.scheduler import (
    CallArrived,
    CallFinished,
    Command,
    DeviceInfo,
    Dispatch,
    Length,
    NodeInfo,
    NodeJoined,
    Residency,
    Scheduler,
    WorkerInfo,
    WorkerState,
)
from maestro_backend.scheduler._calls import Call
from maestro_backend.scheduler._traffic import Slowdown, Traffic
from maestro_backend.scheduler.policies import policy

KNOWN = Slowdown()
"""What is believed of a model before any of its calls has ended."""


def a_call(service_s: float = 1.0, prompt: int = 0, output: float = 8) -> Call:
    request = replace(arrival("a", service_s=service_s), prompt_tokens=prompt)
    return Call(replace(request, length=Length(output, output)), 0.0, 0)


def told(*ended: tuple[float, float, float, float]) -> Traffic:
    """Of calls with so many seconds of service, that took so many times it beside so many."""
    traffic = Traffic()
    for service_s, times, beside, shared in ended:
        call = a_call(service_s)
        traffic.seen(call, 0.0)
        traffic.ended(call, beside, shared, service_s * times)
    return traffic


def slowdown(*ended: tuple[float, float, float, float]) -> Slowdown:
    return told(*ended).slowdown("m")


# --- how workers slow down ----------------------------------------------------------------------


@given(st.floats(0.02, 0.5), st.floats(0.02, 0.5), st.integers(0, 99))
@hypothesis(max_examples=25, deadline=None)
def test_the_factors_are_found_whatever_they_are(beside: float, shared: float, seed: int) -> None:
    dice = Random(seed)
    ended = []
    for _ in range(1500):
        near, far = dice.randrange(9), dice.randrange(9)
        ended.append((dice.uniform(0.5, 9.0), 1.0 + beside * near + shared * far, near, far))
    found = slowdown(*ended)
    assert found.beside == pytest.approx(beside, abs=0.01)
    assert found.shared == pytest.approx(shared, abs=0.01)
    assert found.of(2, 3) == pytest.approx(2 * found.beside + 3 * found.shared)


def test_nothing_is_believed_at_once() -> None:
    assert Traffic().slowdown("m") == KNOWN == slowdown()
    after = slowdown((1.0, 2.0, 1, 0))
    assert KNOWN.beside < after.beside < KNOWN.beside + 0.05
    assert after.shared == pytest.approx(KNOWN.shared, abs=0.001)


def test_long_calls_teach_more_than_short_ones() -> None:
    some = [(9.0, 1.2, 1, 0), (0.1, 2.0, 1, 0)]
    assert slowdown(*some * 500).beside == pytest.approx(0.2, abs=0.02)


def test_what_was_long_ago_is_forgotten() -> None:
    past, now = (1.0, 2.0, 1, 0), (1.0, 1.2, 1, 0)
    assert slowdown(*[past] * 2000, *[now] * 2000).beside < 0.25


def test_causes_that_only_come_together_are_told_apart_as_before() -> None:
    found = slowdown(*[(5.0, 2.0, 1, 1)] * 500)
    assert found.beside + found.shared == pytest.approx(1.0, abs=0.01)
    assert found.shared - found.beside == pytest.approx(KNOWN.shared - KNOWN.beside)


def test_no_factor_falls_to_zero() -> None:
    """A worker that nothing slows down would take all calls."""
    assert slowdown(*[(9.0, 1.0, 4, 0), (9.0, 1.0, 0, 4)] * 2000) == Slowdown(0.01, 0.01)


def test_a_call_that_was_predicted_wrong_teaches_no_more_than_twenty_times_its_service() -> None:
    assert slowdown((1.0, 500.0, 1, 0)) == slowdown((1.0, 20.0, 1, 0))
    assert slowdown((1.0, 20.0, 1, 0)) != slowdown((1.0, 19.0, 1, 0))


def test_models_teach_nothing_of_each_other() -> None:
    assert told((9.0, 5.0, 1, 1)).slowdown("other") == KNOWN


# --- what calls ask for -------------------------------------------------------------------------


def test_what_a_token_of_a_prompt_costs_is_found_beside_what_the_answer_costs() -> None:
    traffic, dice = Traffic(), Random(1)
    assert traffic.prefill_s("m") == 0.0
    for _ in range(50):
        prompt, output = dice.randrange(5000), dice.randrange(1, 500)
        traffic.seen(a_call(2e-4 * prompt + 3e-2 * output, prompt, output), 1.0)
    assert traffic.prefill_s("m") == pytest.approx(2e-4)


def test_calls_that_are_all_alike_do_not_tell_what_their_prompts_cost() -> None:
    traffic = Traffic()
    for _ in range(50):
        traffic.seen(a_call(3.0, 1000, 100), 1.0)
    assert traffic.prefill_s("m") == 0.0


@pytest.mark.parametrize("seconds", [20, 180, 2000])
def test_the_service_that_comes_per_second_is_right_early_and_late(seconds: int) -> None:
    traffic = Traffic()
    for now in range(seconds):
        traffic.seen(a_call(0.4), float(now))
        traffic.seen(a_call(0.2), now + 0.5)
    assert traffic.busy("m", float(seconds)) == pytest.approx(0.6, rel=0.05)
    assert traffic.busy("other", float(seconds)) == 0.0


def test_what_comes_no_more_is_forgotten_in_minutes() -> None:
    traffic = Traffic()
    for now in range(2000):
        traffic.seen(a_call(0.6), float(now))
    assert traffic.busy("m", 2180.0) == pytest.approx(0.6 / 2.718, rel=0.05)
    assert traffic.busy("m", 4000.0) < 0.001


# --- where calls go for it ----------------------------------------------------------------------


def on(device: int, model: str) -> WorkerInfo:
    name, at = f"n/d{device}/{model}", Residency.DEVICE
    state = WorkerState.READY
    return WorkerInfo(
        name, "n", f"d{device}", model, state, at, 1000, 10**6, kv_max_bytes=10**6, max_inflight=9
    )


def cluster(*workers: WorkerInfo) -> Scheduler:
    devices = tuple(DeviceInfo(f"d{i}", 10**8) for i in range(2))
    core = Scheduler(policy("fcfs"))
    core.handle(NodeJoined(NodeInfo("n", devices, workers)), 0.0)
    return core


def places(commands: list[Command]) -> list[str]:
    return [c.worker for c in commands if isinstance(c, Dispatch)]


def test_calls_on_other_workers_of_the_device_count_as_much_as_they_slow_down() -> None:
    """One there is as bad as three on the worker itself, until more is known."""
    core = cluster(on(0, "m"), on(1, "m"), on(0, "x"))
    core.handle(arrival("x", "other", model="x"), 0.5)
    went = [place for i in range(4) for place in places(core.handle(arrival(f"c{i}"), 1.0))]
    assert went == ["n/d1/m"] * 3 + ["n/d0/m"]


def test_a_call_that_ends_beside_a_worker_makes_it_the_better_one() -> None:
    core = cluster(on(0, "m"), on(1, "m"), on(0, "x"))
    core.handle(arrival("x", "other", model="x"), 0.5)
    assert places(core.handle(arrival("a"), 1.0)) == ["n/d1/m"]
    core.handle(CallFinished("x"), 1.5)
    assert places(core.handle(arrival("b"), 2.0)) == ["n/d0/m"]


def test_what_was_learned_of_a_model_says_where_its_calls_go() -> None:
    """Calls beside them slow these down more than those on other workers do."""
    core = cluster(on(0, "m"), on(1, "m"), on(0, "x"))
    for _ in range(500):
        core._world.traffic.seen(a_call(), 0.0)
        core._world.traffic.ended(a_call(), 1.0, 0.0, 2.0)
        core._world.traffic.ended(a_call(), 0.0, 1.0, 1.2)
    core.handle(arrival("x", "other", model="x"), 0.5)
    went = [place for i in range(2) for place in places(core.handle(arrival(f"c{i}"), 1.0))]
    assert went == ["n/d1/m", "n/d0/m"]


def test_a_call_teaches_by_the_mean_of_the_calls_about_it_at_its_start_and_its_end() -> None:
    core, traffic = cluster(on(0, "m"), on(0, "x")), Traffic()
    core.handle(arrival("a"), 1.0)
    for i in range(2):
        core.handle(arrival(f"b{i}"), 2.0)
    core.handle(arrival("x", model="x"), 2.0)
    core.handle(CallFinished("a"), 5.0)
    traffic.seen(a_call(), 1.0)
    traffic.ended(a_call(), 1.0, 0.5, 4.0)
    assert core._world.traffic.slowdown("m") == traffic.slowdown("m")


def turn(call: str, run: str, prompt: int) -> CallArrived:
    """A second for a thousand tokens of prompt, and one for ten tokens of the answer."""
    one = replace(arrival(call, run, kv=10, service_s=prompt / 1e3 + 1.0), prompt_tokens=prompt)
    return replace(one, length=Length(10, 10))


def comes_back(prompt: int, *, cached: int = 10**4, others: int = 1) -> bool:
    """Whether a run's next call goes to its last worker, where others run meanwhile."""
    core = cluster(on(0, "m"), on(1, "m"))
    core.handle(turn("a", "r", 5000), 1.0)
    core.handle(CallFinished("a", cached - 10, 10), 1.0)
    for i in range(2 * others):
        core.handle(turn(f"c{i}", f"o{i}", 100), 1.0)
    for i in range(others):
        core.handle(CallFinished(f"c{2 * i + 1}"), 1.0)
    beside = [len(core.calls.on_worker(f"n/d{d}/m")) for d in range(2)]
    assert beside == [others, 0], "its last worker is the busier one"
    return places(core.handle(turn("b", "r", prompt), 2.0)) == ["n/d0/m"]


def test_a_run_comes_back_where_its_prefix_saves_more_than_the_calls_there_cost() -> None:
    """One call beside it costs a tenth: as much as 111 tokens of a prompt save."""
    assert comes_back(5000)
    assert comes_back(200)
    assert not comes_back(50)
    assert not comes_back(200, others=4), "0.17 is saved there, and 0.4 lost"


def test_no_more_is_saved_than_was_left_there() -> None:
    assert not comes_back(5000, cached=100)
