"""The account of bytes: what each device has promised to weights, KV limits and residuals, and
each host to copies of weights.

This is the promise; the node agent's measurement may refuse what it forbids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ._nouns import NodeInfo, Residency, WorkerInfo, WorkerState

_GONE = (WorkerState.STOPPED, WorkerState.FAILED)
_NEEDS_COPY = (WorkerState.SUSPENDING, WorkerState.SUSPENDED, WorkerState.RESUMING)
"""The copy of a worker on the device is spare: the node gives it up for another's."""
_ALIVE = (Residency.DEVICE, Residency.HOST, Residency.PARKED)


@dataclass(frozen=True, slots=True)
class Kept:
    """KV bytes that are held for a run's next call of a model, until `until` (seconds)."""

    run: str
    model: str
    size: int
    until: float


@dataclass(slots=True)
class Claim:
    """One worker's share of its device and host; what calls hold of its KV limit. Bytes.

    While something is changing, `kv_limit` is the larger and `kv_usable` the smaller of the limits
    before and after.
    """

    worker: str
    node: str
    device: str
    weights: int
    kv_limit: int
    kv_usable: int
    residual: int
    host: int = 0
    kv_floor: int = 0
    """So much is never given to kept prefixes."""
    reservations: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    """By the call whose prefix it is."""

    @property
    def total(self) -> int:
        return self.weights + self.kv_limit + self.residual

    @property
    def kv_reserved(self) -> int:
        return sum(self.reservations.values())

    @property
    def kv_kept(self) -> int:
        return sum(kept.size for kept in self.kept.values())

    @property
    def kv_used(self) -> int:
        return self.kv_reserved + self.kv_kept

    @property
    def kv_free(self) -> int:
        return self.kv_usable - self.kv_used

    @property
    def kv_keepable(self) -> int:
        """What further prefixes may be kept in: a longest request has its room besides."""
        return min(self.kv_free, self.kv_usable - self.kv_floor - self.kv_kept)

    @property
    def kv_needed(self) -> int:
        """The least limit that what is held now allows."""
        return max(self.kv_used, self.kv_floor + self.kv_kept if self.kept else 0)


class Ledger:
    """Claims by worker. A device key is `node/device`."""

    def __init__(self) -> None:
        self.capacity: dict[str, int] = {}
        self.host_capacity: dict[str, int] = {}
        self.measured: dict[str, int] = {}
        self.claims: dict[str, Claim] = {}

    def add_node(self, node: NodeInfo) -> None:
        for device in node.devices:
            self.capacity[device_key(node.node, device.device)] = device.capacity_bytes
        self.host_capacity[node.node] = node.host_capacity_bytes

    def drop_node(self, node: str) -> None:
        """Forget the devices of a lost node with every claim on them."""
        mine = f"{node}/"
        self.capacity = {k: size for k, size in self.capacity.items() if not k.startswith(mine)}
        self.measured = {k: size for k, size in self.measured.items() if not k.startswith(mine)}
        self.host_capacity.pop(node, None)
        self.claims = {w: c for w, c in self.claims.items() if c.node != node}

    def free(self, device: str) -> int:
        return self.capacity.get(device, 0) - sum(c.total for c in self.on_device(device))

    def host_free(self, node: str) -> int:
        used = sum(c.host for c in self.claims.values() if c.node == node)
        return self.host_capacity.get(node, 0) - used

    def on_device(self, device: str) -> list[Claim]:
        return [c for c in self.claims.values() if c.device == device]

    def set(self, claim: Claim) -> None:
        """Promise a worker its memory; what is held inside stays, as far as there is room."""
        old = self.claims.get(claim.worker)
        if old is not None:
            for call, size in old.reservations.items():
                claim.reservations[call] = min(size, claim.kv_free)  # the limit may have shrunk
            for call, kept in old.kept.items():
                if kept.size <= claim.kv_keepable:
                    claim.kept[call] = kept
        self.claims[claim.worker] = claim

    def release_worker(self, worker: str) -> None:
        self.claims.pop(worker, None)

    def reserve(self, worker: str, call: str, size: int) -> bool:
        """Reserve KV bytes for a call; False when they do not fit."""
        claim = self.claims[worker]
        if size > claim.kv_free:
            return False
        claim.reservations[call] = size
        return True

    def restore(self, worker: str, call: str, size: int) -> None:
        """Give a call that runs on the worker its reservation back, as far as there is room."""
        self.claims[worker].reservations.setdefault(call, 0)
        self.grow(worker, call, size)

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


def held_by(
    info: WorkerInfo, *, bound_for: Residency | None, limits: tuple[int, ...], old: Claim | None
) -> Claim | None:
    """What a worker holds, or None for nothing: the larger of before and after.

    `bound_for` is where a move under way takes it, `limits` are KV limits that were asked of it
    and may come into force at any moment.
    """
    if info.state in _GONE and bound_for not in _ALIVE:
        return None
    if bound_for is Residency.DEVICE and not info.elastic:
        limits = (kv_most(info),)  # what it gave up while it was suspended comes back with it
    elif info.state not in (*_GONE, WorkerState.STARTING):
        limits = (*limits, info.kv_limit_bytes)
    elif not limits:  # what died on its way tells of its next start: it holds what it held
        held = old if info.state in _GONE else None
        limits = (held.kv_limit if held else info.kv_limit_bytes,)
    host = info.host_bytes if info.state in _NEEDS_COPY else 0
    if bound_for is Residency.HOST:
        host = max(host, copy_bytes(info))
    return Claim(
        info.worker,
        info.node,
        device_key(info.node, info.device),
        weights=_weights(info, bound_for, old),
        kv_limit=max(limits),
        kv_usable=min(limits),
        residual=info.residual_bytes,
        host=host,
        kv_floor=info.kv_floor_bytes,
    )


def _weights(info: WorkerInfo, bound_for: Residency | None, old: Claim | None) -> int:
    if info.state is WorkerState.SUSPENDED and bound_for is not Residency.DEVICE:
        return 0
    if info.state is WorkerState.STOPPING and old is not None:
        return min(info.weights_bytes, old.weights)  # it may have been suspended
    return info.weights_bytes


def copy_bytes(info: WorkerInfo) -> int:
    """What a copy of the weights takes in host memory; as much as on the device, until told."""
    return info.host_copy_bytes or info.weights_bytes


def device_key(node: str, device: str) -> str:
    return f"{node}/{device}"


def least_bytes(info: WorkerInfo) -> int:
    """What a worker needs on its device: weights + the least KV limit + residual."""
    return info.weights_bytes + kv_least(info) + info.residual_bytes


def kv_most(info: WorkerInfo) -> int:
    """The largest KV limit that a worker can have."""
    return max(info.kv_max_bytes, info.kv_limit_bytes)


def kv_aside(info: WorkerInfo, claim: Claim) -> int:
    """The KV it holds once its weights are aside: a cache of one size goes with them, all of it,
    unless something is held in it."""
    return claim.kv_limit if info.elastic or claim.kv_used else 0


def kv_least(info: WorkerInfo) -> int:
    """The smallest: its floor, where it has one and can move."""
    most = kv_most(info)
    return min(info.kv_floor_bytes, most) if info.elastic and info.kv_floor_bytes else most


def kv_step(info: WorkerInfo) -> int:
    """Limits move in eighths of the largest, so that they do not follow every call (ours)."""
    return max(1, kv_most(info) // 8)


def kv_rounded(info: WorkerInfo, size: int) -> int:
    """`size` as a KV limit: up to the next step, within what the worker can have."""
    step = kv_step(info)
    return min(kv_most(info), max(kv_least(info), -(-size // step) * step))
