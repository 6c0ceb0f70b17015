"""The account of bytes: what each device has promised to weights, KV limits and residuals.

This is the promise; the node agent's measurement may refuse what it forbids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ._nouns import DeviceInfo, WorkerInfo


@dataclass(slots=True)
class Claim:
    """One worker's share of a device, and the calls' reservations inside its KV limit. Bytes."""

    worker: str
    device: str
    weights: int
    kv_limit: int
    residual: int
    reservations: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.weights + self.kv_limit + self.residual

    @property
    def kv_reserved(self) -> int:
        return sum(self.reservations.values())

    @property
    def kv_free(self) -> int:
        return self.kv_limit - self.kv_reserved


class Ledger:
    """Claims by worker. A device key is `node/device`."""

    def __init__(self) -> None:
        self.capacity: dict[str, int] = {}
        self.measured: dict[str, int] = {}
        self.claims: dict[str, Claim] = {}

    def add_device(self, node: str, device: DeviceInfo) -> None:
        self.capacity[device_key(node, device.device)] = device.capacity_bytes

    def drop_node(self, node: str) -> None:
        """Forget the devices of a lost node with every claim on them."""
        gone = [key for key in self.capacity if key.startswith(f"{node}/")]
        for key in gone:
            del self.capacity[key]
            self.measured.pop(key, None)
        self.claims = {w: c for w, c in self.claims.items() if c.device not in gone}

    def free(self, device: str) -> int:
        used = sum(c.total for c in self.claims.values() if c.device == device)
        return self.capacity.get(device, 0) - used

    def claim(self, info: WorkerInfo) -> None:
        """Promise a worker its memory, or bring its claim up to date with what it reports."""
        device = device_key(info.node, info.device)
        old = self.claims.get(info.worker)
        claim = Claim(
            info.worker, device, info.weights_bytes, info.kv_limit_bytes, info.residual_bytes
        )
        for call, size in (old.reservations if old else {}).items():
            claim.reservations[call] = min(size, claim.kv_free)  # the limit may have shrunk
        self.claims[info.worker] = claim

    def release_worker(self, worker: str) -> None:
        self.claims.pop(worker, None)

    def reserve(self, worker: str, call: str, size: int) -> bool:
        """Reserve KV bytes for a call; False when they do not fit.

        More than the whole limit is clipped to it: alone on the worker, any call may try.
        """
        claim = self.claims[worker]
        size = min(size, claim.kv_limit)
        if size > claim.kv_free:
            return False
        claim.reservations[call] = size
        return True

    def restore(self, worker: str, call: str, size: int) -> None:
        """Give a call that runs on the worker its reservation back, as far as there is room."""
        claim = self.claims[worker]
        claim.reservations.setdefault(call, min(size, claim.kv_free))

    def grow(self, worker: str, call: str, size: int) -> None:
        """Raise a reservation as far as there is room; it never shrinks."""
        claim = self.claims.get(worker)
        if claim is None or call not in claim.reservations:
            return
        held = claim.reservations[call]
        claim.reservations[call] = max(held, min(size, held + claim.kv_free))

    def release(self, worker: str, call: str) -> None:
        """Free a call's reservation. The worker's claim may be gone already."""
        if claim := self.claims.get(worker):
            claim.reservations.pop(call, None)


def device_key(node: str, device: str) -> str:
    return f"{node}/{device}"


def need_bytes(info: WorkerInfo) -> int:
    """What a worker takes on its device: weights + KV limit + residual."""
    return info.weights_bytes + info.kv_limit_bytes + info.residual_bytes
