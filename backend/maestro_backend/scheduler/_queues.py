"""Global level: which queued call goes next.

A call has its place in the heap of its model by the policy's key, which holds until something of
its run changes. A call whose stage's join is still open waits outside.
"""

from __future__ import annotations

import heapq
import math

from ._calls import Call, Key
from ._events import CallArrived
from ._fairness import Line, Shares
from ._runs import Run
from ._settings import Settings
from ._world import World
from .policies import Policy

Rank = tuple[float, Key, int]
"""Any two calls compare by it: those that have waited too long first, by arrival."""


class Queue:
    """The calls of one model that may go."""

    def __init__(self, number: int, shared: Settings | None) -> None:
        self.number = number
        """Models are served in this order."""
        self.shares: Shares | None = None
        """None while all that wait are of one tenant."""
        self._line = Line()
        self._shared = shared
        """None: tenants do not count."""
        self._tenant = ""
        """Whose calls wait, where it is one tenant."""

    def push(self, call: Call, key: Key, waiting: int) -> None:
        """A call comes in, or gets another place; `waiting`: of the model, this one included."""
        if self._shared and call.key is None:
            self._enter(call, waiting, self._shared)
        call.key = key
        self._line.push(call, key)
        if self.shares and call.lane:
            call.lane.line.push(call, key)

    def first(self) -> Call | None:
        call = self._line.first()
        return self.shares.turn(call) if self.shares and call else call

    def _enter(self, call: Call, waiting: int, settings: Settings) -> None:
        tenant = settings.sharer(call.request.tenant)
        if waiting == 1:
            self.shares, self._tenant = None, tenant
        elif self.shares is None and tenant != self._tenant:
            self.shares = Shares(settings)
            for key, _, one in self._line.live():
                self.shares.enter(one).push(one, key)
        if self.shares:
            self.shares.enter(call)


class Queues:
    """All queues, in the order of one policy."""

    def __init__(self, world: World, policy: Policy) -> None:
        self._world = world
        self._policy = policy
        self._shared = world.settings if policy.shares else None
        self._queues: dict[str, Queue] = {}
        self._held: dict[str, dict[str, Call]] = {}
        """By run: calls whose join is still open."""
        self._rekeyed = 0.0
        self._turns: list[tuple[float, int, Call, Key]] = []
        """A heap: when calls get another key by themselves, if they have that one still."""

    def number(self, model: str) -> int:
        return self._queues[model].number

    def add(self, call: Call, run: Run | None, now: float) -> bool:
        """A call is queued, for the first time or again. Whether it may go."""
        model = call.request.model
        if model not in self._queues:
            self._queues[model] = Queue(len(self._queues), self._shared)
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
        queue, max_wait_s = self._queues[model], self._policy.max_wait_s
        if max_wait_s < math.inf:
            for call in self._world.calls.queued(model).values():
                if call.key is not None:
                    if now - call.arrived >= max_wait_s:
                        shares = queue.shares
                        return shares.late_turn(call, now - max_wait_s) if shares else call
                    break
        return queue.first()

    def ahead(self, request: CallArrived) -> bool:
        """Whether the tenant has had so much of the model that others that wait go first."""
        queue = self._queues.get(request.model)
        return bool(queue and queue.shares and queue.shares.ahead(request.tenant))

    def left(self, call: Call, service_s: float) -> None:
        """A call leaves its worker after so many seconds that its tenant has had."""
        if call.lane is not None and call.worker is not None:
            call.lane.settle(call, service_s)

    def rank(self, call: Call, now: float) -> Rank:
        """Where a call stands among all others, queued or running."""
        if now - call.arrived >= self._policy.max_wait_s:
            return 0, (), call.order
        run = self._world.runs.get(call.request.run)
        return 1, self._policy.key(call, run, now), call.order

    def may_preempt(self, call: Call, victim: Call, now: float) -> bool:
        """Whether a queued call may take a running one's KV memory."""
        late, key, _ = self.rank(call, now)
        still, its, _ = self.rank(victim, now)
        return bool(late and still) and self._policy.may_preempt(key, its)

    # --- keys that change -----------------------------------------------------------------------

    def rekey(self, call: Call, run: Run | None, now: float) -> bool:
        """What is known of a queued call has changed. Whether its place in the queue has."""
        if call.key is None:
            return False
        key = self._policy.key(call, run, now)
        if key == call.key:
            return False
        self._place(call, key)
        return True

    def rekey_run(self, run: Run, now: float) -> list[str]:
        """Something of a run has changed: the models in whose queues it has another place."""
        if not self._policy.follows_runs:
            return []
        calls = [self._world.calls.by_id[name] for name in run.live_calls]
        return [call.request.model for call in calls if self.rekey(call, run, now)]

    def rekey_all(self, now: float) -> None:
        """Time has passed: once in a while for a policy whose keys depend on it."""
        while self._turns and self._turns[0][0] < now:
            _, _, call, key = heapq.heappop(self._turns)
            if call.key is key:
                self.rekey(call, self._world.runs.get(call.request.run), now)
        rekey_s = self._policy.rekey_s
        if rekey_s is None or now - self._rekeyed < rekey_s:
            return
        self._rekeyed = now
        world = self._world
        for queue in world.calls.queues.values():
            for call in queue.values():
                self.rekey(call, world.runs.get(call.request.run), now)

    def _push(self, call: Call, run: Run | None, now: float) -> None:
        self._place(call, self._policy.key(call, run, now))

    def _place(self, call: Call, key: Key) -> None:
        model = call.request.model
        self._queues[model].push(call, key, len(self._world.calls.queued(model)))
        if (at := self._policy.turns_at(key)) < math.inf:
            heapq.heappush(self._turns, (at, call.order, call, key))
            if len(self._turns) > 2 * self._world.calls.waiting + 64:
                self._turns = [turn for turn in self._turns if turn[2].key is turn[3]]
                heapq.heapify(self._turns)

    def _is_held(self, call: Call, run: Run) -> bool:
        """Whether the stage's join is still open: earlier calls of a source stage are live.

        Only calls that arrived before it count, so that holding can never go in a circle.
        """
        wanted = call.request.waits_for
        if not wanted:
            return False
        earlier = (self._world.calls.by_id[c] for c in run.live_calls)
        return any(c.order < call.order and c.request.stage in wanted for c in earlier)
