"""The account of bytes: what each device has promised to weights, KV limits and residuals, and
each host to copies of weights.

This is the promise; the node agent's measurement may refuse what it forbids.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    kv_reserved: int = 0
    """The sum of the reservations."""
    kv_kept: int = 0
    """The sum of what is kept."""
    number: int = 0
    """Claims are in this order everywhere."""

    @property
    def total(self) -> int:
        return self.weights + self.kv_limit + self.residual

    @property
    def kv_used(self) -> int:
        return self.kv_reserved + self.kv_kept

    @property
    def kv_free(self) -> int:
        return self.kv_usable - self.kv_reserved - self.kv_kept

    @property
    def kv_keepable(self) -> int:
        """What further prefixes may be kept in: a longest request has its room besides."""
        return min(self.kv_free, self.kv_usable - self.kv_floor - self.kv_kept)

    @property
    def kv_needed(self) -> int:
        """The least limit that what is held now allows."""
        return max(self.kv_used, self.kv_floor + self.kv_kept if self.kept else 0)

    def hold(self, call: str, size: int) -> None:
        """`call` holds `size` bytes from now on."""
        self.kv_reserved += size - self.reservations.get(call, 0)
        self.reservations[call] = size

    def let_go(self, call: str) -> None:
        self.kv_reserved -= self.reservations.pop(call, 0)

    def keep(self, call: str, kept: Kept) -> None:
        self.forget(call)
        self.kept[call] = kept
        self.kv_kept += kept.size

    def forget(self, call: str) -> None:
        """The prefix of `call` is not kept any more."""
        if kept := self.kept.pop(call, None):
            self.kv_kept -= kept.size


class Ledger:
    """Claims by worker. A device key is `node/device`."""

    def __init__(self) -> None:
        self.capacity: dict[str, int] = {}
        self.host_capacity: dict[str, int] = {}
        self.measured: dict[str, int] = {}
        self.claims: dict[str, Claim] = {}
        self.freed: set[str] = set()
        """Workers whose KV bytes in use, or limits, have changed; emptied by whoever reads it."""
        self._by_device: dict[str, dict[str, Claim]] = {}
        self._promised: dict[str, int] = {}
        self._promised_of_host: dict[str, int] = {}
        self._claims_made = 0

    def add_node(self, node: NodeInfo) -> None:
        for device in node.devices:
            self.capacity[device_key(node.node, device.device)] = device.capacity_bytes
        self.host_capacity[node.node] = node.host_capacity_bytes

    def drop_node(self, node: str) -> None:
        """Forget the devices of a lost node with every claim on them."""
        mine = f"{node}/"
        for worker in [c.worker for c in self.claims.values() if c.node == node]:
            self.release_worker(worker)
        self.capacity = {k: size for k, size in self.capacity.items() if not k.startswith(mine)}
        self.measured = {k: size for k, size in self.measured.items() if not k.startswith(mine)}
        self.host_capacity.pop(node, None)

    def free(self, device: str) -> int:
        return self.capacity.get(device, 0) - self._promised.get(device, 0)

    def host_free(self, node: str) -> int:
        return self.host_capacity.get(node, 0) - self._promised_of_host.get(node, 0)

    def on_device(self, device: str) -> Iterable[Claim]:
        return self._by_device.get(device, {}).values()

    def set(self, claim: Claim) -> None:
        """Promise a worker its memory; what is held inside stays, as far as there is room."""
        old = self.claims.get(claim.worker)
        if old is not None:
            for call, size in old.reservations.items():
                claim.hold(call, min(size, claim.kv_free))  # the limit may have shrunk
            for call, kept in old.kept.items():
                if kept.size <= claim.kv_keepable:
                    claim.keep(call, kept)
            self._promise(old, -1)
            if old.device != claim.device:
                del self._by_device[old.device][old.worker]
            claim.number = old.number
        else:
            self._claims_made += 1
            claim.number = self._claims_made
        self._promise(claim, 1)
        self.claims[claim.worker] = claim
        self._by_device.setdefault(claim.device, {})[claim.worker] = claim
        self.freed.add(claim.worker)

    def release_worker(self, worker: str) -> None:
        if claim := self.claims.pop(worker, None):
            self._promise(claim, -1)
            del self._by_device[claim.device][worker]

    def reserve(self, worker: str, call: str, size: int) -> bool:
        """Reserve KV bytes for a call; False when they do not fit."""
        claim = self.claims[worker]
        if size > claim.kv_free:
            return False
        claim.hold(call, size)
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
        if size > held:
            claim.hold(call, max(held, min(size, held + claim.kv_free)))

    def release(self, worker: str, call: str) -> None:
        """Free a call's reservation. The worker's claim may be gone already."""
        if claim := self.claims.get(worker):
            claim.let_go(call)
            self.freed.add(worker)

    def keep(self, worker: str, call: str, kept: Kept) -> None:
        """Hold the prefix of a call that ended on the worker."""
        self.claims[worker].keep(call, kept)

    def forget(self, worker: str, call: str) -> None:
        """Hold it no longer. The worker's claim may be gone already."""
        if claim := self.claims.get(worker):
            claim.forget(call)
            self.freed.add(worker)

    def _promise(self, claim: Claim, sign: int) -> None:
        device, host = self._promised, self._promised_of_host
        device[claim.device] = device.get(claim.device, 0) + sign * claim.total
        host[claim.node] = host.get(claim.node, 0) + sign * claim.host


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
        device_of(info),
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


def device_of(info: WorkerInfo) -> str:
    """The key of a worker's device."""
    return device_key(info.node, info.device)


def least_bytes(info: WorkerInfo) -> int:
    """What a worker needs on its device: weights + the least KV limit + residual."""
    return info.weights_bytes + kv_least(info) + info.residual_bytes


def kv_most(info: WorkerInfo) -> int:
    """The largest KV limit that a worker can have."""
    return max(info.kv_max_bytes, info.kv_limit_bytes)


def kv_aside(info: WorkerInfo, claim: Claim) -> int:
    """The KV it holds once its weights are aside: a cache of one size goes with them, all of it,
    unless something is held in it."""
    return claim.kv_used if info.elastic else claim.kv_limit if claim.kv_used else 0


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
