"""Node level: which models to bring onto a device, and which to put away.

On demand first (waiting calls, oldest first), then what runs expect (soonest first), then preload.
A model comes from whatever tier it is in. For a preload nothing makes room; for an expected model
only what is idle and not expected as soon; for a waiting call all that is idle, and, after a while,
also workers that have to be drained first. Where all workers of a model are full, another one is
brought in (`_replicas`), and an idle worker whose model has others is the first to leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ._calls import Call
from ._commands import Command
from ._ledger import Ledger, copy_bytes, device_key, kv_least, kv_most, kv_rounded
from ._nouns import Residency, WorkerInfo, WorkerState
from ._placement import kv_bytes
from ._room import Step, carry_out, find_room, tiers_of
from ._world import World

_REPLICA_S = 1.0
"""A further worker of a model is brought in for calls that have waited so long at the least; it is
thought of about as often (ours)."""
_NEARNESS = tuple(Residency)


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker that could not be brought in: not tried again before `until`."""

    until: float
    detail: str


@dataclass(frozen=True, slots=True)
class Demand:
    """A model that should be on a device.

    `oldest` is the oldest call that waits for it; `expected_at` when a run will likely call it.
    With neither it is a preload, for which nothing else makes room. A `replica` is a further worker
    of a model that has some already.
    """

    model: str
    oldest: Call | None = None
    expected_at: float | None = None
    replica: bool = False


class Residencies:
    """Brings weights in and puts them away."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.preload: list[str] = []
        self.failures: dict[str, Failure] = {}
        self.broken: set[str] = set()
        """Suspended workers that could not resume: they are stopped and started anew."""
        self.unmet: set[str] = set()
        """Models that should be on a device, and neither are nor come, as of the last plan."""
        self._expected: dict[str, float] = {}
        """When models were expected, at that plan."""
        self._replicated = 0.0

    def arriving(self, worker: str) -> bool:
        move = self._world.move_of(worker)
        return move is not None and move.residency is Residency.DEVICE

    def failure(self, model: str, now: float) -> Failure | None:
        """Why `model` is not tried now, if it is not: all of its workers have failed."""
        found = [self.failures.get(w.worker) for w in self._world.of_model(model)]
        failed = [one for one in found if one is not None and now < one.until]
        if not failed or len(failed) < len(found):
            return None
        return min(failed, key=lambda one: one.until)

    def fail(self, worker: str, detail: str, now: float) -> None:
        self.failures[worker] = Failure(now + self._world.settings.failure_pause_s, detail)

    def forgive(self, now: float) -> bool:
        """Whether a worker that had failed may be tried again from now on."""
        over = [worker for worker, one in self.failures.items() if one.until <= now]
        for worker in over:
            del self.failures[worker]
        return bool(over)

    def _may_be_tried(self, info: WorkerInfo, now: float) -> bool:
        failure = self.failures.get(info.worker)
        return failure is None or failure.until <= now

    def sooner(self, model: str) -> bool:
        """Whether `model` is not here, and is expected sooner than when that was last planned."""
        if self._world.served(model):
            return False
        at = self._world.runs.expected_at(model)
        return at is not None and at < self._expected.get(model, math.inf)

    def replan(self, now: float) -> Iterator[Command]:
        """As `plan`, where nothing has changed but the time."""
        if self.unmet or self.preload or self._world.draining or self._world.stranded:
            yield from self.plan(now)
        elif self._world.calls.waiting and now - self._replicated >= _REPLICA_S / 2:
            self._replicated = now
            yield from self._replicas(self._demands(), set(), now)

    def plan(self, now: float) -> Iterator[Command]:
        """The moves to make now, most urgent first."""
        spoken_for: set[str] = set()
        self.unmet = set()
        demands = self._demands()
        for demand in demands:
            if not self._settled(demand.model, now):
                self.unmet.add(demand.model)
                yield from self._bring(demand, spoken_for, now)
        self._expected = {d.model: d.expected_at for d in demands if d.expected_at is not None}
        for worker, model in list(self._world.draining.items()):
            if model not in self.unmet:
                self._world.undrain(worker)
        self.preload = [model for model in self.preload if self._fetching(model)]
        if now - self._replicated >= _REPLICA_S / 2:
            self._replicated = now
            yield from self._replicas(demands, spoken_for, now)

    def plan_on(self, devices: Iterable[str], now: float) -> Iterator[Command]:
        """As `plan`, where only on these devices something may have become possible."""
        spoken_for: set[str] = set()
        for demand in self._demands() if self.unmet else ():
            if demand.model in self.unmet and not self._settled(demand.model, now):
                workers = [
                    w
                    for device in devices
                    for w in self._world.of_device(device)
                    if w.model == demand.model
                ]
                yield from self._bring(demand, spoken_for, now, workers)

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
        waiting = {model: [next(iter(q.values()))] for model, q in calls.queues.items() if q}
        for worker in self._world.stranded:
            info = self._world.workers[worker]
            waiting.setdefault(info.model, []).extend(calls.on_worker(worker).values())
        yield from (min(some, key=_urgency) for some in waiting.values())

    def _settled(self, model: str, now: float) -> bool:
        """Whether nothing needs doing: there already, on its way, or not to be tried."""
        if self.failure(model, now):
            return True
        return not self._world.of_model(model) or self._world.served(model)

    def _fetching(self, model: str) -> bool:
        """Whether its checkpoint is on the way to the disk: its start comes after that."""
        moves = (self._world.move_of(w.worker) for w in self._world.of_model(model))
        return any(move is not None and move.residency is Residency.DISK for move in moves)

    # --- further workers ------------------------------------------------------------------------

    def _replicas(
        self, demands: list[Demand], spoken_for: set[str], now: float
    ) -> Iterator[Command]:
        """Another worker for each model whose calls wait although its workers are full, once the
        oldest has waited for about as long as that takes."""
        world = self._world
        for demand in demands:
            model = demand.model
            if len(world.of_model(model)) < 2 or model in self.unmet or self.failure(model, now):
                continue
            free = [call for call in world.calls.queued(model).values() if call.key is not None]
            oldest = free[0] if free else None
            if oldest is None or (world.places.of(model).free and model not in world.short):
                continue
            replica = Demand(model, oldest, replica=True)
            workers = [w for w in world.of_model(model) if self._may_come(w, replica, now)]
            if workers and self._places_coming(model) < len(free):
                yield from self._bring(replica, spoken_for, now, workers)

    def _may_come(self, info: WorkerInfo, replica: Demand, now: float) -> bool:
        """Whether the worker could be a further one, now that the oldest call has waited so."""
        assert replica.oldest is not None
        waited_s = now - replica.oldest.arrived
        if waited_s < max(_REPLICA_S, info.activation_s.get(info.residency, 0.0)):
            return False
        if self._world.comes(info) or not self._may_be_tried(info, now):
            return False
        return self._kv_room(info) >= kv_least(info) or any(
            self._may_leave(w, replica, now) for w in self._world.of_device(_device(info))
        )

    def _places_coming(self, model: str) -> int:
        world = self._world
        coming = (w for w in world.of_model(model) if world.comes(w))
        return sum(w.max_inflight for w in coming if w.state is not WorkerState.READY)

    # --- bringing in ----------------------------------------------------------------------------

    def _bring(
        self,
        demand: Demand,
        spoken_for: set[str],
        now: float,
        workers: Iterable[WorkerInfo] | None = None,
    ) -> Iterator[Command]:
        """Bring the model in where it fits, the nearest tier first; else make room for it.

        `workers`: those that come into question, all of the model if it is None.
        """
        world = self._world
        mine = world.of_model(demand.model) if workers is None else workers
        open_ = [
            w
            for w in sorted(mine, key=lambda w: _NEARNESS.index(w.residency))
            if world.move_of(w.worker) is None
            and self._may_be_tried(w, now)
            and w.worker not in world.draining
            and _device(w) not in spoken_for
        ]
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
            lambda w: self._may_leave(w, demand, now),
            lambda w: self._may_leave(w, demand, now, Residency.DISK),
        )
        if steps is None and self._impatient(demand, now):
            steps = find_room(
                world,
                info,
                short,
                now,
                lambda w: self._may_drain(w, demand, now),
                at_any_price=True,
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
                for w in world.of_node(step.worker.node)
                if w.residency is Residency.HOST
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
                self._world.drain(step.worker.worker, demand.model)
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
            for w in world.of_node(info.node)
            if w.state is WorkerState.SUSPENDED
            and w.residency is Residency.HOST
            and Residency.PARKED in w.tiers
            and world.move_of(w.worker) is None
            and not world.resting(w.worker, now)
            and world.idle(w)
            and world.runs.expected_at(w.model) is None
            and used.get(w.worker, 0.0) <= used.get(info.worker, 0.0)
        ]
        return sorted(older, key=lambda w: (used.get(w.worker, 0.0), w.worker))

    def _may_leave(
        self, info: WorkerInfo, demand: Demand, now: float, to: Residency = Residency.HOST
    ) -> bool:
        """Whether an idle worker may make room for the demand, by going as far as `to`."""
        world = self._world
        if info.model in world.settings.pinned or info.model == demand.model:
            return False
        if world.draining.get(info.worker) == demand.model:
            return not world.calls.on_worker(info.worker)
        if not world.idle(info):
            return False
        at = world.runs.expected_at(info.model)
        spare, all_ahead = world.spare(info), world.settings.look_ahead == "all"
        if (spare or demand.replica) and self._has_just_come(info, to, now):
            return False
        if at is None or spare or all_ahead or (demand.oldest is not None and not demand.replica):
            return True
        if demand.replica:
            return False
        # Against thrashing: it could be back before it is needed, the newcomer having been used.
        back_s = info.activation_s.get(to, 0.0)
        return demand.expected_at is not None and demand.expected_at + back_s < at

    def _has_just_come(self, info: WorkerInfo, to: Residency, now: float) -> bool:
        """Against thrashing: it has been ready for less time than it takes to be back."""
        back_s = max(_REPLICA_S, info.activation_s.get(to, 0.0))
        came = self._world.came.get(info.worker)
        return came is not None and now - came < back_s

    def _impatient(self, demand: Demand, now: float) -> bool:
        if demand.oldest is None or demand.replica:
            return False
        return now - demand.oldest.arrived >= self._world.settings.patience_s

    def _may_drain(self, info: WorkerInfo, demand: Demand, now: float) -> bool:
        """Whether a busy worker may stop taking calls, to leave when it is idle."""
        if self._may_leave(info, demand, now):
            return True
        calls = self._world.calls
        pinned = info.model in self._world.settings.pinned or info.model == demand.model
        stuck = info.state is WorkerState.SUSPENDED and calls.on_worker(info.worker)
        if pinned or stuck or demand.oldest is None:
            return False
        oldest = calls.oldest(info.model)
        return oldest is None or _urgency(demand.oldest) < _urgency(oldest)


def _device(info: WorkerInfo) -> str:
    return device_key(info.node, info.device)


def _room(info: WorkerInfo, ledger: Ledger) -> int:
    """What a worker could hold of its device, what it holds already among it."""
    claim = ledger.claims.get(info.worker)
    return ledger.free(_device(info)) + (claim.total if claim else 0)


def _urgency(call: Call) -> tuple[bool, int]:
    """A call that was begun, and whose worker is suspended, goes before those in the queue."""
    return call.worker is None, call.order
