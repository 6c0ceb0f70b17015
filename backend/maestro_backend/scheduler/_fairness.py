"""Tenants share a model by weight, outside the policy's order.

Start-time fair queueing (Goyal et al., SIGCOMM 1996) with room for the order (ours): it decides
freely until the tenant of the call that it wants is too far ahead of another one that waits.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from ._settings import Settings

if TYPE_CHECKING:
    from ._calls import Call, Key


class Line:
    """Queued calls by key. An entry whose key is not its call's is void."""

    def __init__(self) -> None:
        self.entries: list[tuple[Key, int, Call]] = []
        self.limit = _ROOM

    def push(self, call: Call, key: Key) -> None:
        heapq.heappush(self.entries, (key, call.order, call))
        if len(self.entries) > self.limit:
            self.entries = self.live()
            heapq.heapify(self.entries)
            self.limit = 2 * len(self.entries) + _ROOM

    def live(self) -> list[tuple[Key, int, Call]]:
        return [entry for entry in self.entries if entry[2].key is entry[0]]

    def first(self) -> Call | None:
        entries = self.entries
        while entries and entries[0][2].key is not entries[0][0]:
            heapq.heappop(entries)
        return entries[0][2] if entries else None


class Lane:
    """One tenant's calls in the queue of one model, and the service that the tenant has had.

    `clock` is that service in seconds on workers, by weight: as predicted when a call starts, the
    real ones when it has ended.
    """

    def __init__(self, shares: Shares, tenant: str, weight: float, number: int) -> None:
        self.tenant = tenant
        self.weight = weight
        self.number = number
        """Breaks ties."""
        self.clock = 0.0
        self.line = Line()
        self.running = 0
        self._shares = shares
        self._arrivals: list[tuple[int, Call]] = []
        """A heap; a call without a key waits here no more."""
        self._limit = _ROOM

    def enter(self, call: Call) -> None:
        """A call waits here, for the first time or again."""
        if len(self._arrivals) > self._limit:
            self._arrivals = [entry for entry in self._arrivals if entry[1].key is not None]
            heapq.heapify(self._arrivals)
            self._limit = 2 * len(self._arrivals) + _ROOM
        heapq.heappush(self._arrivals, (call.order, call))

    def oldest(self) -> Call | None:
        arrivals = self._arrivals
        while arrivals and arrivals[0][1].key is None:
            heapq.heappop(arrivals)
        return arrivals[0][1] if arrivals else None

    def charge(self, call: Call) -> None:
        """The call starts."""
        self.running += 1
        call.charged_s = call.work / 1e6
        self._serve(call.charged_s)

    def settle(self, call: Call, service_s: float) -> None:
        """The call has left its worker, after so many seconds that count."""
        self.running -= 1
        self._serve(service_s - call.charged_s)
        call.lane = None

    def _serve(self, service_s: float) -> None:
        self.clock += service_s / self.weight
        self._shares.moved(self)


class Shares:
    """The tenants of one model, while calls of more than one wait."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lag_s = settings.fair_lag_s
        self._lanes: dict[str, Lane] = {}
        self._by_clock: list[tuple[float, int, Lane]] = []
        """A heap; an entry whose clock is not its lane's is void."""
        self._count = 0

    def enter(self, call: Call) -> Line:
        """A call joins the queue: the line where it takes its place.

        A tenant has no claim from a time when it wanted nothing.
        """
        tenant = self._settings.sharer(call.request.tenant)
        lane = self._lanes.get(tenant)
        if lane is None:
            weight = self._settings.tenant_weights.get(tenant, 1.0)
            lane = Lane(self, tenant, weight, self._count)
            self._count += 1
        if lane.oldest() is None and (last := self._last()) and last.clock > lane.clock:
            lane.clock = last.clock
        self._lanes[tenant] = lane
        self.moved(lane)
        lane.enter(call)
        call.lane = lane
        return lane.line

    def moved(self, lane: Lane) -> None:
        """Its clock is another one."""
        heap = self._by_clock
        heapq.heappush(heap, (lane.clock, lane.number, lane))
        if len(heap) > 4 * len(self._lanes) + _ROOM:
            heap[:] = [(one.clock, one.number, one) for one in self._lanes.values()]
            heapq.heapify(heap)

    def turn(self, call: Call) -> Call:
        """The call that goes, where the order wants `call`."""
        last = self._last()
        if last is None or not self._too_far(call, last.clock):
            return call
        return last.line.first() or call

    def late_turn(self, call: Call, before: float) -> Call:
        """The call that goes, where `call` has waited longest: another that came by `before`."""
        last = self._last()
        if last is None or not self._too_far(call, last.clock):
            return call
        late = (
            (lane.clock, lane.number, one)
            for lane in self._lanes.values()
            if (one := lane.oldest()) and one.arrived <= before
        )
        clock, _, other = min(late)
        return other if self._too_far(call, clock) else call

    def ahead(self, tenant: str) -> bool:
        """Whether the tenant has had so much that others that wait go first."""
        lane, last = self._lanes.get(self._settings.sharer(tenant)), self._last()
        return bool(lane and last and lane.clock - last.clock > self._lag_s)

    def _too_far(self, call: Call, clock: float) -> bool:
        return call.lane is not None and call.lane.clock - clock > self._lag_s

    def _last(self) -> Lane | None:
        """The tenant furthest behind of those that wait.

        One that does not wait, has no call on a worker and is further behind is forgotten.
        """
        heap = self._by_clock
        while heap:
            clock, _, lane = heap[0]
            if lane.clock == clock:
                if lane.oldest():
                    return lane
                if not lane.running:
                    self._lanes.pop(lane.tenant, None)
            heapq.heappop(heap)
        return None


_ROOM = 64
"""A heap is cleaned of void entries when it has grown to twice what was in it, and this (ours)."""
