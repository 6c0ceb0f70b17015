"""Counts the tasks of each superstep of one running graph, as far ahead as it is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock

from maestro_agents.protocol import END, START

from ._levels import Level, Waiting
from ._routing import Target


@dataclass(slots=True)
class _Step:
    begun: int = 0
    pulled: set[str] = field(default_factory=set)
    sent: int = 0
    known: bool = True

    @property
    def width(self) -> int | None:
        return max(self.begun, len(self.pulled) + self.sent) if self.known else None


class Supersteps:
    """A node triggered by edges runs once in a step, however many edges lead to it; each `Send`
    adds one more. `level` is None for a graph that was not read."""

    def __init__(self, level: Level | None) -> None:
        self._level = level
        self._steps: dict[int, _Step] = {}
        self._ended: dict[Waiting, set[str]] = {}
        self._lock = Lock()

    def begun(self, step: int, node: str) -> None:
        """A task begins in `step`."""
        with self._lock:
            if step not in self._steps:
                self._steps[step] = self._first(node)
            self._steps[step].begun += 1
            if self._level and node in self._level.deferred:
                self._steps[step].known = False  # it may wait with others, for who knows how long

    def ended(self, step: int, node: str, chosen: Iterable[Target] | None) -> None:
        """A task of `step` ends: what it leads to belongs to the next step."""
        with self._lock:
            for old in [at for at in self._steps if at < step]:
                del self._steps[old]
            self._lead_to(self._steps.setdefault(step + 1, _Step()), node, chosen)

    def width(self, step: int) -> int | None:
        """How many tasks `step` has; None when that is not known."""
        with self._lock:
            found = self._steps.get(step)
            return found.width if found else None

    def _lead_to(self, following: _Step, node: str, chosen: Iterable[Target] | None) -> None:
        if self._level is None or (chosen is None and self._level.branches.get(node)):
            following.known = False
            return
        targets = [Target(target) for target in self._level.plain.get(node, ())]
        targets += [Target(target) for target in self._joined(node)]
        for target in (*targets, *(chosen or ())):
            if target.sent:
                following.sent += 1
            elif target.node not in (END, *self._level.deferred):
                following.pulled.add(target.node)

    def _first(self, node: str) -> _Step:
        """The first step we see: the graph's entry, or anywhere when a run was resumed."""
        entries = self._level.plain.get(START, ()) if self._level else ()
        return _Step(pulled=set(entries), known=node in entries or node == START)

    def _joined(self, node: str) -> Iterable[str]:
        for waiting in self._level.waiting if self._level else ():
            if node in waiting.sources:
                ended = self._ended.setdefault(waiting, set())
                ended.add(node)
                if ended >= set(waiting.sources):
                    ended.clear()
                    yield waiting.target
