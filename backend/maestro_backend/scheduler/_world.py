"""What all levels look at, and the one place where commands come from.

A command that takes effect in time is remembered here until the shell has answered it, and the
ledger holds what it may take meanwhile.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from ._calls import Call, CallTable
from ._commands import DropPrefix, KeepPrefix, Preempt, SetKvLimit, SetResidency
from ._ledger import Kept, Ledger, held_by, kv_aside
from ._nouns import Residency, WorkerInfo, WorkerState
from ._placement import kv_bytes
from ._runs import LIKELY, RunTable
from ._settings import Settings


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

_KEEPING = (
    WorkerState.READY,
    WorkerState.SUSPENDING,
    WorkerState.SUSPENDED,
    WorkerState.RESUMING,
)
"""While a worker is so, its KV cache is the one that prefixes were kept in."""


class World:
    """The state of runs, calls, workers and memory, and the commands under way."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.runs = RunTable(_BOUNDS[settings.look_ahead])
        self.calls = CallTable()
        self.workers: dict[str, WorkerInfo] = {}
        self.ledger = Ledger()
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
        self.counts: Counter[Action] = Counter(dict.fromkeys(Action, 0))
        self._commands = 0

    def next_id(self) -> int:
        self._commands += 1
        return self._commands

    # --- what is so -----------------------------------------------------------------------------

    def move_of(self, worker: str) -> Move | None:
        return next((m for m in self.moves.values() if m.worker == worker), None)

    def resting(self, worker: str, now: float) -> bool:
        return now < self.rests.get(worker, now)

    def limit_resting(self, worker: str, now: float) -> bool:
        return now < self.limit_rests.get(worker, now)

    def idle(self, info: WorkerInfo) -> bool:
        """Whether no call runs there and none waits for its model."""
        busy = self.calls.on_worker(info.worker) or self.calls.queued(info.model)
        return not busy

    def on_device(self, device: str) -> list[WorkerInfo]:
        return [self.workers[c.worker] for c in self.ledger.on_device(device)]

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
            claim.kept.clear()
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
        self.moves[command] = Move(info.worker, residency, kv_limit, info.most_bytes)
        self.account(info.worker)
        return SetResidency(command, info.node, info.model, residency, kv_limit)

    def set_kv_limit(self, info: WorkerInfo, limit: int) -> SetKvLimit:
        grows = limit > info.kv_limit_bytes
        self.counts[Action.KV_GROW if grows else Action.KV_SHRINK] += 1
        command = self.next_id()
        self.changes[info.worker] = LimitChange(command, limit)
        self.account(info.worker)
        return SetKvLimit(command, info.worker, limit)

    def keep_prefix(self, worker: str, call: str, kept: Kept, now: float) -> KeepPrefix:
        self.counts[Action.PREFIX_KEEP] += 1
        command = self.next_id()
        self.keeps[command] = (worker, call)
        self.ledger.claims[worker].kept[call] = kept
        return KeepPrefix(command, worker, call, kept.until - now)

    def drop_prefix(self, worker: str, call: str) -> DropPrefix:
        self.counts[Action.PREFIX_DROP] += 1
        self.ledger.claims[worker].kept.pop(call, None)
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
