"""When a full queue has room again, and for whom."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass

from ._events import CallArrived

LEVELS = {"batch": 1.0, "standard": 2.0, "interactive": 4.0}
"""At how many times `max_queue_s` runs of each class are refused (ours)."""
_SPAN_S = 120.0
"""What was done longer ago than this counts little (ours)."""
_EARLY_S = 1.0
"""A client that comes back this much too early is on time: the header has whole seconds."""
_GRACE_S = 30.0
"""Room is held for a client that is late by no more than this (ours)."""


class Pace:
    """Predicted service done for one model per second in which calls of it waited.

    An average that forgets. Times in seconds; `since` is when the oldest call came that waits now,
    None if none waits.
    """

    def __init__(self) -> None:
        self._done_s = self._waited_s = 1.0
        """Until more is known, one call is served at a time (ours)."""
        self._last = 0.0
        """When a call ended."""

    def done(self, service_s: float, now: float, since: float | None) -> None:
        """A call has ended well."""
        if since is not None:
            waited_s = now - max(self._last, since)
            kept = math.exp(-waited_s / _SPAN_S)
            counted_s = _SPAN_S * (1 - kept)  # of the time; and of the work, as it was done
            self._done_s *= kept
            self._done_s += service_s * counted_s / waited_s if waited_s else service_s
            self._waited_s = self._waited_s * kept + counted_s
        self._last = now

    def rate(self, now: float, since: float | None) -> float:
        """Seconds of service per second: ever less while calls wait and none ends."""
        waited_s = 0.0 if since is None else now - max(self._last, since)
        return self._done_s / (self._waited_s + waited_s)


@dataclass(frozen=True, slots=True)
class Promise:
    """A refused call was told to come at `due` (seconds); room is held for it until `end`."""

    model: str
    slo: str
    work: int
    """Predicted service in microseconds, as in `Call`."""
    due: float
    end: float


Name = tuple[str, str, int]
"""Run, stage and instance: what a call is known by when it comes again."""


class Promises:
    """Who was told when to come back."""

    def __init__(self) -> None:
        self.by_name: dict[Name, Promise] = {}
        self._work: Counter[tuple[str, str]] = Counter()
        """By model and class, in microseconds."""
        self._ends: list[tuple[float, Name]] = []

    def due(self, event: CallArrived) -> float | None:
        """When this call was told to come; None if it was told nothing."""
        promise = self.by_name.get(_name(event))
        return promise.due if promise else None

    def kept(self, event: CallArrived, now: float) -> bool:
        """Whether the call comes when it was told to."""
        due = self.due(event)
        return due is not None and now >= due - _EARLY_S

    def work_s(self, model: str, *classes: str) -> float:
        """Seconds of work for which room is held: of a class, or of all."""
        return sum(self._work[model, one] for one in classes or LEVELS) / 1e6

    def make(self, event: CallArrived, slo: str, due: float) -> None:
        """Hold room for the call from now on. One that belongs to no run cannot be known again."""
        if event.run != event.call:
            name, work, end = _name(event), round(event.service_s * 1e6), due + _GRACE_S
            self.by_name[name] = Promise(event.model, slo, work, due, end)
            self._work[event.model, slo] += work
            heapq.heappush(self._ends, (end, name))

    def forget(self, event: CallArrived) -> None:
        """The call has come."""
        self._drop(_name(event))

    def expire(self, now: float) -> None:
        """Who is so late is not waited for."""
        while self._ends and self._ends[0][0] < now:
            end, name = heapq.heappop(self._ends)
            if name in self.by_name and self.by_name[name].end == end:
                self._drop(name)

    def _drop(self, name: Name) -> None:
        if promise := self.by_name.pop(name, None):
            self._work[promise.model, promise.slo] -= promise.work


def _name(event: CallArrived) -> Name:
    return event.run, event.stage, event.instance
