"""What is still to happen, in order of time; what is due at once, in the order it was put there."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """`now` is the time of what happens at present, in seconds; it never goes back."""

    __slots__ = ("_entries", "_sequence", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._sequence = 0
        self._entries: list[tuple[float, int, Callable[[Any], None], Any]] = []

    def at(self, time: float, action: Callable[[Any], None], about: Any = None) -> None:
        """Do `action(about)` at `time`."""
        self._sequence += 1
        heappush(self._entries, (time, self._sequence, action, about))

    def play(self, goes_on: Callable[[], bool], until: float) -> None:
        """Let things happen in their order, as long as `goes_on()`, until that time or the end."""
        entries = self._entries
        while entries and goes_on():
            time, _, action, about = heappop(entries)
            if time > until:
                return
            self.now = time
            action(about)
