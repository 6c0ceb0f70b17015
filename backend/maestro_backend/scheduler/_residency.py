"""Node level: which models to bring onto a device, and which to put away.

On demand first (waiting calls, oldest first), then what runs expect (soonest first), then preload.
A model comes from whatever tier it is in. For a preload nothing makes room; for an expected model
only what is idle and not expected as soon; for a waiting call all that is idle, and, after a while,
also workers that have to be drained first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ._calls import Call
from ._commands import Command
from ._ledger import Ledger, copy_bytes, device_key, kv_most, kv_rounded
from ._nouns import Residency, WorkerInfo, WorkerState
from ._placement import kv_bytes
from ._room import Step, carry_out, find_room, tiers_of
from ._world import World

_COMING = (
    WorkerState.READY,
    WorkerState.STARTING,
    WorkerState.RESUMING,
    WorkerState.RESTARTING,
)
_NEARNESS = tuple(Residency)


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that could not be brought in: not tried again before `until`."""

    until: float
    detail: str


@dataclass(frozen=True, slots=True)
class Demand:
    """A model that should be on a device.

    `oldest` is the oldest call that waits for it; `expected_at` when a run will likely call it.
    With neither it is a preload, for which nothing else makes room.
    """

    model: str
    oldest: Call | None = None
    expected_at: float | None = None


class Residencies:
    """Brings weights in and puts them away."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.preload: list[str] = []
        self.draining: dict[str, str] = {}
        """Worker that takes no more calls -> the model it makes room for."""
        self.failures: dict[str, Failure] = {}
        self.broken: set[str] = set()
        """Suspended workers that could not resume: they are stopped and started anew."""

    def closed(self) -> set[str]:
        """Workers that must get no calls: leaving, or making room."""
        moves = self._world.moves.values()
        return {m.worker for m in moves if m.residency is not Residency.DEVICE} | set(self.draining)

    def arriving(self, worker: str) -> bool:
        move = self._world.move_of(worker)
        return move is not None and move.residency is Residency.DEVICE

    def failure(self, model: str, now: float) -> Failure | None:
        """Why `model` is not tried now, if it is not."""
        failure = self.failures.get(model)
        return failure if failure and now < failure.until else None

    def fail(self, model: str, detail: str, now: float) -> None:
        self.failures[model] = Failure(now + self._world.settings.failure_pause_s, detail)

    def plan(self, now: float) -> Iterator[Command]:
        """The moves to make now, most urgent first."""
        spoken_for: set[str] = set()
        wanted: set[str] = set()
        for demand in self._demands():
            if not self._settled(demand.model, now):
                wanted.add(demand.model)
                yield from self._bring(demand, spoken_for, now)
        self.draining = {w: model for w, model in self.draining.items() if model in wanted}
        self.preload = [model for model in self.preload if self._fetching(model)]

    def _demands(self) -> list[Demand]:
        """Most urgent first: by the oldest waiting call, then expected, then preload."""
        expected = self._world.runs.expected
        demands = {
            call.request.model: Demand(call.request.model, call, expected.get(call.request.model))
            for call in sorted(self._waiting(), key=_urgency)
        }
        for model, at in expected.items():
            demands.setdefault(model, Demand(model, expected_at=at))
        for model in self.preload:
            demands.setdefault(model, Demand(model))
        return list(demands.values())

    def _waiting(self) -> Iterator[Call]:
        """The oldest call of each model that waits for weights: in the queue, or in a worker that
        is suspended."""
        calls = self._world.calls
        waiting = {model: list(queue.values()) for model, queue in calls.queues.items() if queue}
        for worker, running in calls.running.items():
            info = self._world.workers.get(worker)
            if running and info is not None and info.state is WorkerState.SUSPENDED:
                waiting.setdefault(info.model, []).extend(running.values())
        yield from (min(some, key=_urgency) for some in waiting.values())

    def _settled(self, model: str, now: float) -> bool:
        """Whether nothing needs doing: there already, on its way, or not to be tried."""
        if self.failure(model, now):
            return True
        mine = [w for w in self._world.workers.values() if w.model == model]
        return not mine or any(self._comes(w) for w in mine)

    def _comes(self, info: WorkerInfo) -> bool:
        if self.arriving(info.worker):
            return True
        leaves = info.worker in self.draining or self._world.move_of(info.worker) is not None
        return info.state in _COMING and not leaves

    def _fetching(self, model: str) -> bool:
        """Whether its checkpoint is on the way to the disk: its start comes after that."""
        moves = (
            self._world.move_of(w.worker) for w in self._world.workers.values() if w.model == model
        )
        return any(move is not None and move.residency is Residency.DISK for move in moves)

    # --- bringing in ----------------------------------------------------------------------------

    def _bring(self, demand: Demand, spoken_for: set[str], now: float) -> Iterator[Command]:
        """Bring the model in where it fits, the nearest tier first; else make room for it."""
        moving = {m.worker for m in self._world.moves.values()} | set(self.draining)
        mine = sorted(
            (w for w in self._world.workers.values() if w.model == demand.model),
            key=lambda w: _NEARNESS.index(w.residency),
        )
        open_ = [w for w in mine if w.worker not in moving and _device(w) not in spoken_for]
        for info in open_:
            if info.residency is Residency.REMOTE or info.worker in self.broken:
                yield self._world.set_residency(info, Residency.DISK)
                return
        for most in (demand.oldest, None):
            wanted = {w.worker: self._kv_wanted(w, most, now) for w in open_}
            for info in open_:
                if self._kv_room(info) >= wanted[info.worker]:
                    yield from self._bring_in(info, wanted[info.worker])
                    if not self.arriving(info.worker):
                        spoken_for.add(_device(info))
                    return
            for info in open_ if demand.oldest or demand.expected_at is not None else ():
                commands = self._make_room(info, wanted[info.worker], demand, now)
                if commands is not None:
                    spoken_for.add(_device(info))
                    yield from commands
                    return

    def _kv_wanted(self, info: WorkerInfo, call: Call | None, now: float) -> int:
        """The least KV limit to bring a worker in with: a call's, what its own calls hold, and as
        it is where it cannot be changed now."""
        claim = self._world.ledger.claims.get(info.worker)
        wanted = max(kv_bytes(call, info) if call else 0, claim.kv_reserved if claim else 0)
        stuck = info.state is WorkerState.SUSPENDED and self._world.resting(info.worker, now)
        return info.kv_limit_bytes if stuck and info.elastic else kv_rounded(info, wanted)

    def _kv_room(self, info: WorkerInfo) -> int:
        """Bytes that its KV cache could have beside its weights and residual."""
        ledger = self._world.ledger
        return _room(info, ledger) - info.weights_bytes - info.residual_bytes

    def _bring_in(self, info: WorkerInfo, wanted: int) -> Iterator[Command]:
        """As much KV as fits at a start. A resume leaves the limit as it is, where that will do;
        too large a one shrinks first, for a move holds the larger of before and after."""
        world, room = self._world, self._kv_room(info)
        if info.state is not WorkerState.SUSPENDED:
            limit = room if info.elastic and room < kv_most(info) else None
            yield world.set_residency(info, Residency.DEVICE, limit)
        elif info.worker in world.changes:
            return  # it resumes as soon as that is done
        elif room < info.kv_limit_bytes:
            yield world.set_kv_limit(info, room)
        else:
            limit = max(wanted, info.kv_limit_bytes) if info.elastic else None
            yield world.set_residency(info, Residency.DEVICE, limit)

    # --- making room ----------------------------------------------------------------------------

    def _make_room(
        self, info: WorkerInfo, kv_limit: int, demand: Demand, now: float
    ) -> list[Command] | None:
        """What to do for it now, or None if nothing is: it cannot be had, or not yet."""
        world = self._world
        short = kv_limit - self._kv_room(info) - world.coming(_device(info))
        if short <= 0:
            return []  # enough is on its way already
        steps = find_room(
            world,
            info,
            short,
            now,
            lambda w: self._may_leave(w, demand),
            lambda w: self._may_leave(w, demand, Residency.DISK),
        )
        if steps is None and self._impatient(demand, now):
            steps = find_room(
                world, info, short, now, lambda w: self._may_drain(w, demand), at_any_price=True
            )
        if steps is None:
            return None
        if self._host_room_comes(steps):
            return []
        return list(self._free_host(steps, now)) or list(self._take(steps, demand))

    def _host_room_comes(self, steps: list[Step]) -> bool:
        """Whether a copy that is being given up makes room in host memory for these weights."""
        world = self._world
        for step in steps:
            if step.residency is not Residency.PARKED or Residency.HOST not in step.worker.tiers:
                continue
            leaving = (
                w.host_bytes
                for w in world.workers.values()
                if w.node == step.worker.node
                and w.residency is Residency.HOST
                and (move := world.move_of(w.worker))
                and move.residency is Residency.PARKED
            )
            coming = sum(leaving)
            short = copy_bytes(step.worker) - world.ledger.host_free(step.worker.node)
            if coming and short <= coming:
                return True
        return False

    def _take(self, steps: list[Step], demand: Demand) -> Iterator[Command]:
        for step in steps:
            if step.residency is not None and self._world.calls.on_worker(step.worker.worker):
                self.draining[step.worker.worker] = demand.model
            else:
                yield carry_out(self._world, step)

    def _free_host(self, steps: list[Step], now: float) -> Iterator[Command]:
        """Give up older copies of weights in host memory for those that are about to go there."""
        for step in steps:
            info = step.worker
            tiers = tiers_of(self._world, info)
            if step.residency is not Residency.PARKED or Residency.HOST not in tiers:
                continue
            short = copy_bytes(info) - self._world.ledger.host_free(info.node)
            copies = self._older_copies(info, now)
            if sum(copy.host_bytes for copy in copies) < short:
                continue
            for copy in copies:
                if short > 0:
                    short -= copy.host_bytes
                    yield self._world.set_residency(copy, Residency.PARKED)

    def _older_copies(self, info: WorkerInfo, now: float) -> list[WorkerInfo]:
        """Suspended workers of the node whose copies are worth less, the least recently used first.

        The node itself gives up those of workers on the device: they are not promised.
        """
        world = self._world
        used = world.last_used
        older = [
            w
            for w in world.workers.values()
            if w.node == info.node
            and w.state is WorkerState.SUSPENDED
            and w.residency is Residency.HOST
            and Residency.PARKED in w.tiers
            and world.move_of(w.worker) is None
            and not world.resting(w.worker, now)
            and world.idle(w)
            and world.runs.expected_at(w.model) is None
            and used.get(w.worker, 0.0) <= used.get(info.worker, 0.0)
        ]
        return sorted(older, key=lambda w: (used.get(w.worker, 0.0), w.worker))

    def _may_leave(self, info: WorkerInfo, demand: Demand, to: Residency = Residency.HOST) -> bool:
        """Whether an idle worker may make room for the demand, by going as far as `to`."""
        world = self._world
        if info.model in world.settings.pinned or info.model == demand.model:
            return False
        if self.draining.get(info.worker) == demand.model:
            return not world.calls.on_worker(info.worker)
        if not world.idle(info):
            return False
        at = world.runs.expected_at(info.model)
        if at is None or demand.oldest is not None or world.settings.look_ahead == "all":
            return True
        # Against thrashing: it could be back before it is needed, the newcomer having been used.
        back_s = info.activation_s.get(to, 0.0)
        return demand.expected_at is not None and demand.expected_at + back_s < at

    def _impatient(self, demand: Demand, now: float) -> bool:
        waited = now - demand.oldest.arrived if demand.oldest else 0.0
        return demand.oldest is not None and waited >= self._world.settings.patience_s

    def _may_drain(self, info: WorkerInfo, demand: Demand) -> bool:
        """Whether a busy worker may stop taking calls, to leave when it is idle."""
        if self._may_leave(info, demand):
            return True
        calls = self._world.calls
        pinned = info.model in self._world.settings.pinned or info.model == demand.model
        stuck = info.state is WorkerState.SUSPENDED and calls.on_worker(info.worker)
        if pinned or stuck or demand.oldest is None:
            return False
        return all(_urgency(demand.oldest) < _urgency(c) for c in calls.queued(info.model).values())


def _device(info: WorkerInfo) -> str:
    return device_key(info.node, info.device)


def _room(info: WorkerInfo, ledger: Ledger) -> int:
    """What a worker could hold of its device, what it holds already among it."""
    claim = ledger.claims.get(info.worker)
    return ledger.free(_device(info)) + (claim.total if claim else 0)


def _urgency(call: Call) -> tuple[bool, int]:
    """A call that was begun, and whose worker is suspended, goes before those in the queue."""
    return call.worker is None, call.order
