"""Workers that could not be brought in."""

from __future__ import annotations

from dataclasses import dataclass

from ._nouns import WorkerInfo
from ._world import World


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker that could not be brought in: not tried again before `until`."""

    until: float
    detail: str


class Failures:
    """What has failed lately, and is not tried for a while."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._failed: dict[str, Failure] = {}

    def add(self, worker: str, detail: str, now: float) -> None:
        self._failed[worker] = Failure(now + self._world.settings.failure_pause_s, detail)

    def forgive(self, now: float) -> bool:
        """Whether a worker that had failed may be tried again from now on."""
        over = [worker for worker, one in self._failed.items() if one.until <= now]
        for worker in over:
            del self._failed[worker]
        return bool(over)

    def may_be_tried(self, info: WorkerInfo, now: float) -> bool:
        failure = self._failed.get(info.worker)
        return failure is None or failure.until <= now

    def of_model(self, model: str, now: float) -> Failure | None:
        """Why `model` is not tried now, if it is not: all of its workers have failed."""
        if not self._failed:
            return None
        found = [self._failed.get(w.worker) for w in self._world.of_model(model)]
        failed = [one for one in found if one is not None and now < one.until]
        if not failed or len(failed) < len(found):
            return None
        return min(failed, key=lambda one: one.until)
