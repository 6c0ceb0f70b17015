"""How to make room on a device: the gentlest steps that free enough bytes.

Idle workers' KV shrinks to its floor, then that of busy ones to what is in use, then weights of
idle workers leave the device. A process is stopped only where its residual itself is needed: where
putting all weights aside would not be enough. First come those whose model has another ready
worker, then the least recently used; what a run expects last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from ._commands import SetKvLimit, SetResidency
from ._eviction import HORIZON_S, Resident, Rhythm, choose, worth
from ._ledger import copy_bytes, device_of, kv_aside, kv_least, kv_rounded, kv_step
from ._nouns import Residency, WorkerInfo, WorkerState
from ._world import Action, World

_SETTLED = (WorkerState.READY, WorkerState.SUSPENDED)
_LEAST_BACK_S = 1.0
"""Coming back takes so long at the least, also where nothing was learned yet (ours)."""
_PREFILL_TOKENS_S = 5000.0
"""Of kept prefixes, that would have to be prefilled again (ours)."""
_SPARE = 0.01
"""What coming back costs a worker whose model has another ready one, as a share (ours)."""

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
    for step in chain(room.shrinks(), room.evictions()):
        if _gain(plan) < short:
            plan[step.worker.worker] = step
    kinds = [room.suspends]
    if at_any_price or room.without_weights() < short:
        kinds.append(room.stops)
    for kind in kinds:
        for step in room.least(list(kind()), plan, short - _gain(plan)):
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
        device = device_of(wanted)
        self._others = [w for w in world.on_device(device) if w.worker != wanted.worker]
        neighbours = (
            w
            for w in self._others
            if w.state in _SETTLED
            and world.move_of(w.worker) is None
            and not world.resting(w.worker, now)
        )
        self._neighbours = sorted(neighbours, key=self._worth)

    def _worth(self, info: WorkerInfo) -> tuple[float, str]:
        one = resident(self._world, info, self._now, Residency.HOST)
        return worth(one, self._now, HORIZON_S), info.worker

    def least(self, steps: list[Step], plan: Mapping[str, Step], short: int) -> list[Step]:
        """The steps whose workers are worth the least that free so much more than the plan; all
        of them if that is not enough."""
        residents = [
            resident(self._world, step.worker, self._now, step.residency, _more(step, plan))
            for step in steps
            if step.residency is not None
        ]
        chosen = choose(residents, short, self._now, HORIZON_S)
        names = {one.worker for one in residents if chosen is None or one in chosen}
        return [step for step in steps if step.worker.worker in names]

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
            gain = claim.weights + claim.kv_limit - kv_aside(info, claim)
            yield Step(info, gain, residency=tier)

    def without_weights(self) -> int:
        """Bytes that would be free if all KV were shrunk and all weights put aside that can be,
        also of workers that are busy now. What has just failed does not count."""
        promised: dict[str, int] = {}
        return sum(self._could_free(info, promised) for info in self._others)

    def _could_free(self, info: WorkerInfo, promised: dict[str, int]) -> int:
        world, claim = self._world, self._world.ledger.claims[info.worker]
        room = world.ledger.host_free(info.node) - promised.get(info.node, 0)
        tier = put_aside(info, tiers_of(world, info), room)
        if tier is None or info.model in world.settings.pinned or not claim.weights:
            resting = world.limit_resting(info.worker, self._now) or info.worker in world.changes
            fixed = resting or not info.elastic or not claim.weights
            return 0 if fixed else max(0, claim.kv_limit - kv_least(info))
        if tier is Residency.HOST:
            promised[info.node] = promised.get(info.node, 0) + copy_bytes(info)
        return claim.weights + claim.kv_limit - kv_aside(info, claim)

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


def resident(
    world: World, info: WorkerInfo, now: float, to: Residency | None = None, size: int = 0
) -> Resident:
    """A worker that would free `size` bytes by going as far as `to`; None: that comes."""
    back_s = info.activation_s.get(to or info.residency, 0.0)
    if to is not None and info.residency is not Residency.DEVICE:
        back_s -= info.activation_s.get(info.residency, 0.0)
    claim = world.ledger.claims.get(info.worker)
    kept = 0 if claim is None else claim.kv_kept
    back_s = max(back_s, _LEAST_BACK_S) + kept / info.kv_bytes_per_token / _PREFILL_TOKENS_S
    if world.spare(info):
        back_s *= _SPARE
    used = world.last_used.get(info.worker, 0.0)
    rhythm = Rhythm(used, world.rhythms.get(info.model, Rhythm(used)).gap_s)
    return Resident(info.worker, size, back_s, rhythm, world.runs.expecting(info.model))


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


def _more(step: Step, plan: Mapping[str, Step]) -> int:
    """What it frees more than the step that the plan has for its worker."""
    before = plan.get(step.worker.worker)
    return step.gain - (before.gain if before else 0)


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
