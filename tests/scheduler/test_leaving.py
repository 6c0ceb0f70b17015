"""Who makes room for whom where models have several workers, and what gives way for KV memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler.scenes import ALIVE, FLOOR, RESIDUAL, arrival, ready, stopped, suspended, tiered
from scheduler.test_scheduler_replicas import done, moves, places

from maestro_backend.scheduler import (
    CallCancelled,
    CallFinished,
    Command,
    DeviceInfo,
    NodeInfo,
    NodeJoined,
    Residency,
    Scheduler,
    Tick,
    WorkerInfo,
    WorkerState,
)
from maestro_backend.scheduler.policies import policy

DEVICE, DISK = Residency.DEVICE, Residency.DISK
READY, STOPPED = WorkerState.READY, WorkerState.STOPPED
START_S = 5.0


def on(device: int, model: str, state: WorkerState = READY, *, window: int = 1) -> WorkerInfo:
    """A worker that takes 1,000 bytes of weights of its device, and is back in five seconds."""
    name, at, kv = f"n/d{device}/{model}", DEVICE if state is READY else DISK, 100
    back = {DISK: START_S}
    return WorkerInfo(
        name, "n", f"d{device}", model, state, at, 1000, kv, max_inflight=window, activation_s=back
    )


def cluster(*workers: WorkerInfo, capacity: int = 1100) -> Scheduler:
    """Devices with room for one worker each."""
    devices = tuple(DeviceInfo(f"d{i}", capacity) for i in range(3))
    core = Scheduler(policy("fcfs"))
    core.handle(NodeJoined(NodeInfo("n", devices, workers, 10**4)), 0.0)
    core.validate()
    return core


def come(
    core: Scheduler, model: str, *calls: str, now: float, service_s: float = 1.0
) -> list[Command]:
    """So many calls of a model come, each of a run of its own."""
    commands: list[Command] = []
    for call in calls:
        one = arrival(call, f"run {call}", model=model, service_s=service_s)
        commands += core.handle(one, now)
    return commands


# --- for a model that has no worker -------------------------------------------------------------


def taken(*workers: WorkerInfo) -> Scheduler:
    """A call on each of these workers of x, and at 10 one of y, which has its place on d1."""
    core = cluster(*workers, on(1, "y", STOPPED))
    went = places(come(core, "x", *(f"x{w.device}" for w in workers), now=1.0, service_s=99.0))
    assert went == [w.worker for w in workers]
    assert come(core, "y", "y1", now=10.0) == []
    return core


def test_a_busy_worker_takes_no_more_calls_if_its_model_has_another() -> None:
    """A second after the call has come, and not before."""
    core = taken(on(0, "x", window=9), on(1, "x", window=9))
    assert core.handle(Tick(), 10.9) == []
    assert places(come(core, "x", "a", "b", now=10.95)) == ["n/d0/x", "n/d1/x"]
    core.handle(Tick(), 11.0)
    assert places(come(core, "x", "c", "d", now=11.1)) == ["n/d0/x"] * 2
    assert moves(core.handle(CallFinished("xd1"), 12.0)) == []
    [away] = core.handle(CallFinished("b"), 12.5)
    assert moves([away]) == [("n/d1/x", DISK)]
    assert moves(done(core, away, stopped(on(1, "x")), 14.0)) == [("n/d1/y", DEVICE)]


def test_the_only_busy_worker_of_a_model_serves_on_until_patience_is_over() -> None:
    core = taken(on(1, "x", window=9))
    core.handle(Tick(), 24.9)
    assert places(come(core, "x", "a", now=24.95)) == ["n/d1/x"]
    core.handle(Tick(), 25.0)
    assert places(come(core, "x", "b", now=25.1)) == []


def test_a_worker_that_was_to_leave_serves_again_once_nobody_wants_its_place() -> None:
    core = taken(on(0, "x"), on(1, "x", window=9))
    core.handle(Tick(), 11.0)
    assert come(core, "x", "a", now=11.5) == []
    commands = core.handle(CallCancelled("y1"), 12.0) + core.handle(Tick(), 12.1)
    assert places(commands) == ["n/d1/x"]


# --- for a further worker -----------------------------------------------------------------------


@pytest.mark.parametrize("idle_s, leaves", [(99.0, False), (101.0, True)])
def test_a_further_worker_takes_the_place_of_a_model_that_is_seldom_used(
    idle_s: float, leaves: bool
) -> None:
    core = cluster(on(0, "m"), on(1, "m", STOPPED), on(1, "x"))
    come(core, "x", "x1", now=50.0)
    core.handle(CallFinished("x1"), 51.0)
    come(core, "m", "a", "b", now=60.0)
    assert moves(core.handle(Tick(), 90.0)) == []
    assert moves(core.handle(Tick(), 50.0 + idle_s)) == [("n/d1/x", DISK)] * leaves


@pytest.mark.parametrize(
    "service_s, at, leaves",
    [(1.0, 15.1, True), (60.0, 15.1, False), (60.0, 25.1, True)],
    ids=["it has little to do", "it has much to do", "the calls have waited for long"],
)
def test_a_further_worker_takes_one_of_several_busy_ones_of_a_model_with_little_to_do(
    service_s: float, at: float, leaves: bool
) -> None:
    core = cluster(on(0, "m"), on(1, "m", STOPPED), on(1, "x"), on(2, "x"))
    come(core, "x", "x1", "x2", now=1.0, service_s=service_s)
    come(core, "m", "a", "b", now=10.0, service_s=90.0)
    core.handle(Tick(), at)
    assert dict(core._world.draining) == ({"n/d1/x": "m"} if leaves else {})


def test_nor_is_it_taken_from_a_model_with_half_as_much_to_do() -> None:
    for service_s, leaves in (1.0, False), (30.0, True):
        core = cluster(on(0, "m"), on(1, "m", STOPPED), on(1, "x"), on(2, "x"))
        come(core, "x", "x1", "x2", now=1.0, service_s=2.0)
        come(core, "m", "a", "b", now=10.0, service_s=service_s)
        core.handle(Tick(), 15.1)
        assert bool(core._world.draining) == leaves


# --- another place for what stands in the way ---------------------------------------------------


def in_the_way(service_s: float = 1.0, capacity: int = 1100) -> Scheduler:
    """The further worker of m has its place on d1, where the only one of x is used now and then;
    d2 is free, and x could be there. A call of m waits since 50."""
    infos = on(0, "m"), on(1, "m", STOPPED), on(1, "x"), on(2, "x", STOPPED)
    core = cluster(*infos, capacity=capacity)
    come(core, "x", "x1", now=40.0, service_s=service_s)
    core.handle(CallFinished("x1"), 41.0)
    come(core, "m", "a", "b", now=50.0, service_s=90.0)
    return core


def test_a_model_with_little_to_do_makes_place_by_going_elsewhere() -> None:
    core = in_the_way()
    [there] = core.handle(Tick(), 55.1)
    assert moves([there]) == [("n/d2/x", DEVICE)]
    assert moves(core.handle(Tick(), 58.0)) == [], "it stays while it has no other worker"
    [away] = done(core, there, ready(on(2, "x")), 60.0)
    assert moves([away]) == [("n/d1/x", DISK)]
    assert moves(done(core, away, stopped(on(1, "x")), 62.0)) == [("n/d1/m", DEVICE)]


def test_a_model_with_much_to_do_stays_where_it_is() -> None:
    core = in_the_way(service_s=100.0)
    assert moves(core.handle(Tick(), 55.1)) == []
    assert moves(core.handle(Tick(), 64.0)) == []
    assert moves(core.handle(Tick(), 65.1)) == [("n/d2/x", DEVICE)], "for so long nobody waits"


def test_a_model_that_is_not_in_the_way_stays_where_it_is() -> None:
    core = in_the_way(capacity=2200)
    assert moves(core.handle(Tick(), 52.0)) == []
    assert moves(core.handle(Tick(), 55.1)) == [("n/d1/m", DEVICE)]


def test_a_worker_that_was_to_leave_for_a_further_one_takes_no_calls_meanwhile() -> None:
    core = cluster(on(0, "m"), on(1, "m", STOPPED), on(1, "x", window=9), on(2, "x", window=9))
    come(core, "x", "x1", "x2", now=1.0)
    come(core, "m", "a", "b", now=10.0, service_s=90.0)
    core.handle(Tick(), 15.1)
    assert places(come(core, "x", "x3", "x4", now=15.2)) == ["n/d2/x"] * 2
    core.handle(CallFinished("x1"), 15.3)
    assert moves(core.handle(Tick(), 16.0)) == [("n/d1/x", DISK)]


# --- for KV memory ------------------------------------------------------------------------------


def crowded(*others: WorkerInfo) -> list[tuple[str, Residency]]:
    """A call lacks ten bytes of KV on d0, which the suspended process of x there would free."""
    x = suspended(replace(tiered("x"), worker="n/d0/x", device="d0"))
    mine = replace(tiered("m"), worker="n/d0/m", device="d0")
    core = cluster(mine, x, *others, capacity=ALIVE + RESIDUAL)
    commands = core.handle(arrival("a", kv=FLOOR + RESIDUAL), 1.0)
    core.validate()
    return moves(commands)


def test_a_suspended_process_ends_for_kv_memory_if_its_model_is_served_elsewhere() -> None:
    elsewhere = replace(tiered("x"), worker="n/d1/x", device="d1")
    assert crowded(elsewhere) == [("n/d0/x", DISK)]
    assert crowded() == [], "its model would have to start anew"
    assert crowded(suspended(elsewhere)) == []
