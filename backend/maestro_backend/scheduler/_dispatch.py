"""Global and cluster level: which queued call goes next, and where to."""

from __future__ import annotations

from ._calls import Call
from ._commands import Command, Dispatch
from ._kept import KeptPrefixes
from ._ledger import device_of
from ._nouns import WorkerInfo
from ._placement import Places, kv_bytes
from ._queues import Queues
from ._runs import EndedCall
from ._shortage import Shortage
from ._world import World
from .policies import Policy


class Dispatcher:
    """Fills the workers' places from the queues, in the policy's order.

    Only models for which something has changed are looked at: calls that may go, places, memory.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        queues: Queues,
        shortage: Shortage,
        kept: KeptPrefixes,
    ) -> None:
        self._world = world
        self._policy = policy
        self._queues = queues
        self._shortage = shortage
        self._kept = kept
        self._stirred: set[str] = set()

    def stir(self, model: str) -> None:
        """Another call of `model` may go next."""
        self._stirred.add(model)

    def dispatch(self, now: float, *, everything: bool = False) -> list[Command]:
        """Start what can start; `everything`: look at all models anew."""
        world, stirred = self._world, self._stirred
        for model in world.settle_places(now):
            stirred.add(model)
            world.short.pop(model, None)
        if everything:
            world.short.clear()
            stirred.update(model for model, queue in world.calls.queues.items() if queue)
        elif world.short:
            for model, (_, device) in list(world.short.items()):
                if device in world.touched:
                    del world.short[model]
                    stirred.add(model)
        if not stirred:
            return []
        commands: list[Command] = []
        models = [model for model in stirred if world.calls.queued(model)]
        stirred.clear()
        for model in models if len(models) < 2 else sorted(models, key=self._queues.number):
            self._dispatch_model(model, now, commands, everything)
        return commands

    def _dispatch_model(
        self, model: str, now: float, commands: list[Command], at_last: bool
    ) -> None:
        """Fill the free places in policy order; stop at the first call that does not fit.

        No smaller call overtakes on memory: the head of the queue cannot starve.
        """
        world = self._world
        places = world.places.of(model)
        short = world.short.get(model) if places.free else None
        while places.free:
            if world.ledger.freed:
                short = None  # a call that went before has given up more than it took
            call = self._queues.first(model, now)
            if call is None or (short is not None and short[0] is call):
                return
            worker, tried = self._place(call, places)
            if worker is None:
                tried = tried or places.least_of_all()
                if tried is None:
                    return
                commands += self._shortage.relieve(call, tried, now, at_last=at_last)
                worker = self._try_again(call, tried)
                if worker is None:
                    world.short[model] = call, device_of(tried)
                    return
            call.beside = world.in_flight(worker)
            world.calls.start(call, worker.worker, now)
            world.places.refresh(worker)
            world.last_used[worker.worker] = now
            priority = self._policy.priority(call, world.runs.get(call.request.run), now)
            commands.append(Dispatch(world.next_id(), call.call, worker.worker, priority))
        world.short.pop(model, None)

    # --- where to -------------------------------------------------------------------------------

    def _place(self, call: Call, places: Places) -> tuple[WorkerInfo | None, WorkerInfo | None]:
        """The best worker with memory for the call, its KV bytes reserved; and the best that was
        found to have none."""
        if (home := self._kept.home(call)) and places.is_aside(home):
            places.refresh(home)
        tried, worker = None, self._last_of_run(call, places) or places.least()
        while worker is not None:
            if self._reserve(call, worker):
                return worker, tried
            places.set_aside(worker.worker)
            tried = tried or worker
            worker = places.least()
        while (worker := places.roomiest(call)) is not None:
            if self._reserve(call, worker):
                return worker, tried
            places.set_aside(worker.worker)  # what it had is taken meanwhile
        return None, tried

    def _last_of_run(self, call: Call, places: Places) -> WorkerInfo | None:
        if len(places.open) == 1:
            return None
        run = self._world.runs.get(call.request.run)
        last = run.last_ended.get(call.request.model) if run else None
        return places.last_of_run(last.worker, self._saved(call, last)) if last else None

    def _saved(self, call: Call, last: EndedCall) -> float:
        """What the run's prefix in a worker's cache saves of the call's time, as a share."""
        request = call.request
        tokens = min(last.tokens, request.prompt_tokens)
        saved_s = tokens * self._world.traffic.prefill_s(request.model)
        return saved_s / max(request.service_s, 0.01)

    def _reserve(self, call: Call, worker: WorkerInfo) -> bool:
        ledger, need = self._world.ledger, kv_bytes(call, worker)
        claim = ledger.claims[worker.worker]
        if claim.kept:
            if need > claim.kv_free + self._kept.size(call, worker.worker):
                return False
            self._kept.absorb(call, worker.worker)
        elif need > claim.kv_free:
            return False
        claim.hold(call.call, need)
        return True

    def _try_again(self, call: Call, worker: WorkerInfo) -> WorkerInfo | None:
        """The worker, if the call can start there after what was done for it.

        Alone on a worker whose limit cannot grow, a call starts with what there is.
        """
        if self._reserve(call, worker):
            return worker
        if not self._shortage.hopeless(worker):
            return None
        self._kept.absorb(call, worker.worker)
        claim = self._world.ledger.claims[worker.worker]
        claim.hold(call.call, claim.kv_free)
        return worker
