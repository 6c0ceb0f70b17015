"""Kept prefixes: the KV of a run's last call waits in its worker for the run's next one."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from ._calls import Call
from ._commands import Command
from ._ledger import Claim, Kept
from ._nouns import WorkerInfo, WorkerState
from ._runs import EndedCall, Run
from ._world import World

_LATE_S = 5.0
"""A call that ended longer ago is not kept any more: its blocks may be gone."""


class KeptPrefixes:
    """One prefix per run and model. Bytes are held inside the worker's KV limit."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._where: dict[str, dict[str, tuple[str, str]]] = {}
        """Run -> model -> worker and call. The claim says whether it is still so."""
        self._ends: list[tuple[float, str, str]] = []
        """A heap: until when, worker and call."""

    def ended(self, call: Call, run: Run | None, tokens: int, now: float) -> list[Command]:
        """A call ended well: keep its prefix, if its run will likely call the model again soon."""
        if run is None or call.worker is None:
            return []
        model = call.request.model
        run.last_ended[model] = EndedCall(call.call, call.worker, tokens, now)
        if not run.models and run.run not in self._where and not run.absorbed:
            return []
        return [*self._drop(run.run, model), *self._let_go(run), *self._keep(run, model, now)]

    def review(self, run: Run, now: float) -> Iterator[Command]:
        """The run's forecast has changed."""
        kept = self._where.get(run.run, ())
        for model, last in run.last_ended.items():
            if now - last.at > _LATE_S and model not in kept:
                continue
            if not self._seconds(run, model, now):
                yield from self._drop(run.run, model)
            elif self._find(run.run, model) is None and not self._runs(run, model):
                yield from self._keep(run, model, now)

    def forget(self, run: str, state: Run | None) -> Iterator[Command]:
        """The run is over; `state` is what is still known of it."""
        yield from self._drop(run)
        self._where.pop(run, None)
        if state is not None:
            yield from self._let_go(state)

    def expire(self, now: float) -> None:
        """What was kept long enough: the worker lets go of it by itself."""
        ledger = self._world.ledger
        while self._ends and self._ends[0][0] <= now:
            _, worker, call = heapq.heappop(self._ends)
            claim = ledger.claims.get(worker)
            if claim is not None and call in claim.kept and claim.kept[call].until <= now:
                ledger.forget(worker, call)

    def home(self, call: Call) -> str | None:
        """The worker that keeps what the call's run left there last."""
        found = self._find(call.request.run, call.request.model)
        return None if found is None else found[0].worker

    def size(self, call: Call, worker: str) -> int:
        """Bytes kept on the worker that the call would hold itself."""
        found = self._find(call.request.run, call.request.model)
        if found is None or found[0].worker != worker:
            return 0
        return found[0].kept[found[1]].size

    def absorb(self, call: Call, worker: str) -> None:
        """A call starts where its run's prefix is kept: it holds those bytes itself."""
        found = self._find(call.request.run, call.request.model)
        if found is None or found[0].worker != worker:
            return
        self._world.ledger.forget(worker, found[1])
        if run := self._world.runs.get(call.request.run):
            run.absorbed.append((worker, found[1]))

    def _let_go(self, run: Run) -> Iterator[Command]:
        """The worker still holds what later calls of the run have taken over."""
        for worker, call in run.absorbed:
            if worker in self._world.ledger.claims:
                yield self._world.drop_prefix(worker, call)
        run.absorbed.clear()

    def _runs(self, run: Run, model: str) -> bool:
        """Whether a call of the run holds the prefix itself now."""
        calls = (self._world.calls.by_id[call] for call in run.live_calls)
        return any(c.request.model == model and c.worker is not None for c in calls)

    def _keep(self, run: Run, model: str, now: float) -> Iterator[Command]:
        last, seconds = run.last_ended[model], self._seconds(run, model, now)
        info = self._world.workers.get(last.worker)
        claim = self._world.ledger.claims.get(last.worker)
        if not seconds or info is None or claim is None or now - last.at > _LATE_S:
            return
        size = info.kept_bytes_of(last.tokens)
        if self._room(info, claim) >= size > 0:
            kept = Kept(run.run, model, size, now + seconds)
            self._where.setdefault(run.run, {})[model] = last.worker, last.call
            heapq.heappush(self._ends, (kept.until, last.worker, last.call))
            yield self._world.keep_prefix(last.worker, last.call, kept, now)

    def _room(self, info: WorkerInfo, claim: Claim) -> int:
        """Bytes that may be kept: what a longest request needs stays free of them."""
        moves = self._world.move_of(info.worker) is not None
        if info.state is not WorkerState.READY or moves or not info.kv_floor_bytes:
            return 0
        return claim.kv_keepable

    def _seconds(self, run: Run, model: str, now: float) -> float:
        """How long to keep; 0 for not at all."""
        at = run.models.get(model)
        settings = self._world.settings
        if at is None or at - now > settings.keep_ahead_s:
            return 0.0
        return max(0.0, at - now) + settings.keep_grace_s

    def _find(self, run: str, model: str) -> tuple[Claim, str] | None:
        """Where the run's prefix for the model is kept, and of which call it is."""
        where = self._where.get(run)
        if where is None or model not in where:
            return None
        worker, call = where[model]
        claim = self._world.ledger.claims.get(worker)
        kept = claim.kept.get(call) if claim is not None else None
        if claim is None or kept is None or kept.run != run:
            del where[model]
            return None
        return claim, call

    def _drop(self, run: str, model: str | None = None) -> Iterator[Command]:
        models = list(self._where.get(run, ())) if model is None else [model]
        found = [place for m in models if (place := self._find(run, m))]
        for claim, call in sorted(found, key=lambda place: place[0].number):
            yield self._world.drop_prefix(claim.worker, call)
