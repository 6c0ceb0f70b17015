"""Copies of weights in host memory: older ones are given up for those that are about to come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ._commands import Command
from ._ledger import copy_bytes
from ._nouns import Residency, WorkerInfo, WorkerState
from ._room import Step, tiers_of
from ._world import World


class Copies:
    """Finds host memory for weights that leave a device."""

    def __init__(self, world: World) -> None:
        self._world = world

    def room_comes(self, steps: Iterable[Step]) -> bool:
        """Whether a copy that is being given up makes room in host memory for these weights."""
        world = self._world
        for step in steps:
            if step.residency is not Residency.PARKED or Residency.HOST not in step.worker.tiers:
                continue
            leaving = (
                w.host_bytes
                for w in world.of_node(step.worker.node)
                if w.residency is Residency.HOST
                and (move := world.move_of(w.worker))
                and move.residency is Residency.PARKED
            )
            coming = sum(leaving)
            short = copy_bytes(step.worker) - world.ledger.host_free(step.worker.node)
            if coming and short <= coming:
                return True
        return False

    def make_room(self, steps: Iterable[Step], now: float) -> Iterator[Command]:
        """Give up older copies of weights in host memory for those that are about to go there."""
        for step in steps:
            info = step.worker
            tiers = tiers_of(self._world, info)
            if step.residency is not Residency.PARKED or Residency.HOST not in tiers:
                continue
            short = copy_bytes(info) - self._world.ledger.host_free(info.node)
            copies = self._older(info, now)
            if sum(copy.host_bytes for copy in copies) < short:
                continue
            for copy in copies:
                if short > 0:
                    short -= copy.host_bytes
                    yield self._world.set_residency(copy, Residency.PARKED)

    def _older(self, info: WorkerInfo, now: float) -> list[WorkerInfo]:
        """Suspended workers of the node whose copies are worth less, the least recently used first.

        The node itself gives up those of workers on the device: they are not promised.
        """
        world = self._world
        used = world.last_used
        older = [
            w
            for w in world.of_node(info.node)
            if w.state is WorkerState.SUSPENDED
            and w.residency is Residency.HOST
            and Residency.PARKED in w.tiers
            and world.move_of(w.worker) is None
            and not world.resting(w.worker, now)
            and world.idle(w)
            and world.runs.expected_at(w.model) is None
            and used.get(w.worker, 0.0) <= used.get(info.worker, 0.0)
        ]
        return sorted(older, key=lambda w: (used.get(w.worker, 0.0), w.worker))
