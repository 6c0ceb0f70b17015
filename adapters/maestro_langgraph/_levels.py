"""What a graph is read into: levels, one per graph, nested ones included, and leaves."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from langgraph.pregel import Pregel

from maestro_agents.adapter import Agent
from maestro_agents.protocol import END

AnyPregel = Pregel[Any, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Branch:
    """A conditional edge. `ends` is None when it may reach any node."""

    ends: Mapping[Hashable, str] | None
    observable: bool


@dataclass(frozen=True, slots=True)
class Waiting:
    """A join: `target` waits for all `sources`. `certain`: if one of them runs, then all do."""

    sources: tuple[str, ...]
    target: str
    certain: bool


@dataclass(frozen=True, slots=True)
class Level:
    """One graph, by its local node names. `prefix` is the path it has, "" for the root.

    `containers` are the nodes that are graphs themselves; `called` maps a node to the prefixes of
    the graphs that its function calls; `commands` maps a node to the destinations that its
    `Command`s were declared to have; `tools` maps a node of tools to the nodes, one level up, that
    these hand over to. A `deferred` node starts when nothing else is left to run.
    """

    prefix: str
    nodes: tuple[str, ...]
    containers: frozenset[str] = frozenset()
    called: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    plain: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    waiting: tuple[Waiting, ...] = ()
    branches: Mapping[str, tuple[Branch, ...]] = field(default_factory=dict)
    commands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tools: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    deferred: frozenset[str] = frozenset()

    def path(self, node: str) -> str:
        return f"{self.prefix}/{node}" if self.prefix else node

    def certain(self, node: str) -> Iterator[str]:
        """Where plain edges and joins lead from `node`, whatever routing chooses."""
        yield from self.plain.get(node, ())
        yield from (join.target for join in self.waiting if node in join.sources and join.certain)

    def waits(self, node: str) -> Iterator[str]:
        """The targets of joins that may wait in vain: another source of theirs need not run."""
        for join in self.waiting:
            if node in join.sources and not join.certain:
                yield join.target

    def candidates(self, node: str) -> Iterator[str]:
        """Where routing may go from `node`, duplicates included."""
        yield from self.commands.get(node, ())
        for branch in self.branches.get(node, ()):
            if branch.ends is None:
                yield from (other for other in self.nodes if other != node)
                yield END
            else:
                yield from branch.ends.values()
        if self.is_sink(node) or self.may_only_end(node):
            yield END

    def is_sink(self, node: str) -> bool:
        """No way out is declared: it ends the graph, or returns Commands nobody declared."""
        return node not in self.commands and not self._leads_on(node)

    def may_only_end(self, node: str) -> bool:
        """A graph whose Commands are declared, and no edge: without a Command it is the end."""
        return node in self.containers and not self._leads_on(node)

    def is_open_ended(self, node: str) -> bool:
        """Whether routing may reach any node."""
        anywhere = any(branch.ends is None for branch in self.branches.get(node, ()))
        return anywhere or self.is_sink(node)

    def _leads_on(self, node: str) -> bool:
        waited = any(node in join.sources for join in self.waiting)
        return waited or node in self.plain or node in self.branches


@dataclass(frozen=True, slots=True)
class Leaf:
    """A node that is no graph itself, and what the app's code says about its role."""

    path: str
    marked: Agent | None
    agent_name: str | None
    metadata_role: str | None
    deferred: bool = False
    only_tools: bool = False
