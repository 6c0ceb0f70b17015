"""The shared nouns of scheduler and node: where weights are, what a worker is doing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ._kv_geometry import KvGeometry


class Residency(StrEnum):
    """Where a model's weights are, from the nearest tier to the farthest."""

    DEVICE = "device"
    HOST = "host"
    """The process lives, its weights are in host memory."""
    PARKED = "parked"
    """The process lives, its weights are only on the disk."""
    DISK = "disk"
    """No process; the checkpoint is on the local disk."""
    REMOTE = "remote"
    """Not even the checkpoint is here."""


class WorkerState(StrEnum):
    """What a worker is doing. Only a READY worker takes calls."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    SUSPENDING = "suspending"
    """Its weights are leaving the device."""
    SUSPENDED = "suspended"
    """Its process lives without weights on the device; residency says where they are."""
    RESUMING = "resuming"
    """Its weights are coming back to the device."""
    RESTARTING = "restarting"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker as its node reports it. Sizes are bytes; `max_inflight` is a number of calls.

    `kv_limit_bytes` is what its KV cache may hold now, between `kv_floor_bytes` (one request of
    `max_model_len`) and `kv_max_bytes` (what the engine is built with); only an `elastic` worker
    moves between them. While that one is suspended, it is what calls and kept prefixes hold in it,
    0 if nothing: its limit comes with the resume. Another holds all of it, or may hold none of it
    while it is suspended without calls. `kv_geometry` says what requests hold of it, in whole
    blocks; while it is None, `kv_bytes_per_token` is all that is known. `host_copy_bytes` is what a
    copy of its weights takes in host memory, `host_bytes` what it holds there now. `tiers` are the
    residencies it can be brought to, and `activation_s` the learned seconds from each to the
    device. `detail` says in words what it is doing or what went wrong.
    """

    worker: str
    node: str
    device: str
    model: str
    state: WorkerState
    residency: Residency
    weights_bytes: int = 0
    kv_limit_bytes: int = 0
    kv_floor_bytes: int = 0
    kv_max_bytes: int = 0
    kv_bytes_per_token: int = 1
    kv_geometry: KvGeometry | None = None
    elastic: bool = False
    residual_bytes: int = 0
    host_copy_bytes: int = 0
    host_bytes: int = 0
    tiers: tuple[Residency, ...] = (Residency.DEVICE, Residency.DISK)
    activation_s: Mapping[Residency, float] = field(default_factory=dict)
    max_inflight: int = 1
    max_model_len: int = 0
    restarts: int = 0
    pid: int | None = None
    address: str = ""
    """Unix socket path of the OpenAI server, empty while there is none."""
    detail: str = ""

    @property
    def most_bytes(self) -> int:
        """What it takes of its device at most."""
        kv_bytes = max(self.kv_max_bytes, self.kv_limit_bytes)
        return self.weights_bytes + kv_bytes + self.residual_bytes

    def kv_bytes_of(self, tokens: int, choices: int = 1) -> int:
        """KV bytes that a call of so many tokens (prompt and all choices) holds on it at most."""
        if self.kv_geometry is None:
            return tokens * self.kv_bytes_per_token
        return self.kv_geometry.bytes_of(tokens, choices)

    def kept_bytes_of(self, tokens: int) -> int:
        """KV bytes that the prefix of an ended call of so many tokens holds, if it is kept."""
        if self.kv_geometry is None:
            return tokens * self.kv_bytes_per_token
        return self.kv_geometry.kept_bytes_of(tokens)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device: a GPU, or a CPU memory budget. Capacity in bytes."""

    device: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node: its devices, all its workers, the budget of weights kept in host memory, and the
    seconds of a round trip to it."""

    node: str
    devices: tuple[DeviceInfo, ...]
    workers: tuple[WorkerInfo, ...] = ()
    host_capacity_bytes: int = 0
    rtt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceMeasured:
    """Bytes that the workers of a node take on one of its devices, as measured."""

    device: str
    used_bytes: int
