"""Which calls cannot be served, and why."""

from __future__ import annotations

from ._calls import Call
from ._commands import RejectReason
from ._events import CallArrived
from ._ledger import device_of, least_bytes
from ._nouns import WorkerInfo, WorkerState
from ._pace import LEVELS, Pace, Promises
from ._queues import Queues
from ._residency import Residencies
from ._world import World

Verdict = tuple[RejectReason, str, float | None]
"""Reason, the words for people, and after how many seconds trying again may help."""

_ABSENT = (WorkerState.STOPPED, WorkerState.FAILED, WorkerState.SUSPENDED)

_HELD = 0.75
"""At most this part of a queue's room is held for those who were told to come back (ours)."""
_SOONEST_S, _LATEST_S = 1.0, 600.0
"""A client is told to come back within these (ours)."""


class Verdicts:
    """Says no to calls that would wait for ever, or that find no room in the queue.

    `nodeless_since`: None while a node is there.
    """

    def __init__(self, world: World, residencies: Residencies, queues: Queues) -> None:
        self._world = world
        self._residencies = residencies
        self._queues = queues
        self._paces: dict[str, Pace] = {}
        self._promises = Promises()
        self.nodeless_since: float | None = 0.0

    def refusal(self, event: CallArrived, now: float) -> Verdict | None:
        """Why a call cannot even enter the queue."""
        world, bounds, promises = self._world, self._world.settings, self._promises
        if world.workers and not world.of_model(event.model):
            return RejectReason.UNKNOWN_MODEL, f"no node serves model {event.model!r}", None
        kept, held = False, 0
        if promises.by_name:
            promises.expire(now)
            kept = promises.kept(event, now)
            held = 0 if kept else len(promises.by_name)
        queued = world.calls.waiting
        if _full(queued, held, bounds.max_queued):
            models = list(world.calls.queues)
            ahead_s = sum(self._queued_s(m) / 2 + promises.work_s(m) for m in models)
            retry_s = self._promise(event, models, ahead_s, now)
            return RejectReason.QUEUE_FULL, f"{queued} calls are queued already", retry_s
        if bounds.max_queue_s is not None and (
            verdict := self._shed(event, bounds.max_queue_s, kept, now)
        ):
            return verdict
        if promises.by_name:
            promises.forget(event)
        return None

    def served(self, call: Call, now: float) -> None:
        """A call has ended well on its worker."""
        self._pace(call.request.model).done(call.work / 1e6, now, self._since(call.request.model))

    def _shed(self, event: CallArrived, bound_s: float, kept: bool, now: float) -> Verdict | None:
        """Why there is no room for the call's class.

        A tenant that has had more than its share is treated as one class lower.
        """
        model, slo = event.model, self._slo(event)
        level, whose = LEVELS[slo], ""
        if level > 1 and self._queues.ahead(event):
            level, whose = level / 2, f" of tenant {event.tenant!r}, which has had its share,"
        queued_s, limit_s = self._queued_s(model), level * bound_s
        held_s = sum(self._promises.work_s(model, one) for one in LEVELS if LEVELS[one] >= level)
        if not _full(queued_s, 0.0 if kept else held_s, limit_s):
            return None
        detail = (
            f"{queued_s:,.0f} seconds of work are queued for {model!r}; "
            f"calls of class {slo!r}{whose} have room below {limit_s:,.0f}"
        )
        retry_s = self._promise(event, [model], queued_s - limit_s / 2 + held_s, now)
        return RejectReason.QUEUE_FULL, detail, retry_s

    def _promise(self, event: CallArrived, models: list[str], ahead_s: float, now: float) -> float:
        """In how many seconds there will be room, which is held from now on.

        By then `ahead_s` seconds of work are done: half of what fills the queue is served, and
        those who were told before have come. Who comes earlier is told the same time again.
        """
        promises = self._promises
        due = promises.due(event)
        if due is None or promises.kept(event, now):
            promises.forget(event)
            busy = [model for model in models if self._world.calls.queued(model)]
            rate = sum(self._pace(model).rate(now, self._since(model)) for model in busy)
            wait_s = ahead_s / (rate or 1.0)
            due = now + min(max(wait_s, _SOONEST_S), _LATEST_S)
            if wait_s <= _LATEST_S:
                promises.make(event, self._slo(event), due)
        return due - now

    def _slo(self, event: CallArrived) -> str:
        """The class of the call's run, one of those with a level."""
        run = self._world.runs.get(event.run)
        return run.slo if run and run.slo in LEVELS else "standard"

    def _queued_s(self, model: str) -> float:
        return self._world.calls.queued_work.get(model, 0) / 1e6

    def _pace(self, model: str) -> Pace:
        if model not in self._paces:
            self._paces[model] = Pace()
        return self._paces[model]

    def _since(self, model: str) -> float | None:
        oldest = self._world.calls.oldest(model)
        return oldest.arrived if oldest else None

    def hopeless(self, model: str, now: float) -> Verdict | None:
        """Why no queued call of `model` can be served: it failed, or fits no device."""
        since = self.nodeless_since
        if since is not None and now - since >= self._world.settings.node_wait_s:
            return RejectReason.NO_NODE, "no node is there to serve this model", 5.0
        mine = self._world.of_model(model)
        if any(w.state not in _ABSENT or self._residencies.arriving(w.worker) for w in mine):
            return None
        if failure := self._residencies.failures.of_model(model, now):
            return RejectReason.MODEL_FAILED, failure.detail, failure.until - now
        needs = [(least_bytes(w), self._room(w)) for w in mine]
        if needs and all(need > room for need, room in needs):
            need, room = min(needs, key=lambda pair: pair[0] - pair[1])
            detail = (
                f"model {model!r} needs {need:,} bytes with its KV cache; at most {room:,} can be "
                f"had on a device: give the device more memory or the model less kv_memory"
            )
            return RejectReason.MODEL_TOO_LARGE, detail, None
        return None

    def _room(self, worker: WorkerInfo) -> int:
        """Bytes that `worker` can have at most: its device less what pinned neighbours need."""
        device = device_of(worker)
        pinned = (
            least_bytes(w)
            for w in self._world.on_device(device)
            if w.model in self._world.settings.pinned and w.model != worker.model
        )
        return self._world.ledger.capacity.get(device, 0) - sum(pinned)


def _full(queued: float, held: float, bound: float) -> bool:
    return queued + min(held, _HELD * bound) >= bound
