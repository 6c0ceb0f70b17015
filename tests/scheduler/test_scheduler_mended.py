"""Defects that a review found, each with the scene that showed it."""

from __future__ import annotations

from dataclasses import replace

from scheduler.scenes import (
    GIB,
    MOST,
    arrival,
    dispatched,
    scheduler,
    stopped,
    tiered,
    worker,
)

from maestro_backend.scheduler import (
    CallCancelled,
    CallFinished,
    CallProgress,
    Command,
    CommandApplied,
    CommandFailed,
    DeviceInfo,
    DropPrefix,
    Event,
    ForecastCall,
    ForecastChanged,
    Length,
    NodeInfo,
    NodeJoined,
    Reject,
    Residency,
    RunEnded,
    Scheduler,
    SetResidency,
    Tick,
    WorkerChanged,
    WorkerInfo,
    WorkerState,
)
from maestro_backend.scheduler.policies import policy


def on(device: str, model: str, *, is_ready: bool, kv: int = 1000, window: int = 1) -> WorkerInfo:
    return WorkerInfo(
        f"n/{device}/{model}",
        "n",
        device,
        model,
        WorkerState.READY if is_ready else WorkerState.STOPPED,
        Residency.DEVICE if is_ready else Residency.DISK,
        GIB,
        kv_limit_bytes=kv,
        host_copy_bytes=GIB,
        tiers=(Residency.DEVICE, Residency.HOST, Residency.DISK),
        max_inflight=window,
    )


def two_devices(*workers: WorkerInfo, rule: str = "fcfs", capacity: int = GIB + 2000) -> Scheduler:
    core = Scheduler(policy(rule))
    devices = (DeviceInfo("g0", capacity), DeviceInfo("g1", capacity))
    core.handle(NodeJoined(NodeInfo("n", devices, workers, 8 * GIB)), 0.0)
    return core


def expecting(run: str, in_s: float, *, stage: str = "s", model: str = "m") -> ForecastChanged:
    call = ForecastCall(stage, "", model, 0.9, in_s, 1, Length(1, 2), 1.0)
    return ForecastChanged(run, (call,))


def moves(commands: list[Command]) -> list[SetResidency]:
    return [command for command in commands if isinstance(command, SetResidency)]


def test_a_further_worker_that_fails_takes_nothing_from_the_first() -> None:
    """The model's other worker, put away meanwhile, comes back for the next call."""
    first = on("g0", "a", is_ready=True)
    others = on("g1", "a", is_ready=False), on("g0", "b", is_ready=False)
    core = two_devices(first, *others)
    core.handle(arrival("a1", "r1", model="a"), 0.1)
    core.handle(arrival("a2", "r2", model="a"), 0.2)
    told = [command for now in (1.2, 2.2, 3.2) for command in core.handle(Tick(), now)]
    [start] = moves(told)
    assert start.worker == "n/g1/a"
    core.handle(CommandFailed(start.id, "no memory on g1"), 3.3)
    core.handle(CallFinished("a1"), 3.4)
    core.handle(CallFinished("a2"), 3.5)
    [aside] = moves(core.handle(arrival("b1", "r3", model="b"), 3.6))
    assert (aside.worker, aside.residency) == ("n/g0/a", Residency.HOST)
    suspended = replace(
        first, state=WorkerState.SUSPENDED, residency=Residency.HOST, host_bytes=GIB
    )
    core.handle(WorkerChanged(replace(suspended, kv_limit_bytes=0)), 3.7)
    core.handle(CommandApplied(aside.id), 3.8)
    core.handle(CommandFailed(_only_start(core), "not needed here"), 3.9)
    later = core.handle(arrival("a3", "r4", model="a"), 4.0) + core.handle(Tick(), 5.0)
    core.validate()
    assert not [command for command in later if isinstance(command, Reject)]


def _only_start(core: Scheduler) -> int:
    [command] = core._world.moves
    return command


def test_a_model_that_failed_is_tried_again_after_its_pause_though_nothing_has_changed() -> None:
    core = scheduler(stopped(worker("a")), worker("b"))
    [start] = moves(core.handle(expecting("r", 100.0, model="a"), 1.0))
    core.handle(CommandFailed(start.id, "no memory"), 2.0)
    told = [command for now in range(3, 60) for command in core.handle(Tick(), float(now))]
    assert [command.model for command in moves(told)] == ["a"]


def test_a_worker_that_was_set_aside_and_has_filled_up_since_hides_no_other() -> None:
    core = two_devices(
        on("g0", "m", is_ready=True, window=8),
        on("g1", "m", is_ready=True, window=8, kv=900),
        rule="sjf",
    )
    events: tuple[Event, ...] = (
        arrival("x0", "r0", kv=500),
        arrival("x1", "r1", kv=500),
        arrival("large", "r2", kv=700, service_s=5.0),
        CallProgress("x0", 0, 950),
    )
    for number, event in enumerate(events):
        core.handle(event, 0.01 * number)
    assert dispatched(core.handle(arrival("small", "r3", kv=300, service_s=0.5), 0.1)) == ["small"]
    core.validate()


def test_a_prefix_that_was_taken_over_is_dropped_when_its_run_is_over_already() -> None:
    core = scheduler(tiered("m", kv=MOST))
    core.handle(arrival("a", kv=50), 0.1)
    core.handle(expecting("r", 1.0), 0.2)
    core.handle(CallFinished("a", 20, 20), 0.3)
    core.handle(arrival("b", kv=50), 0.4)
    core.handle(CallCancelled("b"), 0.5)
    told = core.handle(RunEnded("r"), 0.6)
    assert [command.call for command in told if isinstance(command, DropPrefix)] == ["a"]


def test_a_worker_that_serves_another_model_serves_the_first_no_more() -> None:
    first = worker("a")
    core = scheduler(first, replace(stopped(worker("a")), worker="n/other"))
    core.handle(arrival("before", "q", model="a"), 0.3)
    core.handle(CallFinished("before"), 0.6)
    core.handle(Tick(), 0.8)
    core.handle(WorkerChanged(replace(first, model="b")), 1.0)
    told = core.handle(arrival("c", model="a"), 2.0)
    assert [command.worker for command in moves(told)] == ["n/other"]
