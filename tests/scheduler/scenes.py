"""Small worlds for scheduler tests: one node, one worker per model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from maestro_backend.scheduler import (
    CallArrived,
    Command,
    DeviceInfo,
    Dispatch,
    Length,
    NodeInfo,
    NodeJoined,
    Residency,
    Scheduler,
    Settings,
    WorkerInfo,
    WorkerState,
)
from maestro_backend.scheduler.policies import policy

GIB = 2**30


def worker(
    model: str = "m", *, state: WorkerState = WorkerState.READY, window: int = 2, kv: int = 1000
) -> WorkerInfo:
    """1 GiB of weights, `kv` tokens of KV at one byte each."""
    at = Residency.DEVICE if state is WorkerState.READY else Residency.DISK
    return WorkerInfo(
        f"n/{model}", "n", "cpu", model, state, at, GIB, kv_limit_bytes=kv, max_inflight=window
    )


def node(*workers: WorkerInfo, capacity: int = 8 * GIB, host: int = 0) -> NodeInfo:
    return NodeInfo("n", (DeviceInfo("cpu", capacity),), workers, host)


def scheduler(
    *workers: WorkerInfo,
    rule: str = "fcfs",
    capacity: int = 8 * GIB,
    host: int = 0,
    settings: Settings | None = None,
) -> Scheduler:
    """A scheduler that knows one node with these workers."""
    core = Scheduler(policy(rule), settings)
    core.handle(NodeJoined(node(*workers, capacity=capacity, host=host)), 0.0)
    core.validate()
    return core


def arrival(
    call: str,
    run: str = "r",
    *,
    stage: str = "s",
    model: str = "m",
    kv: int = 10,
    service_s: float = 1.0,
    waits_for: tuple[str, ...] = (),
) -> CallArrived:
    return CallArrived(call, run, stage, model, Length(8, 16), kv, service_s, waits_for=waits_for)


def dispatched(commands: list[Command]) -> list[str]:
    """The calls that these commands dispatch, in order."""
    return [c.call for c in commands if isinstance(c, Dispatch)]


def ready(info: WorkerInfo) -> WorkerInfo:
    return replace(info, state=WorkerState.READY, residency=Residency.DEVICE)


def stopped(info: WorkerInfo) -> WorkerInfo:
    return replace(info, state=WorkerState.STOPPED, residency=Residency.DISK)


def suspended(info: WorkerInfo, residency: Residency = Residency.HOST) -> WorkerInfo:
    """An elastic one holds no KV memory then."""
    host = info.host_copy_bytes if residency is Residency.HOST else 0
    kv = 0 if info.elastic else info.kv_limit_bytes
    state = WorkerState.SUSPENDED
    return replace(info, state=state, residency=residency, host_bytes=host, kv_limit_bytes=kv)


WEIGHTS, FLOOR, MOST, RESIDUAL = 1000, 100, 800, 10
ALIVE = WEIGHTS + FLOOR + RESIDUAL
"""What a tiered worker needs on the device at the least."""


def tiered(
    model: str = "m",
    *,
    state: WorkerState = WorkerState.READY,
    kv: int = FLOOR,
    tiers: tuple[Residency, ...] = (Residency.HOST, Residency.PARKED),
    **fields: Any,
) -> WorkerInfo:
    """An elastic worker with `WEIGHTS` of weights and `kv` of KV; if suspended, in host memory."""
    info = WorkerInfo(
        f"n/{model}",
        "n",
        "cpu",
        model,
        state,
        Residency.DEVICE if state is WorkerState.READY else Residency.DISK,
        WEIGHTS,
        kv_limit_bytes=kv,
        kv_floor_bytes=FLOOR,
        kv_max_bytes=MOST,
        elastic=True,
        residual_bytes=RESIDUAL,
        host_copy_bytes=WEIGHTS,
        tiers=(Residency.DEVICE, *tiers, Residency.DISK),
        max_inflight=4,
        **fields,
    )
    return suspended(info) if state is WorkerState.SUSPENDED else info
