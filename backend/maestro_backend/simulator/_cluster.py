"""A simulated cluster: nodes with devices, and which models each device may hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._hardware import DeviceProfile, ModelGeometry


@dataclass(frozen=True, slots=True)
class SimDevice:
    """A device, or a group of `devices` that a tensor-parallel model spans.

    `models` may live here; `static` is the one that stays where models do not move.
    """

    name: str
    profile: DeviceProfile
    models: tuple[str, ...]
    static: str
    devices: int = 1

    @property
    def capacity_bytes(self) -> int:
        """What engines may use of it, over all its devices."""
        return self.profile.capacity_bytes * self.devices


@dataclass(frozen=True, slots=True)
class SimNode:
    """One host. `rtt_s` is the round trip from the gateway to it; `disk` bytes/s from its disk."""

    name: str
    devices: tuple[SimDevice, ...]
    host_bytes: int
    disk: float
    cluster: str = "local"
    rtt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """All of it. `kv_bytes`: the KV cache of a model where its size is fixed, by model."""

    name: str
    nodes: tuple[SimNode, ...]
    models: dict[str, ModelGeometry]
    kv_bytes: dict[str, int] = field(default_factory=dict)
    max_num_seqs: int = 64
    """Calls in an engine at once."""
    max_batched_tokens: int = 8192
    """Of one engine step: decodes first, then chunks of prompts."""
