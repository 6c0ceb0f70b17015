"""What all levels look at, and the one place where commands come from.

A command that takes effect in time is remembered here until the shell has answered it, and the
ledger holds what it may take meanwhile.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ._calls import Call, CallTable
from ._commands import DropPrefix, KeepPrefix, Preempt, SetKvLimit, SetResidency
from ._eviction import Rhythm
from ._ledger import Kept, Ledger, device_of, held_by, kv_aside
from ._nouns import Residency, WorkerInfo, WorkerState
from ._placement import PlaceTable, kv_bytes
from ._runs import LIKELY, RunTable
from ._settings import Settings
from ._traffic import Traffic


class Action(StrEnum):
    """What the scheduler did to memory and calls; each is counted."""

    START = "start"
    RESUME = "resume"
    SUSPEND = "suspend"
    """The weights go to host memory."""
    PARK = "park"
    """The weights are given up, the process stays."""
    DROP_COPY = "drop_copy"
    """A copy of weights in host memory is given up."""
    STOP = "stop"
    FETCH = "fetch"
    KV_GROW = "kv_grow"
    KV_SHRINK = "kv_shrink"
    PREFIX_KEEP = "prefix_keep"
    PREFIX_DROP = "prefix_drop"
    PREFIX_EVICTION = "prefix_eviction"
    """For lack of memory: a kept prefix, or the cached ones of a worker that is in use."""
    DELAY = "delay"
    """A call had to wait for KV memory."""
    PREEMPTION = "preemption"
    FAILURE = "failure"
    """A command that could not be carried out."""


@dataclass(frozen=True, slots=True)
class Move:
    """A change of residency that is under way; `need` is what the worker was thought to take at
    most."""

    worker: str
    residency: Residency
    kv_limit: int | None = None
    need: int = 0


@dataclass(frozen=True, slots=True)
class LimitChange:
    """A KV limit that was asked for.

    `applied`: when (seconds) it was taken over; a shrink waits for blocks in use from then on.
    """

    command: int
    limit: int
    applied: float | None = None


@dataclass(frozen=True, slots=True)
class Preemption:
    """A call that is being taken off its worker, in the try that it runs in."""

    call: str
    worker: str
    attempt: int


_BOUNDS = {"none": math.inf, "likely": LIKELY, "all": 0.0}

_COMING = (
    WorkerState.READY,
    WorkerState.STARTING,
    WorkerState.RESUMING,
    WorkerState.RESTARTING,
)
_NO_WORKERS: dict[str, WorkerInfo] = {}

_KEEPING = (
    WorkerState.READY,
    WorkerState.SUSPENDING,
    WorkerState.SUSPENDED,
    WorkerState.RESUMING,
)
"""While a worker is so, its KV cache is the one that prefixes were kept in."""


class World:
    """The state of runs, calls, workers and memory, and the commands under way.

    What has changed is noted, so that nobody has to look at everything after every event:
    `changed` (anything that may call for a new plan), `touched` (devices where somebody may have
    become idle) and, in `places`, where calls can go.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.runs = RunTable(_BOUNDS[settings.look_ahead])
        self.calls = CallTable()
        self.workers: dict[str, WorkerInfo] = {}
        self.ledger = Ledger()
        self.traffic = Traffic()
        self.rtt_s: dict[str, float] = {}
        """Of nodes that are not near."""
        self.moves: dict[int, Move] = {}
        self.changes: dict[str, LimitChange] = {}
        """By worker: one at a time."""
        self.preemptions: dict[int, Preemption] = {}
        self.keeps: dict[int, tuple[str, str]] = {}
        """KeepPrefix under way: worker and call."""
        self.rests: dict[str, float] = {}
        """Worker -> until when it is not put away again, which failed."""
        self.limit_rests: dict[str, float] = {}
        """Worker -> until when its KV limit is not changed again, which failed."""
        self.refused: dict[str, frozenset[Residency]] = {}
        """Worker -> the tiers that its weights could not be put aside in, since it last moved."""
        self.last_used: dict[str, float] = {}
        self.rhythms: dict[str, Rhythm] = {}
        """By model: of its calls."""
        self.came: dict[str, float] = {}
        """Worker -> since when it is ready."""
        self.stranded: set[str] = set()
        """Suspended workers in which calls run."""
        self.places = PlaceTable(
            self.calls, self.ledger, settings.placement == "affinity", self._pace, self._beside
        )
        self.changed = True
        self.touched: dict[str, None] = {}
        self.short: dict[str, tuple[Call, str]] = {}
        """Model -> the call that goes next but lacks KV memory, and the device where it does."""
        self.counts: Counter[Action] = Counter(dict.fromkeys(Action, 0))
        self._by_model: dict[str, dict[str, WorkerInfo]] = {}
        self._away: dict[str, set[str]] = {}
        """By model: workers that neither are ready to stay nor come."""
        self._by_device: dict[str, dict[str, WorkerInfo]] = {}
        self._by_node: dict[str, dict[str, WorkerInfo]] = {}
        self._moving: dict[str, Move] = {}
        self._limit_commands: dict[int, str] = {}
        self._draining: dict[str, str] = {}
        self._served: set[str] = set()
        self._commands = 0

    def next_id(self) -> int:
        self._commands += 1
        return self._commands

    # --- what is so -----------------------------------------------------------------------------

    def move_of(self, worker: str) -> Move | None:
        return self._moving.get(worker)

    @property
    def draining(self) -> Mapping[str, str]:
        """Worker that takes no more calls -> the model it makes room for."""
        return self._draining

    def resting(self, worker: str, now: float) -> bool:
        return now < self.rests.get(worker, now)

    def limit_resting(self, worker: str, now: float) -> bool:
        return now < self.limit_rests.get(worker, now)

    def idle(self, info: WorkerInfo) -> bool:
        """Whether no call runs there and none waits for its model."""
        busy = self.calls.on_worker(info.worker) or self.calls.queued(info.model)
        return not busy

    def kv_room(self, info: WorkerInfo) -> int:
        """Bytes that a worker's KV cache could have beside its weights and residual, what it has
        already among them."""
        claim = self.ledger.claims.get(info.worker)
        room = self.ledger.free(device_of(info)) + (claim.total if claim else 0)
        return room - info.weights_bytes - info.residual_bytes

    def of_model(self, model: str) -> Collection[WorkerInfo]:
        return self._by_model.get(model, _NO_WORKERS).values()

    def of_device(self, device: str) -> Collection[WorkerInfo]:
        """The workers of a device, also those that hold nothing of it."""
        return self._by_device.get(device, _NO_WORKERS).values()

    def of_node(self, node: str) -> Collection[WorkerInfo]:
        return self._by_node.get(node, _NO_WORKERS).values()

    def on_device(self, device: str) -> list[WorkerInfo]:
        """The workers that hold something of a device."""
        return [self.workers[c.worker] for c in self.ledger.on_device(device)]

    def comes(self, info: WorkerInfo) -> bool:
        """Whether the worker is ready and stays, or is on its way."""
        if move := self._moving.get(info.worker):
            return move.residency is Residency.DEVICE
        return info.state in _COMING and info.worker not in self._draining

    def away(self, model: str) -> list[WorkerInfo]:
        """The workers of `model` that do not come, in the order of `of_model`."""
        gone = self._away.get(model)
        return [w for w in self.of_model(model) if w.worker in gone] if gone else []

    def served(self, model: str) -> bool:
        """Whether some worker of `model` is ready, or on its way."""
        if model not in self._served and any(map(self.comes, self.of_model(model))):
            self._served.add(model)
        return model in self._served

    def in_flight(self, info: WorkerInfo) -> tuple[int, int]:
        """Calls on the worker, and on the others of its device."""
        mine = len(self.calls.on_worker(info.worker))
        return mine, sum(len(self.calls.on_worker(w.worker)) for w in self._beside(info))

    def _beside(self, info: WorkerInfo) -> Collection[WorkerInfo]:
        """The other workers of its device."""
        here = self.of_device(device_of(info))
        return () if len(here) == 1 else [w for w in here if w.worker != info.worker]

    def _pace(self, info: WorkerInfo) -> float:
        """By how much longer than alone the next call would take there, as a share."""
        slowdown = self.traffic.slowdown(info.model).of(*self.in_flight(info))
        if rtt_s := self.rtt_s.get(info.node):
            slowdown += rtt_s / self.traffic.service_s(info.model)
        return slowdown

    def spare(self, info: WorkerInfo) -> bool:
        """Whether its model has another ready worker, that stays."""
        mine = self.of_model(info.model)
        return len(mine) > 1 and any(
            w.state is WorkerState.READY and w.worker != info.worker and self.comes(w) for w in mine
        )

    def takes_calls(self, info: WorkerInfo) -> bool:
        """Whether the worker is ready, and neither leaving nor making room."""
        ready = info.state is WorkerState.READY and info.worker not in self._draining
        return ready and self.comes(info)

    def coming(self, device: str) -> int:
        """Bytes that commands under way will free."""
        return sum(c.total - self._after(c.worker) for c in self.ledger.on_device(device))

    def _after(self, worker: str) -> int:
        """What a worker will hold when all that was asked of it is done."""
        info, move, change = self.workers[worker], self.move_of(worker), self.changes.get(worker)
        claim = self.ledger.claims[worker]
        if move is not None and move.residency in (Residency.DISK, Residency.REMOTE):
            return 0
        limit = claim.kv_limit
        if move is not None and move.kv_limit is not None:
            limit = move.kv_limit
        elif change is not None:
            limit = change.limit
        if move is None or move.residency is Residency.DEVICE:
            return claim.weights + limit + info.residual_bytes
        return min(limit, kv_aside(info, claim)) + info.residual_bytes

    # --- what changes ---------------------------------------------------------------------------

    def put(self, info: WorkerInfo, now: float) -> None:
        """A worker is new, or has changed."""
        worker, old = info.worker, self.workers.get(info.worker)
        if old is not None and (old.model, device_of(old)) != (info.model, device_of(info)):
            self._unlist(old)
            self.places.of(old.model).shut(worker)
            self._served.discard(old.model)
        self.workers[worker] = info
        self._by_model.setdefault(info.model, {})[worker] = info
        self._by_device.setdefault(device_of(info), {})[worker] = info
        self._by_node.setdefault(info.node, {})[worker] = info
        if info.state is WorkerState.READY and (old is None or old.state is not info.state):
            self.came[worker] = now
        if info.state is WorkerState.SUSPENDED and self.calls.on_worker(worker):
            self.stranded.add(worker)
        else:
            self.stranded.discard(worker)
        self._moved(worker)

    def lose(self, node: str) -> None:
        """A node is gone, with its workers and all that was asked of them."""
        gone = [info.worker for info in self.of_node(node)]
        lost = set(gone)
        self.moves = {i: m for i, m in self.moves.items() if m.worker not in lost}
        self.keeps = {i: keep for i, keep in self.keeps.items() if keep[0] not in lost}
        limits = self._limit_commands.items()
        self._limit_commands = {i: worker for i, worker in limits if worker not in lost}
        self.ledger.drop_node(node)
        self.rtt_s.pop(node, None)
        for worker in gone:
            self._moved(worker)
            self._unlist(self.workers.pop(worker))
            rests = (self.rests, self.limit_rests)
            for about in (self.changes, *rests, self.refused, self._draining, self._moving):
                about.pop(worker, None)
            self.stranded.discard(worker)

    def _unlist(self, info: WorkerInfo) -> None:
        del self._by_model[info.model][info.worker]
        self._away[info.model].discard(info.worker)
        del self._by_device[device_of(info)][info.worker]
        del self._by_node[info.node][info.worker]

    def drain(self, worker: str, model: str) -> None:
        """The worker takes no more calls: it makes room for `model`."""
        self._draining[worker] = model
        self._moved(worker)

    def undrain(self, worker: str) -> None:
        if self._draining.pop(worker, None):
            self._moved(worker)

    def end_move(self, command: int) -> Move | None:
        """The move that the command asked for, if it did; it is under way no more."""
        move = self.moves.pop(command, None)
        if move is not None:
            del self._moving[move.worker]
            self._moved(move.worker)
        return move

    def _moved(self, worker: str) -> None:
        """Whether the worker comes, or takes calls, may have changed."""
        self.changed = True
        info = self.workers[worker]
        self._served.discard(info.model)
        away = self._away.setdefault(info.model, set())
        if self.comes(info):
            away.discard(worker)
        else:
            away.add(worker)
        self.places.moved(info)

    def settle_places(self, now: float) -> Iterable[str]:
        """Bring the places for calls up to date; the models where there may be more of them."""
        return self.places.settle(self.workers, self.takes_calls, now)

    def look_far(self) -> None:
        """What a round trip counts for changes with the services that are learned."""
        for node in self.rtt_s:
            for info in self.of_node(node):
                self.places.of(info.model).shift(info.worker)

    def changing(self, command: int) -> str | None:
        """The worker whose KV limit the command changes."""
        worker = self._limit_commands.pop(command, "")
        change = self.changes.get(worker)
        return worker if change is not None and change.command == command else None

    def touch(self, model: str) -> None:
        """The model's workers may have become idle, or less wanted."""
        for info in self.of_model(model):
            self.touched[device_of(info)] = None

    def call_left(self, worker: str) -> None:
        """A call does not run on the worker any more."""
        self.ledger.freed.add(worker)
        if not self.calls.on_worker(worker):
            self.stranded.discard(worker)
            if info := self.workers.get(worker):
                self.touched[device_of(info)] = None

    def saw(self, call: Call, now: float) -> None:
        """A call has come: of such its model's traffic is made."""
        model = call.request.model
        rhythm = self.rhythms.get(model)
        self.rhythms[model] = rhythm.used(now) if rhythm else Rhythm(now)
        self.traffic.seen(call, now)

    def learn(self, call: Call, now: float) -> None:
        """A call has ended well on its worker."""
        if info := self.workers.get(call.worker or ""):
            (beside, shared), (first, second) = self.in_flight(info), call.beside
            self.traffic.ended(call, (beside - 1 + first) / 2, (shared + second) / 2, now)

    def next_use_s(self, model: str, now: float) -> float:
        """Seconds to the next call of the model, by how often it is used."""
        rhythm = self.rhythms.get(model)
        return math.inf if rhythm is None else rhythm.next_s(now)

    def account(self, worker: str) -> None:
        """Bring the worker's claim up to date with what it reports and what was asked of it.

        Calls that still run there keep or regain their share.
        """
        info, move, change = self.workers[worker], self.move_of(worker), self.changes.get(worker)
        limits = [] if move is None or move.kv_limit is None else [move.kv_limit]
        limits += [] if change is None else [change.limit]
        claim = held_by(
            info,
            bound_for=move.residency if move else None,
            limits=tuple(limits),
            old=self.ledger.claims.get(worker),
        )
        if claim is None:
            self.ledger.release_worker(worker)
            return
        self.ledger.set(claim)
        if info.state not in _KEEPING:
            for name in list(claim.kept):
                claim.forget(name)
        for call in self.calls.on_worker(worker).values():
            self.ledger.restore(worker, call.call, kv_bytes(call, info))

    # --- commands -------------------------------------------------------------------------------

    def set_residency(
        self, info: WorkerInfo, residency: Residency, kv_limit: int | None = None
    ) -> SetResidency:
        self.counts[_kind(info, residency)] += 1
        command = self.next_id()
        if (change := self.changes.get(info.worker)) and change.applied is not None:
            del self.changes[info.worker]
        move = Move(info.worker, residency, kv_limit, info.most_bytes)
        self.moves[command] = self._moving[info.worker] = move
        self._moved(info.worker)
        self.account(info.worker)
        return SetResidency(command, info.node, info.model, residency, kv_limit, info.worker)

    def set_kv_limit(self, info: WorkerInfo, limit: int) -> SetKvLimit:
        grows = limit > info.kv_limit_bytes
        self.counts[Action.KV_GROW if grows else Action.KV_SHRINK] += 1
        command = self.next_id()
        self.changes[info.worker] = LimitChange(command, limit)
        self._limit_commands[command] = info.worker
        self.account(info.worker)
        return SetKvLimit(command, info.worker, limit)

    def keep_prefix(self, worker: str, call: str, kept: Kept, now: float) -> KeepPrefix:
        self.counts[Action.PREFIX_KEEP] += 1
        command = self.next_id()
        self.keeps[command] = (worker, call)
        self.ledger.keep(worker, call, kept)
        return KeepPrefix(command, worker, call, kept.until - now)

    def drop_prefix(self, worker: str, call: str) -> DropPrefix:
        self.counts[Action.PREFIX_DROP] += 1
        self.ledger.forget(worker, call)
        return DropPrefix(self.next_id(), worker, call)

    def preempt(self, call: Call) -> Preempt:
        assert call.worker is not None
        self.counts[Action.PREEMPTION] += 1
        command = self.next_id()
        self.preemptions[command] = Preemption(call.call, call.worker, call.attempts)
        return Preempt(command, call.call, call.worker)


def _kind(info: WorkerInfo, residency: Residency) -> Action:
    match residency:
        case Residency.DEVICE:
            suspended = info.state is WorkerState.SUSPENDED
            return Action.RESUME if suspended else Action.START
        case Residency.HOST:
            return Action.SUSPEND
        case Residency.PARKED:
            return Action.DROP_COPY if info.residency is Residency.HOST else Action.PARK
        case _:
            return Action.FETCH if info.residency is Residency.REMOTE else Action.STOP
