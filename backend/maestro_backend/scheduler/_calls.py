"""Calls in the scheduler: queued, then running on one worker."""

from __future__ import annotations

from dataclasses import dataclass

from ._events import CallArrived


@dataclass(slots=True)
class Call:
    """A call from arrival to its end. `worker` is None while it is queued."""

    request: CallArrived
    arrived: float
    order: int
    """Position of arrival: breaks every tie the same way."""
    worker: str | None = None
    attempts: int = 0
    preemptions: int = 0
    settled: bool = False
    """It cannot be taken off its worker: its client has seen a first byte."""
    delayed: bool = False
    """It has had to wait for KV memory."""

    @property
    def call(self) -> str:
        return self.request.call


class CallTable:
    """All live calls: the queue of each model, and what runs where."""

    def __init__(self) -> None:
        self.by_id: dict[str, Call] = {}
        self.queues: dict[str, dict[str, Call]] = {}
        self.running: dict[str, dict[str, Call]] = {}
        self._arrivals = 0

    def add(self, request: CallArrived, now: float) -> Call:
        call = Call(request, now, self._arrivals)
        self._arrivals += 1
        self.by_id[call.call] = call
        self._enqueue(call)
        return call

    def start(self, call: Call, worker: str) -> None:
        del self.queues[call.request.model][call.call]
        call.worker = worker
        call.attempts += 1
        call.settled = call.delayed = False
        self.running.setdefault(worker, {})[call.call] = call

    def requeue(self, call: Call) -> None:
        """Back into the queue with its old arrival time."""
        self._leave(call)
        call.worker = None
        self._enqueue(call)

    def preempt(self, call: Call) -> None:
        """Back into the queue; the try does not count."""
        call.attempts -= 1
        call.preemptions += 1
        self.requeue(call)

    def remove(self, call: Call) -> None:
        self._leave(call)
        del self.by_id[call.call]

    def queued(self, model: str) -> dict[str, Call]:
        return self.queues.get(model, {})

    def on_worker(self, worker: str) -> dict[str, Call]:
        return self.running.get(worker, {})

    def _enqueue(self, call: Call) -> None:
        self.queues.setdefault(call.request.model, {})[call.call] = call

    def _leave(self, call: Call) -> None:
        home = self.queues[call.request.model] if call.worker is None else self.running[call.worker]
        del home[call.call]
