"""Global and cluster level: which queued call goes next, and where to."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator

from ._calls import Call
from ._commands import Command, Dispatch
from ._kept import KeptPrefixes
from ._nouns import WorkerInfo
from ._placement import best_worker, kv_bytes, open_workers
from ._residency import Residencies
from ._shortage import Shortage
from ._world import World
from .policies import Policy


class Dispatcher:
    """Fills the workers' places from the queues, in the policy's order."""

    def __init__(
        self,
        world: World,
        policy: Policy,
        residencies: Residencies,
        shortage: Shortage,
        kept: KeptPrefixes,
    ) -> None:
        self._world = world
        self._policy = policy
        self._residencies = residencies
        self._shortage = shortage
        self._kept = kept
        self._suspects: dict[str, float] = {}

    def suspect(self, worker: str, until: float) -> None:
        """The worker broke a call: it gets no other until then."""
        self._suspects[worker] = until

    def trust(self, worker: str) -> None:
        """Its node has spoken of it."""
        self._suspects.pop(worker, None)

    def dispatch(self, now: float) -> Iterator[Command]:
        for model in [m for m, queue in self._world.calls.queues.items() if queue]:
            yield from self._dispatch_model(model, now)

    def _dispatch_model(self, model: str, now: float) -> Iterator[Command]:
        """Fill the free places in policy order; stop at the first call that does not fit.

        No smaller call overtakes on memory: the head of the queue cannot starve.
        """
        calls, runs = self._world.calls, self._world.runs
        closed = self._closed(now)
        places = sum(
            w.max_inflight - len(calls.on_worker(w.worker))
            for w in open_workers(self._world.workers.values(), model, calls, closed)
        )
        if places <= 0:
            return
        ready = [c for c in calls.queued(model).values() if not self._held(c)]
        for call in heapq.nsmallest(places, ready, key=lambda c: self._key(c, now)):
            worker = self._place(call, closed)
            if worker is None:
                worker = yield from self._find_memory(call, closed, now)
            if worker is None:
                return
            calls.start(call, worker.worker)
            self._world.last_used[worker.worker] = now
            priority = self._policy.priority(call, runs.get(call.request.run), now)
            yield Dispatch(self._world.next_id(), call.call, worker.worker, priority)

    def _closed(self, now: float) -> set[str]:
        """Workers that get no call now: leaving, making room, or under suspicion."""
        self._suspects = {w: until for w, until in self._suspects.items() if now < until}
        return self._residencies.closed() | set(self._suspects)

    def _held(self, call: Call) -> bool:
        """Whether the stage's join is still open: earlier calls of a source stage are live.

        Only calls that arrived before it count, so that holding can never go in a circle.
        """
        wanted = call.request.waits_for
        run = self._world.runs.get(call.request.run) if wanted else None
        earlier = (self._world.calls.by_id[c] for c in run.live_calls) if run else ()
        return any(c.order < call.order and c.request.stage in wanted for c in earlier)

    def _key(self, call: Call, now: float) -> tuple[float, ...]:
        return self._policy.key(call, self._world.runs.get(call.request.run), now)

    # --- where to -------------------------------------------------------------------------------

    def _open(self, call: Call, closed: set[str]) -> list[WorkerInfo]:
        workers = self._world.workers.values()
        return open_workers(workers, call.request.model, self._world.calls, closed)

    def _place(self, call: Call, closed: set[str]) -> WorkerInfo | None:
        """The best worker with memory for the call, its KV bytes reserved; None if none has."""
        full: set[str] = set()
        while candidates := self._open(call, closed | full):
            worker = best_worker(call, candidates, self._world.calls)
            if self._reserve(call, worker):
                return worker
            full.add(worker.worker)
        return None

    def _reserve(self, call: Call, worker: WorkerInfo) -> bool:
        claim = self._world.ledger.claims[worker.worker]
        kept = dict(claim.kept)
        self._kept.absorb(call, worker.worker)
        if self._world.ledger.reserve(worker.worker, call.call, kv_bytes(call, worker)):
            return True
        claim.kept = kept
        return False

    def _find_memory(
        self, call: Call, closed: set[str], now: float
    ) -> Generator[Command, None, WorkerInfo | None]:
        """Relieve the shortage of the best worker; it, if the call can start there at once.

        Alone on a worker whose limit cannot grow, a call starts with what there is.
        """
        candidates = self._open(call, closed)
        if not candidates:
            return None
        worker = best_worker(call, candidates, self._world.calls)
        yield from self._shortage.relieve(call, worker, now)
        if self._reserve(call, worker):
            return worker
        if not self._shortage.hopeless(worker):
            return None
        self._kept.absorb(call, worker.worker)
        ledger = self._world.ledger
        ledger.reserve(worker.worker, call.call, ledger.claims[worker.worker].kv_free)
        return worker
