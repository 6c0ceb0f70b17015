"""Kept prefixes: the KV of a run's last call waits in its worker for the run's next one."""

from __future__ import annotations

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

    def ended(self, call: Call, tokens: int, now: float) -> Iterator[Command]:
        """A call ended well: keep its prefix, if its run will likely call the model again soon."""
        run = self._world.runs.get(call.request.run)
        if run is None or call.worker is None:
            return
        model = call.request.model
        run.last_ended[model] = EndedCall(call.call, call.worker, tokens, now)
        yield from self._drop(run.run, model)
        yield from self._let_go(run)
        yield from self._keep(run, model, now)

    def review(self, run: Run, now: float) -> Iterator[Command]:
        """The run's forecast has changed."""
        for model in run.last_ended:
            if not self._seconds(run, model, now):
                yield from self._drop(run.run, model)
            elif not self._holds(run.run, model) and not self._runs(run, model):
                yield from self._keep(run, model, now)

    def forget(self, run: str) -> Iterator[Command]:
        """The run is over."""
        yield from self._drop(run, None)
        if state := self._world.runs.get(run):
            yield from self._let_go(state)

    def expire(self, now: float) -> None:
        """What was kept long enough: the worker lets go of it by itself."""
        for claim in self._world.ledger.claims.values():
            claim.kept = {call: kept for call, kept in claim.kept.items() if kept.until > now}

    def absorb(self, call: Call, worker: str) -> None:
        """A call is about to start where its run's prefix is kept: it holds those bytes itself."""
        claim = self._world.ledger.claims[worker]
        mine = (call.request.run, call.request.model)
        taken = [name for name, kept in claim.kept.items() if (kept.run, kept.model) == mine]
        for name in taken:
            del claim.kept[name]
        if run := self._world.runs.get(call.request.run):
            run.absorbed += [(worker, name) for name in taken]

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

    def _holds(self, run: str, model: str) -> bool:
        claims = self._world.ledger.claims.values()
        return any((k.run, k.model) == (run, model) for c in claims for k in c.kept.values())

    def _drop(self, run: str, model: str | None) -> Iterator[Command]:
        for claim in self._world.ledger.claims.values():
            for call, kept in list(claim.kept.items()):
                if kept.run == run and model in (None, kept.model):
                    yield self._world.drop_prefix(claim.worker, call)
