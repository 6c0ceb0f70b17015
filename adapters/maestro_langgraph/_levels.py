"""Reads a compiled graph into levels: one per graph, nested ones included, as its builder says."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langgraph.graph.state import StateGraph
from langgraph.pregel import Pregel

from maestro_agents._decorators import Agent, agent_of
from maestro_agents.protocol import END, START

from ._internals import (
    AGENT_NAME,
    builder_of,
    ends_of,
    functions_of,
    is_observable,
    metadata_of,
)

AnyPregel = Pregel[Any, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Branch:
    """A conditional edge. `ends` is None when it may reach any node."""

    ends: Mapping[Hashable, str] | None
    observable: bool


@dataclass(frozen=True, slots=True)
class Waiting:
    """A join: `target` waits for all `sources`."""

    sources: tuple[str, ...]
    target: str


@dataclass(frozen=True, slots=True)
class Level:
    """One graph, by its local node names. `prefix` is the path of the node it is, "" for the root.

    `containers` are the nodes that are graphs themselves; `commands` maps a node to the
    destinations that its `Command`s were declared to have.
    """

    prefix: str
    nodes: tuple[str, ...]
    containers: frozenset[str]
    plain: Mapping[str, tuple[str, ...]]
    waiting: tuple[Waiting, ...]
    branches: Mapping[str, tuple[Branch, ...]]
    commands: Mapping[str, tuple[str, ...]]

    def path(self, node: str) -> str:
        return f"{self.prefix}/{node}" if self.prefix else node

    def certain(self, node: str) -> Iterator[str]:
        """Where plain edges and joins lead from `node`, whatever routing chooses."""
        yield from self.plain.get(node, ())
        yield from (join.target for join in self.waiting if node in join.sources)

    def candidates(self, node: str) -> Iterator[str]:
        """Where routing may go from `node`, duplicates included."""
        yield from self.commands.get(node, ())
        for branch in self.branches.get(node, ()):
            if branch.ends is None:
                yield from (other for other in self.nodes if other != node)
                yield END
            else:
                yield from branch.ends.values()
        if self.is_sink(node):
            yield END

    def is_sink(self, node: str) -> bool:
        """No way out is declared: it ends the graph, or returns Commands nobody declared."""
        declared = (self.plain, self.branches, self.commands)
        waited = any(node in join.sources for join in self.waiting)
        return not waited and not any(node in table for table in declared)

    def is_open_ended(self, node: str) -> bool:
        """Whether routing may reach any node."""
        anywhere = any(branch.ends is None for branch in self.branches.get(node, ()))
        return anywhere or self.is_sink(node)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A node that is no graph itself, and what the app's code says about its role."""

    path: str
    marked: Agent | None
    agent_name: str | None
    metadata_role: str | None


def read(graph: AnyPregel) -> tuple[tuple[Level, ...], tuple[Leaf, ...]]:
    """All levels (the root first) and leaves of `graph`, in the order of their making."""
    levels: list[Level] = []
    leaves: list[Leaf] = []
    _read(graph, "", None, None, levels, leaves)
    return tuple(levels), tuple(leaves)


def _read(
    graph: AnyPregel,
    prefix: str,
    agent_name: str | None,
    role: str | None,
    levels: list[Level],
    leaves: list[Leaf],
) -> None:
    agent_name = _text(metadata_of(graph), AGENT_NAME) or agent_name
    builder = builder_of(graph)
    level = _level(prefix, builder) if builder else _opaque(prefix, graph)
    levels.append(level)
    for node in level.nodes:
        spec = builder.nodes[node] if builder else None
        node_role = _text(spec.metadata or {}, "role") if spec else None
        if spec and isinstance(spec.runnable, Pregel):
            inner = (level.path(node), agent_name, node_role or role)
            _read(spec.runnable, *inner, levels, leaves)
        else:
            marked = _marked(spec.runnable) if spec else None
            leaves.append(Leaf(level.path(node), marked, agent_name, node_role or role))


def _level(prefix: str, builder: StateGraph[Any, Any, Any, Any]) -> Level:
    order = {name: at for at, name in enumerate((START, *builder.nodes, END))}
    plain: dict[str, tuple[str, ...]] = {}
    for source, target in sorted(builder.edges, key=lambda edge: order[edge[1]]):
        plain[source] = (*plain.get(source, ()), target)
    return Level(
        prefix=prefix,
        nodes=tuple(builder.nodes),
        containers=frozenset(
            name for name, spec in builder.nodes.items() if isinstance(spec.runnable, Pregel)
        ),
        plain=plain,
        waiting=tuple(
            Waiting(sources, target) for sources, target in sorted(builder.waiting_edges)
        ),
        branches={
            source: tuple(Branch(ends_of(b), is_observable(b)) for b in branches.values())
            for source, branches in builder.branches.items()
            if branches
        },
        commands={name: tuple(spec.ends) for name, spec in builder.nodes.items() if spec.ends},
    )


def _opaque(prefix: str, graph: AnyPregel) -> Level:
    """An `@entrypoint`: its node is known, its tasks only once they run."""
    nodes = tuple(node for node in graph.nodes if node != START)
    return Level(prefix, nodes, frozenset(), {START: nodes}, (), {}, {})


def _marked(runnable: object) -> Agent | None:
    marks = (agent_of(function) for function in functions_of(runnable))
    return next((mark for mark in marks if mark), None)


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None
