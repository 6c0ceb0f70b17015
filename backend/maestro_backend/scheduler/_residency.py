"""Node level: which models to bring onto a device, and which to put away.

On demand first (waiting calls, oldest first), then what runs expect (soonest first), then preload.
A model comes from whatever tier it is in. For a preload nothing makes room; for what else may leave
see `_leaving`. Where all workers of a model are full, another one comes (`_replicas`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from ._calls import Call
from ._commands import Command
from ._copies import Copies
from ._demand import Demand, urgency
from ._failures import Failures
from ._leaving import SOON_S, Leaving
from ._ledger import device_of, kv_most, kv_rounded
from ._nouns import Residency, WorkerInfo, WorkerState
from ._placement import kv_bytes
from ._replicas import Replicas
from ._room import Step, carry_out, find_room
from ._world import World

_NEARNESS = tuple(Residency)


class Residencies:
    """Brings weights in and puts them away."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.failures = Failures(world)
        self._leaving = Leaving(world)
        self._replicas = Replicas(world, self.failures, self._leaving)
        self._copies = Copies(world)
        self.preload: list[str] = []
        self.broken: set[str] = set()
        """Suspended workers that could not resume: they are stopped and started anew."""
        self.unmet: set[str] = set()
        """Models that should be on a device, and neither are nor come, as of the last plan."""
        self._expected: dict[str, float] = {}
        """When models were expected, at that plan."""

    def arriving(self, worker: str) -> bool:
        move = self._world.move_of(worker)
        return move is not None and move.residency is Residency.DEVICE

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
        elif self._world.calls.waiting and self._replicas.due(now):
            yield from self._further(self._demands(), set(), now)

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
            if model not in self.unmet and model not in self._replicas.wanted:
                self._world.undrain(worker)
        self.preload = [model for model in self.preload if self._fetching(model)]
        if self._replicas.due(now):
            yield from self._further(demands, spoken_for, now)

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
            for call in sorted(self._waiting(), key=urgency)
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
        yield from (min(some, key=urgency) for some in waiting.values())

    def _settled(self, model: str, now: float) -> bool:
        """Whether nothing needs doing: there already, on its way, or not to be tried."""
        if self.failures.of_model(model, now):
            return True
        return not self._world.of_model(model) or self._world.served(model)

    def _fetching(self, model: str) -> bool:
        """Whether its checkpoint is on the way to the disk: its start comes after that."""
        moves = (self._world.move_of(w.worker) for w in self._world.of_model(model))
        return any(move is not None and move.residency is Residency.DISK for move in moves)

    def _further(
        self, demands: Iterable[Demand], spoken_for: set[str], now: float
    ) -> Iterator[Command]:
        def bring(demand: Demand, workers: Iterable[WorkerInfo]) -> Iterator[Command]:
            return self._bring(demand, spoken_for, now, workers)

        yield from self._replicas.bring(demands, self.unmet, bring, now)

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
            and self.failures.may_be_tried(w, now)
            and w.worker not in world.draining
            and device_of(w) not in spoken_for
        ]
        for info in open_:
            if info.residency is Residency.REMOTE or info.worker in self.broken:
                yield self._world.set_residency(info, Residency.DISK)
                return
        before: dict[str, int] | None = None
        for most in (demand.oldest, None):
            wanted = {w.worker: self._kv_wanted(w, most, now) for w in open_}
            if wanted == before:
                return  # the same again would come to the same
            before = wanted
            for info in open_:
                if world.kv_room(info) >= wanted[info.worker]:
                    yield from self._bring_in(info)
                    if not self.arriving(info.worker):
                        spoken_for.add(device_of(info))
                    return
            for info in open_ if demand.oldest or demand.expected_at is not None else ():
                commands = self._make_room(info, wanted[info.worker], demand, now)
                if commands is not None:
                    spoken_for.add(device_of(info))
                    yield from commands
                    return

    def _kv_wanted(self, info: WorkerInfo, call: Call | None, now: float) -> int:
        """The least KV limit to bring a worker in with: a call's, what its own calls hold, and as
        it is where it cannot be changed now."""
        claim = self._world.ledger.claims.get(info.worker)
        wanted = max(kv_bytes(call, info) if call else 0, claim.kv_reserved if claim else 0)
        stuck = info.state is WorkerState.SUSPENDED and self._world.resting(info.worker, now)
        return info.kv_limit_bytes if stuck and info.elastic else kv_rounded(info, wanted)

    def _bring_in(self, info: WorkerInfo) -> Iterator[Command]:
        """With as much KV as fits."""
        world = self._world
        if info.state is WorkerState.SUSPENDED and info.worker in world.changes:
            return  # it resumes as soon as that is done
        room = world.kv_room(info)
        starts = info.state is not WorkerState.SUSPENDED
        most = not info.elastic or (starts and room >= kv_most(info))
        yield world.set_residency(
            info, Residency.DEVICE, None if most else min(room, kv_most(info))
        )

    # --- making room ----------------------------------------------------------------------------

    def _make_room(
        self, info: WorkerInfo, kv_limit: int, demand: Demand, now: float
    ) -> list[Command] | None:
        """What to do for it now, or None if nothing is: it cannot be had, or not yet."""
        world = self._world
        short = kv_limit - world.kv_room(info) - world.coming(device_of(info))
        if short <= 0:
            return []  # enough is on its way already
        steps = self._steps(info, short, demand, now)
        if steps is None:
            return None
        if self._copies.room_comes(steps):
            return []
        return list(self._copies.make_room(steps, now)) or list(self._take(steps, demand))

    def _steps(self, info: WorkerInfo, short: int, demand: Demand, now: float) -> list[Step] | None:
        """The gentlest steps that free so much; None if there are none now."""
        world, leaving = self._world, self._leaving
        steps = find_room(
            world,
            info,
            short,
            now,
            lambda w: leaving.idle(w, demand, now),
            lambda w: leaving.idle(w, demand, now, Residency.DISK),
        )
        if steps and demand.oldest is None and not leaving.worthwhile(info, steps, now):
            return None
        if steps is None and demand.waited_s(now) >= SOON_S:
            steps = find_room(world, info, short, now, lambda w: leaving.spare(w, demand, now))
        if steps is None and demand.waited_s(now) >= world.settings.patience_s:
            steps = find_room(
                world,
                info,
                short,
                now,
                lambda w: leaving.busy(w, demand, now),
                at_any_price=not demand.replica,
            )
        return steps

    def _take(self, steps: list[Step], demand: Demand) -> Iterator[Command]:
        for step in steps:
            if step.residency is not None and self._world.calls.on_worker(step.worker.worker):
                self._world.drain(step.worker.worker, demand.model)
            else:
                yield carry_out(self._world, step)
