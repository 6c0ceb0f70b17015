"""How to make room on a device: the gentlest steps that free enough bytes.

Idle workers' KV shrinks to its floor, then that of busy ones to what is in use, then weights of
idle workers leave the device. A process is stopped only where its residual itself is needed: where
putting all weights aside would not be enough. First come those whose model has another ready
worker, then the least recently used; what a run expects last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ._commands import SetKvLimit, SetResidency
from ._ledger import copy_bytes, device_key, kv_aside, kv_least, kv_rounded, kv_step
from ._nouns import Residency, WorkerInfo, WorkerState
from ._world import Action, World

_SETTLED = (WorkerState.READY, WorkerState.SUSPENDED)

Leaves = Callable[[WorkerInfo], bool]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do to a worker, and the bytes it frees. Without a residency: a KV limit."""

    worker: WorkerInfo
    gain: int
    kv_limit: int | None = None
    residency: Residency | None = None
    evicts: bool = False
    """It takes cached prefixes from a worker in use."""


def find_room(
    world: World,
    wanted: WorkerInfo,
    short: int,
    now: float,
    leaves: Leaves,
    ends: Leaves | None = None,
    *,
    at_any_price: bool = False,
) -> list[Step] | None:
    """Steps that free `short` bytes on the device of `wanted`; None if all would not be enough.

    `leaves` says which workers may give up their weights, `ends` which may be stopped: the same
    ones, if it is not given. `at_any_price` stops a process also where waiting might do.
    """
    plan: dict[str, Step] = {}
    room = Room(world, wanted, now, leaves, ends or leaves)
    kinds = [room.shrinks, room.evictions, room.suspends]
    if at_any_price or room.without_weights() < short:
        kinds.append(room.stops)
    for kind in kinds:
        for step in kind():
            if _gain(plan) >= short:
                break
            plan.pop(step.worker.worker, None)  # the harder step frees what the gentler does
            plan[step.worker.worker] = step
    return _needed(plan, short) if _gain(plan) >= short else None


class Room:
    """The neighbours of one worker, and what each could give."""

    def __init__(
        self, world: World, wanted: WorkerInfo, now: float, leaves: Leaves, ends: Leaves
    ) -> None:
        self._world = world
        self._now = now
        self._leaves = leaves
        self._ends = ends
        device = device_key(wanted.node, wanted.device)
        self._others = [w for w in world.on_device(device) if w.worker != wanted.worker]
        neighbours = (
            w
            for w in self._others
            if w.state in _SETTLED
            and world.move_of(w.worker) is None
            and not world.resting(w.worker, now)
        )
        self._neighbours = sorted(neighbours, key=self._worth)

    def _worth(self, info: WorkerInfo) -> tuple[bool, bool, float, float, str]:
        at = self._world.runs.expected_at(info.model)
        used = self._world.last_used.get(info.worker, 0.0)
        needed = not self._world.spare(info)
        return (needed, at is not None, -(at or 0.0), used, info.worker)

    def shrinks(self) -> Iterator[Step]:
        """The KV of idle workers, down to the floor or what is kept."""
        for info in self._neighbours:
            if self._world.idle(info) and (step := self._shrink(info, self._needed(info))):
                yield step

    def evictions(self) -> Iterator[Step]:
        """The KV of busy workers, down to a step above what is in use; not where calls wait."""
        for info in self._neighbours:
            calls = self._world.calls
            if calls.on_worker(info.worker) and not calls.queued(info.model):
                used = kv_rounded(info, self._needed(info) + kv_step(info))
                if step := self._shrink(info, used, evicts=True):
                    yield step

    def suspends(self) -> Iterator[Step]:
        """The weights of workers that may leave; their processes stay."""
        promised: dict[str, int] = {}
        for info in self._neighbours:
            if info.state is not WorkerState.READY or not self._leaves(info):
                continue
            room = self._world.ledger.host_free(info.node) - promised.get(info.node, 0)
            tier = put_aside(info, tiers_of(self._world, info), room)
            if tier is None:
                continue
            if tier is Residency.HOST:
                promised[info.node] = promised.get(info.node, 0) + copy_bytes(info)
            claim = self._world.ledger.claims[info.worker]
            limit = min(kv_aside(info, claim), max(kv_least(info), claim.kv_needed))
            gain = claim.weights + claim.kv_limit - limit
            shrinks = info.elastic and limit < info.kv_limit_bytes
            yield Step(info, gain, limit if shrinks else None, tier)

    def without_weights(self) -> int:
        """Bytes that would be free if all KV were shrunk and all weights put aside that can be,
        also of workers that are busy now. What has just failed does not count."""
        promised: dict[str, int] = {}
        return sum(self._could_free(info, promised) for info in self._others)

    def _could_free(self, info: WorkerInfo, promised: dict[str, int]) -> int:
        world, claim = self._world, self._world.ledger.claims[info.worker]
        room = world.ledger.host_free(info.node) - promised.get(info.node, 0)
        tier = put_aside(info, tiers_of(world, info), room)
        resting = world.limit_resting(info.worker, self._now) or info.worker in world.changes
        kv = 0 if resting or not info.elastic else max(0, claim.kv_limit - kv_least(info))
        if tier is None or info.model in world.settings.pinned or not claim.weights:
            return kv
        if tier is Residency.HOST:
            promised[info.node] = promised.get(info.node, 0) + copy_bytes(info)
        if not info.elastic and not claim.kept:
            kv = claim.kv_limit
        return claim.weights + kv

    def stops(self) -> Iterator[Step]:
        """Whole processes that may leave, those without weights on the device first."""
        ready = [w.state is WorkerState.READY for w in self._neighbours]
        for _, info in sorted(zip(ready, self._neighbours, strict=True), key=lambda pair: pair[0]):
            if Residency.DISK in info.tiers and self._ends(info):
                total = self._world.ledger.claims[info.worker].total
                yield Step(info, total, residency=Residency.DISK)

    def _needed(self, info: WorkerInfo) -> int:
        return self._world.ledger.claims[info.worker].kv_needed

    def _shrink(self, info: WorkerInfo, needed: int, *, evicts: bool = False) -> Step | None:
        limit = max(kv_least(info), needed)
        world = self._world
        if not info.elastic or limit >= info.kv_limit_bytes:
            return None
        if info.worker in world.changes or world.limit_resting(info.worker, self._now):
            return None
        return Step(info, info.kv_limit_bytes - limit, limit, evicts=evicts)


def tiers_of(world: World, info: WorkerInfo) -> set[Residency]:
    """Where a worker can go: not where it was refused lately."""
    refused = world.refused.get(info.worker, frozenset())
    return set(info.tiers).intersection(world.settings.tiers) - refused


def put_aside(info: WorkerInfo, tiers: set[Residency], host_room: int) -> Residency | None:
    """The nearest tier that its weights can leave the device for; None: only by its end."""
    if Residency.HOST in tiers and copy_bytes(info) <= host_room:
        return Residency.HOST
    return Residency.PARKED if Residency.PARKED in tiers else None


def carry_out(world: World, step: Step) -> SetKvLimit | SetResidency:
    """The command of a step."""
    if step.evicts:
        world.counts[Action.PREFIX_EVICTION] += 1
    if step.residency is not None:
        return world.set_residency(step.worker, step.residency, step.kv_limit)
    assert step.kv_limit is not None
    return world.set_kv_limit(step.worker, step.kv_limit)


def _gain(plan: dict[str, Step]) -> int:
    return sum(step.gain for step in plan.values())


def _needed(plan: dict[str, Step], short: int) -> list[Step]:
    """Without the steps that a later, harder one has made needless."""
    spare = _gain(plan) - short
    needed = []
    for step in plan.values():
        if step.gain <= spare:
            spare -= step.gain
        else:
            needed.append(step)
    return needed
