"""Which calls cannot be served, and why."""

from __future__ import annotations

from ._commands import RejectReason
from ._events import CallArrived
from ._ledger import device_key, least_bytes
from ._nouns import WorkerInfo, WorkerState
from ._residency import Residencies
from ._world import World

Verdict = tuple[RejectReason, str, float | None]
"""Reason, the words for people, and after how many seconds trying again may help."""

_ABSENT = (WorkerState.STOPPED, WorkerState.FAILED, WorkerState.SUSPENDED)


class Verdicts:
    """Says no to calls that would wait for ever. `nodeless_since`: None while a node is there."""

    def __init__(self, world: World, residencies: Residencies) -> None:
        self._world = world
        self._residencies = residencies
        self.nodeless_since: float | None = 0.0

    def refusal(self, event: CallArrived) -> Verdict | None:
        """Why a call cannot even enter the queue."""
        world = self._world
        if world.workers and not world.of_model(event.model):
            return RejectReason.UNKNOWN_MODEL, f"no node serves model {event.model!r}", None
        queued = world.calls.waiting
        if queued >= world.settings.max_queued:
            return RejectReason.QUEUE_FULL, f"{queued} calls are queued already", 5.0
        return None

    def hopeless(self, model: str, now: float) -> Verdict | None:
        """Why no queued call of `model` can be served: it failed, or fits no device."""
        since = self.nodeless_since
        if since is not None and now - since >= self._world.settings.node_wait_s:
            return RejectReason.NO_NODE, "no node is there to serve this model", 5.0
        mine = self._world.of_model(model)
        if any(w.state not in _ABSENT or self._residencies.arriving(w.worker) for w in mine):
            return None
        if failure := self._residencies.failure(model, now):
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
        device = device_key(worker.node, worker.device)
        pinned = (
            least_bytes(w)
            for w in self._world.on_device(device)
            if w.model in self._world.settings.pinned and w.model != worker.model
        )
        return self._world.ledger.capacity.get(device, 0) - sum(pinned)
