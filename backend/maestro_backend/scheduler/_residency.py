"""Node level: which models to bring onto a device, and which to put away.

On demand first (queued calls, oldest first), then announced-next, then preload. The least recently
used idle model makes room; one that a run expects is put away only for calls that wait already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ._calls import Call, CallTable
from ._ledger import Ledger, device_key, need_bytes
from ._nouns import Residency, WorkerInfo, WorkerState
from ._placement import claim
from ._runs import RunTable

_COMING = (WorkerState.READY, WorkerState.STARTING, WorkerState.RESTARTING)


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that could not be brought in: not tried again before `until`."""

    until: float
    detail: str


@dataclass(slots=True)
class World:
    """What a plan looks at."""

    workers: dict[str, WorkerInfo]
    calls: CallTable
    runs: RunTable
    ledger: Ledger
    now: float


@dataclass(frozen=True, slots=True)
class Demand:
    """A model that should be on a device.

    `oldest` is the oldest call that waits for it; `expected` says that a run will likely call it.
    With neither it is a preload, for which nothing else makes room.
    """

    model: str
    oldest: Call | None = None
    expected: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """A change of residency that is under way; `need` is what the worker was thought to take."""

    worker: str
    residency: Residency
    need: int = 0


@dataclass(slots=True)
class Residencies:
    """Moves under way and what they were asked for. `patience_s`: wait before draining others."""

    patience_s: float
    pinned: tuple[str, ...] = ()
    preload: list[str] = field(default_factory=list)
    moves: dict[int, Move] = field(default_factory=dict)
    draining: dict[str, str] = field(default_factory=dict)
    """Worker that takes no more calls -> the model it makes room for."""
    last_used: dict[str, float] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)

    def closed(self) -> set[str]:
        """Workers that must get no calls: leaving, or making room."""
        leaving = {m.worker for m in self.moves.values() if m.residency is not Residency.DEVICE}
        return leaving | set(self.draining)

    def arriving(self, worker: str) -> bool:
        return any(
            m.worker == worker and m.residency is Residency.DEVICE for m in self.moves.values()
        )

    def failure(self, model: str, now: float) -> Failure | None:
        """Why `model` is not tried now, if it is not."""
        failure = self.failures.get(model)
        return failure if failure and now < failure.until else None

    def plan(self, world: World) -> Iterator[Move]:
        """The moves to make now, most urgent first. The caller registers each in `moves`."""
        yield from self._finish_drains(world)
        for demand in self._demands(world):
            if not self._settled(demand.model, world):
                yield from self._bring(demand, world)
        self.preload.clear()

    def _finish_drains(self, world: World) -> Iterator[Move]:
        for worker, wanted_by in list(self.draining.items()):
            if not world.calls.queued(wanted_by):
                del self.draining[worker]
            elif not world.calls.on_worker(worker):
                del self.draining[worker]
                yield Move(worker, Residency.DISK)

    def _demands(self, world: World) -> list[Demand]:
        """Most urgent first: by the oldest waiting call, then expected, then preload."""
        oldest = [min(q.values(), key=_order) for q in world.calls.queues.values() if q]
        expected = world.runs.expected
        demands = {
            c.request.model: Demand(c.request.model, c, c.request.model in expected)
            for c in sorted(oldest, key=_order)
        }
        for model in expected:
            demands.setdefault(model, Demand(model, expected=True))
        for model in self.preload:
            demands.setdefault(model, Demand(model))
        return list(demands.values())

    def _settled(self, model: str, world: World) -> bool:
        """Whether nothing needs doing: there already, on its way, or not to be tried."""
        if self.failure(model, world.now):
            return True
        leaving = self.closed()
        mine = [w for w in world.workers.values() if w.model == model]
        return not mine or any(
            (w.state in _COMING and w.worker not in leaving) or self.arriving(w.worker)
            for w in mine
        )

    def _bring(self, demand: Demand, world: World) -> Iterator[Move]:
        leaving = self.closed()
        for worker in world.workers.values():
            if worker.model != demand.model or worker.worker in leaving:
                continue
            device = device_key(worker.node, worker.device)
            short = need_bytes(worker) - world.ledger.free(device)
            if short <= 0:
                claim(worker, world.ledger, world.calls)
                yield Move(worker.worker, Residency.DEVICE)
            elif demand.oldest is not None or demand.expected:
                yield from self._make_room(worker, short, demand.oldest, world)
            return

    def _make_room(
        self, wanted: WorkerInfo, short: int, oldest: Call | None, world: World
    ) -> Iterator[Move]:
        """Put idle workers of the device away, or start draining busy ones; all or nothing."""
        leaving = self.closed()
        neighbours = [
            w
            for w in world.workers.values()
            if (w.node, w.device) == (wanted.node, wanted.device) and w.model != wanted.model
        ]
        short -= sum(need_bytes(w) for w in neighbours if w.worker in leaving)
        victims: list[WorkerInfo] = []
        for worker in sorted(neighbours, key=lambda w: self.last_used.get(w.worker, 0.0)):
            if short <= 0:
                break
            if worker.worker not in leaving and self._may_leave(worker, oldest, world):
                victims.append(worker)
                short -= need_bytes(worker)
        if short > 0:
            return
        for worker in victims:
            if world.calls.on_worker(worker.worker):
                self.draining[worker.worker] = wanted.model
            else:
                yield Move(worker.worker, Residency.DISK)

    def _may_leave(self, worker: WorkerInfo, oldest: Call | None, world: World) -> bool:
        """Whether `worker` may make room for a model whose oldest queued call is `oldest`."""
        if worker.state is not WorkerState.READY or worker.model in self.pinned:
            return False
        queued = world.calls.queued(worker.model).values()
        busy = bool(queued) or bool(world.calls.on_worker(worker.worker))
        if oldest is None:
            return not busy and worker.model not in world.runs.expected
        if not busy:
            return True
        waited = world.now - oldest.arrived >= self.patience_s
        return waited and all(oldest.order < call.order for call in queued)


def _order(call: Call) -> int:
    return call.order
