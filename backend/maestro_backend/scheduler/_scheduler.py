"""`Scheduler.handle(event, now) -> commands`: one pure object for server, simulator and tests."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import _events as ev
from ._calls import Call, CallTable
from ._commands import Abort, Command, Dispatch, Reject, RejectReason, SetResidency
from ._invariants import check
from ._ledger import Ledger, device_key, need_bytes
from ._nouns import Residency, WorkerInfo, WorkerState
from ._placement import best_worker, claim, open_workers, reserve
from ._residency import Failure, Move, Residencies, World
from ._runs import RunTable
from .policies import Policy


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds of the scheduler; times in seconds. All values are ours."""

    max_queued: int = 10_000
    max_attempts: int = 5
    """Tries of a call whose worker was lost each time."""
    max_error_attempts: int = 2
    """Tries of a call that a healthy engine answers with an error."""
    node_wait_s: float = 60.0
    """With no node at all, calls wait so long for one."""
    patience_s: float = 15.0
    """A waiting call drains another model's worker only after this long."""
    failure_pause_s: float = 30.0
    """A model that could not be brought in is not tried again before this."""
    suspect_s: float = 0.5
    """A worker that broke a call gets no other for this long, doubled with each further try of
    the call, unless its node says more: time for the node to notice a death."""
    run_idle_s: float = 3600.0
    """A run without calls or events for this long is forgotten."""
    pinned: tuple[str, ...] = ()
    """Models that never make room for others."""


class Scheduler:
    """The state of all runs, calls and workers. Only `handle` changes it."""

    def __init__(self, policy: Policy, settings: Settings | None = None) -> None:
        self.policy = policy
        self.settings = settings or Settings()
        self.runs = RunTable()
        self.calls = CallTable()
        self.workers: dict[str, WorkerInfo] = {}
        self.ledger = Ledger()
        self.residencies = Residencies(self.settings.patience_s, self.settings.pinned)
        self._suspects: dict[str, float] = {}
        self._nodeless_since: float | None = 0.0
        self._commands = 0
        self._handlers: dict[type, Callable[[Any, float], Iterator[Command]]] = {
            ev.RunStarted: self._run_started,
            ev.Announced: self._run_seen,
            ev.ForecastChanged: self._forecast_changed,
            ev.StageStarted: self._run_seen,
            ev.StageEnded: self._run_seen,
            ev.ToolStarted: self._run_seen,
            ev.ToolEnded: self._run_seen,
            ev.RunPaused: self._run_paused,
            ev.RunResumed: self._run_resumed,
            ev.CallArrived: self._call_arrived,
            ev.CallProgress: self._call_progress,
            ev.CallFinished: self._call_finished,
            ev.CallFailed: self._call_failed,
            ev.CallCancelled: self._call_cancelled,
            ev.RunEnded: self._run_ended,
            ev.WorkerChanged: self._worker_changed,
            ev.NodeJoined: self._node_joined,
            ev.NodeLost: self._node_lost,
            ev.MemoryMeasured: self._memory_measured,
            ev.CommandApplied: self._command_applied,
            ev.CommandFailed: self._command_failed,
            ev.Tick: self._tick,
        }

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """Take one event at time `now` (seconds, never going back); return what to do."""
        commands = list(self._handlers[type(event)](event, now))
        if not isinstance(event, ev.CallProgress):
            commands += self._plan_residency(now)
            commands += self._reject_hopeless(now)
            commands += self._dispatch(now)
        return commands

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            InvariantError: one is broken; the message tells which.
        """
        check(self.calls, self.workers, self.ledger, self.runs.by_id)

    # --- runs -----------------------------------------------------------------------------------

    def _run_started(self, event: ev.RunStarted, now: float) -> Iterator[Command]:
        self.runs.ensure(event.run, now).start(event, now)
        yield from ()

    def _run_seen(
        self,
        event: ev.Announced | ev.StageStarted | ev.StageEnded | ev.ToolStarted | ev.ToolEnded,
        now: float,
    ) -> Iterator[Command]:
        """A sign of life; it may come after the run's end, and then starts nothing."""
        if run := self.runs.get(event.run):
            run.last_seen = now
        yield from ()

    def _forecast_changed(self, event: ev.ForecastChanged, now: float) -> Iterator[Command]:
        self.runs.believe(self.runs.ensure(event.run, now), event.calls)
        yield from ()

    def _run_paused(self, event: ev.RunPaused, now: float) -> Iterator[Command]:
        if run := self.runs.get(event.run):
            run.pause(now)
        yield from ()

    def _run_resumed(self, event: ev.RunResumed, now: float) -> Iterator[Command]:
        if run := self.runs.get(event.run):
            run.resume(now)
        yield from ()

    def _run_ended(self, event: ev.RunEnded, now: float) -> Iterator[Command]:
        if run := self.runs.get(event.run):
            self.runs.believe(run, ())
            run.ended = True
            self.runs.forget_if_over(run)
        yield from ()

    # --- calls ----------------------------------------------------------------------------------

    def _call_arrived(self, event: ev.CallArrived, now: float) -> Iterator[Command]:
        if event.call in self.calls.by_id:
            return
        if refusal := self._refusal(event):
            reason, detail, retry_after_s = refusal
            yield Reject(self._next_id(), event.call, reason, detail, retry_after_s)
            return
        self.calls.add(event, now)
        run = self.runs.ensure(event.run, now)
        run.live_calls.add(event.call)
        run.ended = event.run == event.call  # a call without a run is one of its own

    def _refusal(self, event: ev.CallArrived) -> tuple[RejectReason, str, float | None] | None:
        if self.workers and not any(w.model == event.model for w in self.workers.values()):
            return RejectReason.UNKNOWN_MODEL, f"no node serves model {event.model!r}", None
        queued = sum(len(queue) for queue in self.calls.queues.values())
        if queued >= self.settings.max_queued:
            return RejectReason.QUEUE_FULL, f"{queued} calls are queued already", 5.0
        return None

    def _call_progress(self, event: ev.CallProgress, now: float) -> Iterator[Command]:
        call = self.calls.by_id.get(event.call)
        if call and call.worker in self.workers:
            worker = self.workers[call.worker]
            tokens = event.computed_tokens + event.generated_tokens
            self.ledger.grow(worker.worker, event.call, tokens * worker.kv_bytes_per_token)
        yield from ()

    def _call_finished(self, event: ev.CallFinished, now: float) -> Iterator[Command]:
        if call := self.calls.by_id.get(event.call):
            self._end(call, now)
        yield from ()

    def _call_failed(self, event: ev.CallFailed, now: float) -> Iterator[Command]:
        call = self.calls.by_id.get(event.call)
        if call is None or (call.worker is None and event.retryable):
            return
        limit = self.settings
        attempts = limit.max_attempts if event.worker_lost else limit.max_error_attempts
        if call.worker is None or not event.retryable:
            self._end(call, now)
        elif call.attempts >= attempts:
            self._end(call, now)
            detail = f"failed {call.attempts} times, last: {event.reason}"
            yield Reject(self._next_id(), event.call, RejectReason.RETRIES_EXHAUSTED, detail)
        else:
            if event.worker_lost:
                rest_s = limit.suspect_s * 2 ** (call.attempts - 1)
                self._suspects[call.worker] = now + rest_s
            self.ledger.release(call.worker, call.call)
            self.calls.requeue(call)

    def _call_cancelled(self, event: ev.CallCancelled, now: float) -> Iterator[Command]:
        if call := self.calls.by_id.get(event.call):
            worker = call.worker
            self._end(call, now)
            if worker is not None:
                yield Abort(self._next_id(), event.call, worker)

    def _end(self, call: Call, now: float) -> None:
        """Remove a call for good: its reservation, its place, its mark in the run."""
        if call.worker is not None:
            self.ledger.release(call.worker, call.call)
            self.residencies.last_used[call.worker] = now
        self.calls.remove(call)
        if run := self.runs.get(call.request.run):
            run.live_calls.discard(call.call)
            run.last_seen = now
            self.runs.forget_if_over(run)

    # --- workers and memory ---------------------------------------------------------------------

    def _node_joined(self, event: ev.NodeJoined, now: float) -> Iterator[Command]:
        for device in event.info.devices:
            self.ledger.add_device(event.info.node, device)
        for info in event.info.workers:
            self._take(info, now)
        self.residencies.preload = list(event.preload)
        self._nodeless_since = None
        yield from ()

    def _worker_changed(self, event: ev.WorkerChanged, now: float) -> Iterator[Command]:
        self._take(event.info, now)
        yield from ()

    def _take(self, info: WorkerInfo, now: float) -> None:
        """Believe what a node reports of a worker."""
        self.workers[info.worker] = info
        self._suspects.pop(info.worker, None)
        if info.state is WorkerState.FAILED:
            self._failed(info, info.detail, now)
        elif info.state is not WorkerState.STOPPED:
            claim(info, self.ledger, self.calls)
        elif not self.residencies.arriving(info.worker):
            self.ledger.release_worker(info.worker)

    def _failed(self, info: WorkerInfo, detail: str, now: float) -> None:
        self.ledger.release_worker(info.worker)
        until = now + self.settings.failure_pause_s
        self.residencies.failures[info.model] = Failure(until, detail)

    def _node_lost(self, event: ev.NodeLost, now: float) -> Iterator[Command]:
        """Its workers take no more calls; those running there fail one by one in the shell."""
        gone = {w.worker for w in self.workers.values() if w.node == event.node}
        self.workers = {w: info for w, info in self.workers.items() if w not in gone}
        self.ledger.drop_node(event.node)
        moves = self.residencies.moves
        self.residencies.moves = {i: m for i, m in moves.items() if m.worker not in gone}
        for worker in gone:
            self.residencies.draining.pop(worker, None)
        if not self.workers:
            self._nodeless_since = now
        yield from ()

    def _memory_measured(self, event: ev.MemoryMeasured, now: float) -> Iterator[Command]:
        self.ledger.measured[event.device] = event.used_bytes
        yield from ()

    def _command_applied(self, event: ev.CommandApplied, now: float) -> Iterator[Command]:
        self.residencies.moves.pop(event.command, None)
        yield from ()

    def _command_failed(self, event: ev.CommandFailed, now: float) -> Iterator[Command]:
        move = self.residencies.moves.pop(event.command, None)
        worker = self.workers.get(move.worker) if move else None
        if move is None or worker is None or move.residency is not Residency.DEVICE:
            return
        if worker.state is WorkerState.STOPPED and need_bytes(worker) != move.need:
            self.ledger.release_worker(worker.worker)  # its size is known only now: plan again
        elif worker.state is not WorkerState.READY:
            self._failed(worker, event.reason, now)
        yield from ()

    def _tick(self, event: ev.Tick, now: float) -> Iterator[Command]:
        limit = now - self.settings.run_idle_s
        idle = [r for r in self.runs.by_id.values() if r.last_seen < limit and not r.live_calls]
        for run in idle:
            self.runs.forget(run)
        yield from ()

    # --- planning -------------------------------------------------------------------------------

    def _plan_residency(self, now: float) -> Iterator[Command]:
        world = World(self.workers, self.calls, self.runs, self.ledger, now)
        for move in self.residencies.plan(world):
            command = self._next_id()
            worker = self.workers[move.worker]
            need = need_bytes(worker)
            self.residencies.moves[command] = Move(move.worker, move.residency, need)
            yield SetResidency(command, worker.node, worker.model, move.residency)

    def _reject_hopeless(self, now: float) -> Iterator[Command]:
        """Answer calls that no worker can take: the model failed, or fits no device."""
        for model in [m for m, queue in self.calls.queues.items() if queue]:
            if verdict := self._hopeless(model, now):
                reason, detail, retry_after_s = verdict
                for call in list(self.calls.queued(model).values()):
                    self._end(call, now)
                    yield Reject(self._next_id(), call.call, reason, detail, retry_after_s)

    def _hopeless(self, model: str, now: float) -> tuple[RejectReason, str, float | None] | None:
        since = self._nodeless_since
        if since is not None and now - since >= self.settings.node_wait_s:
            return RejectReason.NO_NODE, "no node is there to serve this model", 5.0
        mine = [w for w in self.workers.values() if w.model == model]
        living = [w for w in mine if w.state not in (WorkerState.STOPPED, WorkerState.FAILED)]
        if living or any(self.residencies.arriving(w.worker) for w in mine):
            return None
        if failure := self.residencies.failure(model, now):
            return RejectReason.MODEL_FAILED, failure.detail, failure.until - now
        needs = [(need_bytes(w), self._room(w)) for w in mine]
        if needs and all(need > room for need, room in needs):
            need, room = min(needs, key=lambda pair: pair[0] - pair[1])
            detail = (
                f"model {model!r} needs {need:,} bytes with its KV cache; at most {room:,} can be "
                f"had on a device: give the device more memory or the model less kv_memory"
            )
            return RejectReason.MODEL_TOO_LARGE, detail, None
        return None

    def _room(self, worker: WorkerInfo) -> int:
        """Bytes that `worker` can have at most: its device less what pinned neighbours hold."""
        device = device_key(worker.node, worker.device)
        pinned = (
            w.worker
            for w in self.workers.values()
            if w.model in self.settings.pinned and w.model != worker.model
        )
        held = (self.ledger.claims[w] for w in pinned if w in self.ledger.claims)
        return self.ledger.capacity.get(device, 0) - sum(
            claim.total for claim in held if claim.device == device
        )

    def _dispatch(self, now: float) -> Iterator[Command]:
        for model in [m for m, queue in self.calls.queues.items() if queue]:
            yield from self._dispatch_model(model, now)

    def _dispatch_model(self, model: str, now: float) -> Iterator[Command]:
        """Fill the free places in policy order; stop at the first call that does not fit.

        No smaller call overtakes on memory: the head of the queue cannot starve.
        """
        closed = self._closed(now)
        places = sum(
            w.max_inflight - len(self.calls.on_worker(w.worker))
            for w in open_workers(self.workers.values(), model, self.calls, closed)
        )
        if places <= 0:
            return
        ready = [c for c in self.calls.queued(model).values() if not self._held(c)]
        for call in heapq.nsmallest(places, ready, key=lambda c: self._key(c, now)):
            worker = self._place(call, closed)
            if worker is None:
                return
            self.calls.start(call, worker.worker)
            self.residencies.last_used[worker.worker] = now
            run = self.runs.get(call.request.run)
            priority = self.policy.priority(call, run, now)
            yield Dispatch(self._next_id(), call.call, worker.worker, priority)

    def _closed(self, now: float) -> set[str]:
        """Workers that get no call now: leaving, making room, or under suspicion."""
        self._suspects = {w: until for w, until in self._suspects.items() if now < until}
        return self.residencies.closed() | set(self._suspects)

    def _held(self, call: Call) -> bool:
        """Whether the stage's join is still open: earlier calls of a source stage are live.

        Only calls that arrived before it count, so that holding can never go in a circle.
        """
        wanted = call.request.waits_for
        run = self.runs.get(call.request.run) if wanted else None
        earlier = (self.calls.by_id[c] for c in run.live_calls) if run else ()
        return any(c.order < call.order and c.request.stage in wanted for c in earlier)

    def _key(self, call: Call, now: float) -> tuple[float, ...]:
        return self.policy.key(call, self.runs.get(call.request.run), now)

    def _place(self, call: Call, closed: set[str]) -> WorkerInfo | None:
        """The best worker with memory for the call, its KV bytes reserved; None if none has."""
        full: set[str] = set()
        while True:
            model = call.request.model
            candidates = open_workers(self.workers.values(), model, self.calls, closed | full)
            if not candidates:
                return None
            worker = best_worker(call, candidates, self.calls)
            if reserve(call, worker, self.ledger):
                return worker
            full.add(worker.worker)

    def _next_id(self) -> int:
        self._commands += 1
        return self._commands
