"""Flattens nested graphs: only leaf stages remain.

Each nested graph stands for two points, its start and its end. Edges into the graph lead to its
start, edges out of it leave from its end; then the points are taken out again by joining what
leads to them with what leaves them. Such an edge is a candidate if any part of it is.

A graph that a node's function calls lies between the node and what follows it: the node may lead
to its start, and its end leads to its start again, or where the node leads. Tools may hand over
from inside a graph to what the graph's own `Command`s were declared to reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from maestro_agents.protocol import END, START, Join

from ._levels import Leaf, Level

Reach = dict[str, bool]
"""Stages (or END) that follow a point; True where routing must choose them."""


class Points:
    """The edges of all levels between leaf stages and the points of nested graphs."""

    def __init__(self, levels: Iterable[Level], leaves: Iterable[Leaf]) -> None:
        self._levels = {level.prefix: level for level in levels}
        self._leaves = tuple(leaf.path for leaf in leaves)
        self._out: dict[str, Reach] = {}
        for level in self._levels.values():
            for source, target, candidate in self._edges(level):
                entered = self.entering(level, target)
                for point in self._exits(level, source):
                    self._lead(point, entered, candidate)
            for node, prefixes in level.called.items():
                for point in self._exits(level, node):
                    for prefix in prefixes:
                        self._lead(point, f"{prefix}/{START}", True)
            for node in level.tools:
                for point in self._handoffs(level, node):
                    self._lead(self.leaving(level, node), point, True)

    def entering(self, level: Level, node: str) -> str:
        """The point where `node` of `level` begins; END is where the level ends."""
        if node in level.containers:
            return f"{level.path(node)}/{START}"
        return level.path(node) if level.prefix or node != END else END

    def leaving(self, level: Level, node: str) -> str:
        """The point where `node` of `level` ends; START is where the level begins."""
        if node in level.containers:
            return f"{level.path(node)}/{END}"
        return level.path(node) if level.prefix or node != START else START

    def reach(self, point: str) -> Reach:
        """The point itself when it is a stage (or END), else what follows the point."""
        return self._reach(point, frozenset())

    def follow(self, stage: str) -> Reach:
        """What follows a stage, or START."""
        return self._onward(stage, frozenset())

    def joins(self) -> Iterator[Join]:
        """The joins whose sources and target are exact.

        A nested graph as a source is exact when it has one last stage only; with several, none
        of them must have ended, so it is left out: the join then waits for less, never for ever.
        """
        for level in self._levels.values():
            for waiting in level.waiting:
                sources = [self._last(level, source) for source in waiting.sources]
                exact = tuple(source for source in sources if source)
                for target, candidate in self.reach(self.entering(level, waiting.target)).items():
                    if exact and not candidate:
                        yield Join(sources=exact, target=target)

    def open_ended(self) -> Iterator[str]:
        """The stages whose routing may reach any stage."""
        for level in self._levels.values():
            for node in level.nodes:
                if level.is_open_ended(node):
                    yield from self._lasts(level, node)
                    for prefix in level.called.get(node, ()):
                        yield from self._last_inside(self._levels[prefix])

    def _lead(self, point: str, target: str, candidate: bool) -> None:
        edges = self._out.setdefault(point, {})
        edges[target] = edges.get(target, True) and candidate

    def _exits(self, level: Level, node: str) -> list[str]:
        """Where `node` may end: its own point, and the ends of the graphs that it calls."""
        return [self.leaving(level, node), *(f"{p}/{END}" for p in level.called.get(node, ()))]

    def _edges(self, level: Level) -> Iterator[tuple[str, str, bool]]:
        """The edges of a level by local names; True where routing must choose."""
        for source, targets in level.plain.items():
            choice = source in level.tools and bool(self._handoffs(level, source))
            yield from ((source, target, choice) for target in targets)
        for waiting in level.waiting:
            yield from ((s, waiting.target, not waiting.certain) for s in waiting.sources)
        for source in (START, *level.nodes):
            if source != START or source in level.branches:
                passed = level.commands.get(source, ()) if self._hands_over(level, source) else ()
                for target in level.candidates(source):
                    if target == END or target not in passed:
                        yield source, target, True

    def _hands_over(self, level: Level, node: str) -> bool:
        """Whether the Commands of a nested graph are those of its tools."""
        inner = self._levels.get(level.path(node)) if node in level.containers else None
        return inner is not None and any(self._handoffs(inner, tools) for tools in inner.tools)

    def _handoffs(self, level: Level, node: str) -> list[str]:
        """The points outside of a nested graph that a node of tools may hand over to: what its
        tools say, else what the graph's Commands were declared to reach."""
        prefix, _, name = level.prefix.rpartition("/")
        above = self._levels.get(prefix)
        if not level.prefix or above is None or name not in above.containers:
            return []
        said = [target for targets in level.tools.values() for target in targets]
        targets = level.tools[node] if said else above.commands.get(name, ())
        return [self.entering(above, t) for t in targets if t in above.nodes]

    def _reach(self, point: str, passed: frozenset[str]) -> Reach:
        if not _is_virtual(point):
            return {point: False}
        return {} if point in passed else self._onward(point, passed | {point})

    def _onward(self, point: str, passed: frozenset[str]) -> Reach:
        found: Reach = {}
        for target, candidate in self._out.get(point, {}).items():
            for stage, inner in self._reach(target, passed).items():
                found[stage] = found.get(stage, True) and (candidate or inner)
        return found

    def _last(self, level: Level, node: str) -> str | None:
        lasts = self._lasts(level, node)
        return lasts[0] if len(lasts) == 1 else None

    def _lasts(self, level: Level, node: str) -> list[str]:
        """The stages that may be the last of `node`: itself, or those that lead to its end."""
        if node not in level.containers:
            return [level.path(node)]
        return self._last_inside(self._levels[level.path(node)])

    def _last_inside(self, level: Level) -> list[str]:
        return [
            stage
            for node in level.nodes
            if self._ends(level, node)
            for stage in self._lasts(level, node)
        ]

    def _ends(self, level: Level, node: str) -> bool:
        return self.entering(level, END) in self._out.get(self.leaving(level, node), {})


def _is_virtual(point: str) -> bool:
    prefix, _, name = point.rpartition("/")
    return prefix != "" and name in (START, END)
