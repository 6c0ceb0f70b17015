"""Further workers of models whose own are full."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from itertools import islice

from ._calls import Call
from ._commands import Command
from ._demand import Demand
from ._failures import Failures
from ._leaving import SOON_S, Leaving
from ._ledger import device_of, kv_least
from ._nouns import WorkerInfo, WorkerState
from ._world import World

_EVERY_S = 0.5
"""So often it is thought of (ours)."""

Bring = Callable[[Demand, Iterable[WorkerInfo]], Iterator[Command]]
"""Bring a model in on one of these workers, if that can be done now."""


class Replicas:
    """Another worker for each model whose calls wait although its workers are full, once the oldest
    has waited for about as long as that takes."""

    def __init__(self, world: World, failures: Failures, leaving: Leaving) -> None:
        self._world, self._failures, self._leaving = world, failures, leaving
        self._thought = 0.0
        self.wanted: set[str] = set()
        """Models that should have another worker, as of then."""

    def due(self, now: float) -> bool:
        """Whether it is time to think of them again; it is done with that."""
        if now - self._thought < _EVERY_S:
            return False
        self._thought = now
        return True

    def bring(
        self, demands: Iterable[Demand], unmet: Container[str], bring: Bring, now: float
    ) -> Iterator[Command]:
        """Of the models in demand that are not `unmet`."""
        world = self._world
        self.wanted.clear()
        for demand in demands:
            model = demand.model
            away = world.away(model)
            if not away or len(world.of_model(model)) < 2 or model in unmet:
                continue
            if self._failures.of_model(model, now):
                continue
            if world.places.of(model).free and model not in world.short:
                continue
            oldest = next(self._free_calls(model), None)
            if oldest is None or not self._outnumber(model, self._places_coming(model)):
                continue
            self.wanted.add(model)
            replica = Demand(model, oldest, replica=True)
            workers = [w for w in away if self._may_come(w, replica, now)]
            yield from bring(replica, workers) if workers else self._relocate(replica, bring, now)

    def _free_calls(self, model: str) -> Iterator[Call]:
        """The queued calls of the model that may go, oldest first."""
        return (call for call in self._world.calls.queued(model).values() if call.key is not None)

    def _outnumber(self, model: str, places: int) -> bool:
        """Whether more calls than that may go; no more of them are looked at."""
        return next(islice(self._free_calls(model), places, None), None) is not None

    def _may_come(self, info: WorkerInfo, replica: Demand, now: float) -> bool:
        """Whether the worker could be a further one, now that the oldest call has waited so."""
        if not self._is_time(info, replica, now):
            return False
        return self._world.kv_room(info) >= kv_least(info) or any(
            self._leaving.spare(w, replica, now) for w in self._world.of_device(device_of(info))
        )

    def _is_time(self, info: WorkerInfo, replica: Demand, now: float) -> bool:
        """Whether the oldest call has waited for as long as the worker takes to come."""
        back_s = max(SOON_S, info.activation_s.get(info.residency, 0.0))
        return replica.waited_s(now) >= back_s and self._failures.may_be_tried(info, now)

    def _places_coming(self, model: str) -> int:
        world = self._world
        coming = (w for w in world.of_model(model) if w.state is not WorkerState.READY)
        return sum(w.max_inflight for w in coming if world.comes(w))

    def _relocate(self, replica: Demand, bring: Bring, now: float) -> Iterator[Command]:
        """Where another model stands in the way: a worker of that on another device, so that this
        one can be spared."""
        world = self._world
        for info in world.away(replica.model):
            if not self._is_time(info, replica, now):
                continue
            for other in world.of_device(device_of(info)):
                if other.model == replica.model or not world.takes_calls(other):
                    continue
                if world.spare(other) or not self._leaving.yields(other.model, replica, now):
                    continue
                second = Demand(other.model, replica.oldest, replica=True)
                if commands := list(bring(second, world.away(other.model))):
                    yield from commands
                    return
