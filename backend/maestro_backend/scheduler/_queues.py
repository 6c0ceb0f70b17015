"""Global level: which queued call goes next.

A call has its place in the heap of its model by the policy's key, which holds until something of
its run changes. A call whose stage's join is still open waits outside.
"""

from __future__ import annotations

import heapq
import math

from ._calls import Call, Key
from ._runs import Run
from ._world import World
from .policies import Policy

Rank = tuple[float, Key, int]
"""Any two calls compare by it: those that have waited too long first, by arrival."""


class Queue:
    """The calls of one model that may go. An entry whose key is not its call's is void."""

    def __init__(self, number: int) -> None:
        self.number = number
        """Models are served in this order."""
        self.heap: list[tuple[Key, int, Call]] = []

    def push(self, call: Call, key: Key, waiting: int) -> None:
        call.key = key
        heapq.heappush(self.heap, (key, call.order, call))
        if len(self.heap) > 2 * waiting + 64:
            self.heap = [entry for entry in self.heap if entry[2].key is entry[0]]
            heapq.heapify(self.heap)

    def first(self) -> Call | None:
        heap = self.heap
        while heap and heap[0][2].key is not heap[0][0]:
            heapq.heappop(heap)
        return heap[0][2] if heap else None


class Queues:
    """All queues, in the order of one policy."""

    def __init__(self, world: World, policy: Policy) -> None:
        self._world = world
        self._policy = policy
        self._queues: dict[str, Queue] = {}
        self._held: dict[str, dict[str, Call]] = {}
        """By run: calls whose join is still open."""
        self._rekeyed = 0.0

    def number(self, model: str) -> int:
        return self._queues[model].number

    def add(self, call: Call, run: Run | None, now: float) -> bool:
        """A call is queued, for the first time or again. Whether it may go."""
        model = call.request.model
        if model not in self._queues:
            self._queues[model] = Queue(len(self._queues))
        if run is not None and self._is_held(call, run):
            self._held.setdefault(run.run, {})[call.call] = call
            return False
        self._push(call, run, now)
        return True

    def open_joins(self, run: Run, now: float) -> list[str]:
        """A call of the run is over: the models of calls that were held for it."""
        held = self._held.get(run.run)
        if not held:
            return []
        free = [c for c in held.values() if not self._is_held(c, run)]
        for call in free:
            self.drop(call)
            self._push(call, run, now)
        return [call.request.model for call in free]

    def drop(self, call: Call) -> None:
        """The call is held no more."""
        held = self._held.get(call.request.run)
        if held and held.pop(call.call, None) and not held:
            del self._held[call.request.run]

    def first(self, model: str, now: float) -> Call | None:
        """The call of `model` that goes next."""
        queue = self._queues[model]
        if self._policy.max_wait_s < math.inf:
            for call in self._world.calls.queued(model).values():
                if call.key is not None:
                    if now - call.arrived >= self._policy.max_wait_s:
                        return call
                    break
        return queue.first()

    def rank(self, call: Call, now: float) -> Rank:
        """Where a call stands among all others, queued or running."""
        if now - call.arrived >= self._policy.max_wait_s:
            return 0, (), call.order
        run = self._world.runs.get(call.request.run)
        return 1, self._policy.key(call, run, now), call.order

    # --- keys that change -----------------------------------------------------------------------

    def rekey(self, call: Call, run: Run | None, now: float) -> bool:
        """What is known of a queued call has changed. Whether its place in the queue has."""
        if call.key is None:
            return False
        key = self._policy.key(call, run, now)
        if key == call.key:
            return False
        self._queues[call.request.model].push(
            call, key, len(self._world.calls.queued(call.request.model))
        )
        return True

    def rekey_run(self, run: Run, now: float) -> list[str]:
        """Something of a run has changed: the models in whose queues it has another place."""
        if not self._policy.follows_runs:
            return []
        calls = [self._world.calls.by_id[name] for name in run.live_calls]
        return [call.request.model for call in calls if self.rekey(call, run, now)]

    def rekey_all(self, now: float) -> None:
        """Time has passed: once in a while for a policy whose keys depend on it."""
        rekey_s = self._policy.rekey_s
        if rekey_s is None or now - self._rekeyed < rekey_s:
            return
        self._rekeyed = now
        world = self._world
        for queue in world.calls.queues.values():
            for call in queue.values():
                self.rekey(call, world.runs.get(call.request.run), now)

    def _push(self, call: Call, run: Run | None, now: float) -> None:
        model = call.request.model
        waiting = len(self._world.calls.queued(model))
        self._queues[model].push(call, self._policy.key(call, run, now), waiting)

    def _is_held(self, call: Call, run: Run) -> bool:
        """Whether the stage's join is still open: earlier calls of a source stage are live.

        Only calls that arrived before it count, so that holding can never go in a circle.
        """
        wanted = call.request.waits_for
        if not wanted:
            return False
        earlier = (self._world.calls.by_id[c] for c in run.live_calls)
        return any(c.order < call.order and c.request.stage in wanted for c in earlier)
