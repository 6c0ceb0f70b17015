"""Reads a compiled graph into levels and leaves, as its builder says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langgraph.graph.state import StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel

from maestro_agents.adapter import Agent, agent_of
from maestro_agents.protocol import END, START

from ._called import Parts, called_by
from ._internals import (
    AGENT_NAME,
    HANDOFF,
    UNNAMED,
    builder_of,
    ends_of,
    functions_of,
    is_observable,
    metadata_of,
)
from ._levels import AnyPregel, Branch, Leaf, Level, Waiting


@dataclass(frozen=True, slots=True)
class _Around:
    """What a nested graph inherits: where it is, and whose it is."""

    prefix: str = ""
    agent_name: str | None = None
    role: str | None = None
    builders: tuple[object, ...] = ()


def read(graph: AnyPregel) -> tuple[tuple[Level, ...], tuple[Leaf, ...]]:
    """All levels (the root first) and leaves of `graph`, in the order of their making."""
    reader = _Reader()
    reader.read(graph, _Around())
    return tuple(reader.levels), tuple(reader.leaves)


class _Reader:
    def __init__(self) -> None:
        self.levels: list[Level] = []
        self.leaves: list[Leaf] = []
        self._known: Parts = {}

    def read(self, graph: AnyPregel, around: _Around) -> None:
        builder = builder_of(graph)
        here = _Around(
            around.prefix,
            _text(metadata_of(graph), AGENT_NAME) or around.agent_name,
            around.role,
            (*around.builders, builder or graph),
        )
        called: dict[str, tuple[str, ...]] = {}
        level = (
            _level(here.prefix, builder, called, self._known)
            if builder
            else _opaque(here, graph, called)
        )
        self.levels.append(level)
        for node in level.nodes:
            spec = builder.nodes[node] if builder else None
            runnable = spec.runnable if spec else graph.nodes[node].bound
            role = _text((spec and spec.metadata) or {}, "role") or here.role
            inner = _Around(level.path(node), here.agent_name, role, here.builders)
            if isinstance(runnable, Pregel):
                self.read(runnable, inner)
            else:
                self._leaf(runnable, inner, deferred=node in level.deferred)
                if prefixes := self._called(runnable, inner):
                    called[node] = prefixes

    def _leaf(self, runnable: object, at: _Around, *, deferred: bool) -> None:
        tools = isinstance(runnable, ToolNode)
        leaf = Leaf(at.prefix, _marked(runnable), at.agent_name, at.role, deferred, tools)
        self.leaves.append(leaf)

    def _called(self, runnable: object, host: _Around) -> tuple[str, ...]:
        """Read what a node's function calls; graphs of one name and node are told apart by none."""
        found = called_by(runnable, self._known)
        prefixes: dict[str, None] = {}
        for graph in found.graphs:
            prefix = f"{host.prefix}/{name}" if (name := _name_in(host, graph)) else host.prefix
            recursive = (builder_of(graph) or graph) in host.builders
            if not recursive and prefix not in prefixes:
                prefixes[prefix] = None
                self.read(graph, _Around(prefix, host.agent_name, host.role, host.builders))
        if found.tasks and host.prefix not in prefixes:
            prefixes[host.prefix] = None
            self._tasks(found.tasks, host)
        return tuple(prefixes)

    def _tasks(self, names: list[str], host: _Around) -> None:
        """`@task`s: any may follow any, itself included."""
        nodes = tuple(dict.fromkeys(names))
        anywhere = (Branch({name: name for name in (*nodes, END)}, observable=False),)
        branches = dict.fromkeys((START, *nodes), anywhere)
        level = Level(host.prefix, nodes, branches=branches)
        self.levels.append(level)
        for node in nodes:
            self.leaves.append(Leaf(level.path(node), None, host.agent_name, host.role))


def _level(
    prefix: str,
    builder: StateGraph[Any, Any, Any, Any],
    called: Mapping[str, tuple[str, ...]],
    known: Parts,
) -> Level:
    order = {name: at for at, name in enumerate((START, *builder.nodes, END))}
    plain: dict[str, tuple[str, ...]] = {}
    for source, target in sorted(builder.edges, key=lambda edge: order[edge[1]]):
        plain[source] = (*plain.get(source, ()), target)
    specs = builder.nodes.items()
    plain |= {name: (END,) for name in _last_nodes(builder, known)}
    together = [_reached(start, plain) for start in (START, *plain) if builder.waiting_edges]
    return Level(
        prefix=prefix,
        nodes=tuple(builder.nodes),
        containers=frozenset(name for name, spec in specs if isinstance(spec.runnable, Pregel)),
        called=called,
        plain=plain,
        waiting=tuple(
            # If plain edges lead from one place to all sources, then all run if one does.
            Waiting(sources, target, any({*sources} <= reached for reached in together))
            for sources, target in sorted(builder.waiting_edges)
        ),
        branches={
            source: tuple(Branch(ends_of(b), is_observable(b)) for b in branches.values())
            for source, branches in builder.branches.items()
            if branches
        },
        commands={name: tuple(spec.ends) for name, spec in specs if spec.ends},
        tools={
            name: tuple(_handoffs(spec.runnable))
            for name, spec in specs
            if isinstance(spec.runnable, ToolNode)
        },
        deferred=frozenset(name for name, spec in specs if spec.defer),
    )


def _last_nodes(builder: StateGraph[Any, Any, Any, Any], known: Parts) -> Iterator[str]:
    """The nodes after which the graph can only end, though no edge says so."""
    leading = {source for source, _ in builder.edges}
    leading |= {source for sources, _ in builder.waiting_edges for source in sources}
    for name, spec in builder.nodes.items():
        leads_on = spec.ends or builder.branches.get(name) or name in leading
        if leads_on or isinstance(spec.runnable, Pregel):
            continue
        if not called_by(spec.runnable, known).routes:
            yield name


def _reached(start: str, plain: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Where plain edges lead from `start`, itself included."""
    found, agenda = {start}, [start]
    for node in agenda:
        agenda += [target for target in plain.get(node, ()) if target not in found]
        found |= {*plain.get(node, ())}
    return found


def _opaque(around: _Around, graph: AnyPregel, called: Mapping[str, tuple[str, ...]]) -> Level:
    """An `@entrypoint`: one node, and the tasks that it calls."""
    nodes = tuple(node for node in graph.nodes if node != START)
    plain = {START: nodes, **dict.fromkeys(nodes, (END,))}
    return Level(around.prefix, nodes, called=called, plain=plain)


def _handoffs(node: ToolNode) -> Iterator[str]:
    for tool in node.tools_by_name.values():
        if destination := _text(tool.metadata or {}, HANDOFF):
            yield destination


def _name_in(host: _Around, graph: AnyPregel) -> str | None:
    """The name that keeps a called graph apart from others that the same node calls."""
    name = graph.name if builder_of(graph) else None
    return None if name in (None, "", UNNAMED, host.prefix.rpartition("/")[2]) else name


def _marked(runnable: object) -> Agent | None:
    marks = (agent_of(function) for function in functions_of(runnable))
    return next((mark for mark in marks if mark), None)


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None
