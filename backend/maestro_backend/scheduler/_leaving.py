"""Who may make room for a demand: what is idle first, then what can be spared, then the busy.

An idle worker leaves for a call that waits, and for a call that is expected if it could be back
before it is needed itself. A busy one may be drained: soon, if its model has another worker; for a
model that has no worker at all, after a while, also if it has none.
"""

from __future__ import annotations

from collections.abc import Iterable

from ._demand import Demand, urgency
from ._eviction import HORIZON_S, worthwhile
from ._nouns import Residency, WorkerInfo, WorkerState
from ._room import Step, resident
from ._world import World

SOON_S = 1.0
"""So long a call waits at the least before others give up anything for it (ours)."""
_RARE_S = 100.0
"""A further worker takes the place of another model only if that is used more seldom (ours)."""
_LIGHT = 1.0
"""Seconds of service per second that are little to do for a worker, which runs several calls at
once (ours)."""


class Leaving:
    """The rules; nothing is changed here."""

    def __init__(self, world: World) -> None:
        self._world = world

    def idle(
        self, info: WorkerInfo, demand: Demand, now: float, to: Residency = Residency.HOST
    ) -> bool:
        """Whether an idle worker may make room for the demand, by going as far as `to`."""
        world = self._world
        if self._stays(info, demand):
            return False
        if world.draining.get(info.worker) == demand.model:
            return not world.calls.on_worker(info.worker)
        if not world.idle(info):
            return False
        spare = world.spare(info)
        if (spare or demand.replica) and self._has_just_come(info, to, now):
            return False
        if spare or world.settings.look_ahead == "all":
            return True
        at = world.runs.expected_at(info.model)
        if demand.replica:
            return at is None and world.next_use_s(info.model, now) >= _RARE_S
        if at is None or demand.oldest is not None:
            return True
        # Against thrashing: it could be back before it is needed, the newcomer having been used.
        back_s = info.activation_s.get(to, 0.0)
        return demand.expected_at is not None and demand.expected_at + back_s < at

    def spare(self, info: WorkerInfo, demand: Demand, now: float) -> bool:
        """Whether a worker may leave, once its calls have ended: its model has another."""
        if self.idle(info, demand, now):
            return True
        if self._stays(info, demand) or demand.waited_s(now) < SOON_S:
            return False
        if not self._world.spare(info) or self._has_just_come(info, Residency.HOST, now):
            return False
        return not demand.replica or self.yields(info.model, demand, now)

    def busy(self, info: WorkerInfo, demand: Demand, now: float) -> bool:
        """Whether any worker may stop taking calls, to leave once its calls have ended."""
        if self.spare(info, demand, now):
            return True
        if demand.replica or demand.waited_s(now) < self._world.settings.patience_s:
            return False
        calls = self._world.calls
        stuck = info.state is WorkerState.SUSPENDED and calls.on_worker(info.worker)
        if stuck or self._stays(info, demand) or demand.oldest is None:
            return False
        oldest = calls.oldest(info.model)
        return oldest is None or self._world.spare(info) or urgency(demand.oldest) < urgency(oldest)

    def yields(self, model: str, demand: Demand, now: float) -> bool:
        """Whether a model gives up a worker of several for another worker of the demand's: it has
        little to do and the other has much, or the other's calls wait for long."""
        if demand.waited_s(now) >= self._world.settings.patience_s:
            return True
        traffic = self._world.traffic
        light = traffic.busy(model, now)
        return light < _LIGHT and light < traffic.busy(demand.model, now) / 2

    def worthwhile(self, info: WorkerInfo, steps: Iterable[Step], now: float) -> bool:
        """Whether a model that no call waits for may come in place of those that leave for it."""
        world = self._world
        if world.settings.look_ahead == "all":
            return True
        leaving = (
            resident(world, step.worker, now, step.residency)
            for step in steps
            if step.residency is not None and step.worker.residency is Residency.DEVICE
        )
        return worthwhile(resident(world, info, now), leaving, now, HORIZON_S)

    def _stays(self, info: WorkerInfo, demand: Demand) -> bool:
        return info.model in self._world.settings.pinned or info.model == demand.model

    def _has_just_come(self, info: WorkerInfo, to: Residency, now: float) -> bool:
        """Against thrashing: it has been ready for less time than it takes to be back."""
        back_s = max(SOON_S, info.activation_s.get(to, 0.0))
        came = self._world.came.get(info.worker)
        return came is not None and now - came < back_s
