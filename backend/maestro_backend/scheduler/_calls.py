"""Calls in the scheduler: queued, then running on one worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._events import CallArrived
from ._fairness import Lane

Key = tuple[float, ...]
"""A policy's sort key: the smallest goes first."""


@dataclass(slots=True, eq=False)
class Call:
    """A call from arrival to its end. `worker` is None while it is queued."""

    request: CallArrived
    arrived: float
    order: int
    """Position of arrival: breaks every tie the same way."""
    worker: str | None = None
    started: float = 0.0
    """When it went to its worker, in its latest try (seconds)."""
    attempts: int = 0
    preemptions: int = 0
    settled: bool = False
    """It cannot be taken off its worker: its client has seen a first byte."""
    delayed: bool = False
    """It has had to wait for KV memory."""
    beside: tuple[int, int] = (0, 0)
    """Calls on its worker and on the others of its device, when it went there."""
    key: Key | None = None
    """Its place in its queue; None while it runs, or waits for the join of its stage."""
    work: int = 0
    """Predicted service, in microseconds: whole numbers, so that sums of them stay exact."""
    lane: Lane | None = None
    """Where its tenant's share is counted, while several tenants want the model."""
    charged_s: float = 0.0
    """Service that its tenant was charged with when it started (seconds)."""
    call: str = field(init=False)

    def __post_init__(self) -> None:
        self.call = self.request.call
        self.work = round(self.request.service_s * 1e6)


class CallTable:
    """All live calls: the queue of each model, oldest first, and what runs where."""

    def __init__(self) -> None:
        self.by_id: dict[str, Call] = {}
        self.queues: dict[str, dict[str, Call]] = {}
        self.running: dict[str, dict[str, Call]] = {}
        self.queued_work: dict[str, int] = {}
        """Model -> predicted service of what is queued for it, in microseconds."""
        self.waiting = 0
        """Calls in all queues."""
        self.emptied: dict[str, None] = {}
        """Models whose queue has become empty, in that order; cleared by whoever reads it."""
        self._arrivals = 0

    def add(self, request: CallArrived, now: float) -> Call:
        call = Call(request, now, self._arrivals)
        self._arrivals += 1
        self.by_id[call.call] = call
        self._enqueue(call)
        return call

    def start(self, call: Call, worker: str, now: float) -> None:
        self._leave(call)
        call.worker, call.started, call.key = worker, now, None
        call.attempts += 1
        call.settled = call.delayed = False
        self.running.setdefault(worker, {})[call.call] = call
        if call.lane is not None:
            call.lane.charge(call)

    def requeue(self, call: Call) -> None:
        """Back into the queue with its old arrival time, and in its old place."""
        self._leave(call)
        call.worker = None
        self._enqueue(call)
        queue = self.queues[call.request.model]
        self.queues[call.request.model] = dict(sorted(queue.items(), key=lambda i: i[1].order))

    def preempt(self, call: Call) -> None:
        """Back into the queue; the try does not count."""
        call.attempts -= 1
        call.preemptions += 1
        self.requeue(call)

    def remove(self, call: Call) -> None:
        self._leave(call)
        call.key = None
        del self.by_id[call.call]

    def predict(self, call: Call, request: CallArrived) -> None:
        """Take over a better prediction of a live call."""
        call.request = request
        work = round(request.service_s * 1e6)
        if call.worker is None:
            self.queued_work[request.model] += work - call.work
        call.work = work

    def queued(self, model: str) -> dict[str, Call]:
        return self.queues.get(model, _NO_CALLS)

    def oldest(self, model: str) -> Call | None:
        """The oldest queued call of `model`."""
        return next(iter(self.queued(model).values()), None)

    def on_worker(self, worker: str) -> dict[str, Call]:
        return self.running.get(worker, _NO_CALLS)

    def _enqueue(self, call: Call) -> None:
        model = call.request.model
        self.queues.setdefault(model, {})[call.call] = call
        self.queued_work[model] = self.queued_work.get(model, 0) + call.work
        self.waiting += 1

    def _leave(self, call: Call) -> None:
        if call.worker is None:
            model = call.request.model
            queue = self.queues[model]
            del queue[call.call]
            self.queued_work[model] -= call.work
            self.waiting -= 1
            if not queue:
                self.emptied[model] = None
        else:
            del self.running[call.worker][call.call]


_NO_CALLS: dict[str, Call] = {}
