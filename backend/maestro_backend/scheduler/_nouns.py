"""The shared nouns of scheduler and node: where weights are, what a worker is doing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Residency(StrEnum):
    """Where a model's weights are."""

    DEVICE = "device"
    HOST = "host"
    PARKED = "parked"
    DISK = "disk"
    REMOTE = "remote"


class WorkerState(StrEnum):
    """What a worker is doing. Only a READY worker takes calls."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker as its node reports it. Sizes are bytes; `max_inflight` is a number of calls.

    `kv_bytes_per_token` and `kv_limit_bytes` come from the model's geometry and the engine's own
    block count. `detail` says in words what it is doing or what went wrong.
    """

    worker: str
    node: str
    device: str
    model: str
    state: WorkerState
    residency: Residency
    weights_bytes: int = 0
    kv_limit_bytes: int = 0
    kv_bytes_per_token: int = 1
    residual_bytes: int = 0
    max_inflight: int = 1
    max_model_len: int = 0
    restarts: int = 0
    pid: int | None = None
    address: str = ""
    """Unix socket path of the OpenAI server, empty while there is none."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device: a GPU, or a CPU memory budget. Capacity in bytes."""

    device: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node: its devices and all its workers."""

    node: str
    devices: tuple[DeviceInfo, ...]
    workers: tuple[WorkerInfo, ...] = ()
