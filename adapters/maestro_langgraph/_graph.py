"""A compiled graph as a protocol `Workflow`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from maestro_agents.adapter import Options
from maestro_agents.protocol import (
    END,
    MAX_EDGES,
    START,
    ConfigError,
    Edge,
    Stage,
    Successor,
    UnsupportedError,
    Workflow,
)

from . import _roles
from ._internals import UNNAMED
from ._levels import AnyPregel, Leaf, Level
from ._points import Points
from ._reading import read
from ._routing import Target


@dataclass(frozen=True, slots=True)
class GraphMap:
    """A workflow, and the levels by prefix that its stages were flattened from."""

    workflow: Workflow
    levels: Mapping[str, Level]
    points: Points

    def is_container(self, path: str) -> bool:
        """Whether `path` is a subgraph, which is no stage itself."""
        return path in self.levels and path not in self.workflow.stage_by_path

    def prefix_of(self, path: str, name: str) -> str:
        """The prefix of a graph called `name` that runs inside `path`."""
        named = f"{path}/{name}"
        return named if named in self.levels else path

    def successors(
        self, prefix: str, node: str, chosen: Collection[Target]
    ) -> tuple[Successor, ...]:
        """What follows a node of a level on the wire, once routing has chosen.

        Plain edges lead on all the same. The level's END leads out of it.
        """
        level = self.levels[prefix]
        found: dict[str, Successor] = {}
        waits = {*level.waits(node)} - {target.node for target in chosen}
        for target in (*chosen, *map(Target, (*level.certain(node), *sorted(waits)))):
            point = self.points.entering(level, target.node)
            for stage, candidate in self.points.reach(point).items():
                before = found.get(stage, Successor(stage=stage))
                certain = not candidate and target.node not in waits
                found[stage] = Successor(
                    stage=stage,
                    certain=before.certain or certain,
                    width=(before.width or 0) + 1 if target.sent else before.width,
                )
        found.pop(END, None)
        return tuple(found.values())


def read_graph(graph: AnyPregel, options: Options, default_name: str | None = None) -> GraphMap:
    """The map of `graph`.

    Raises:
        ConfigError: `options.name` or a key of `options.roles` does not fit.
        UnsupportedError: the graph is larger than the protocol allows.
    """
    levels, leaves = read(graph)
    _roles.check(options.roles, [leaf.path for leaf in leaves])
    points = Points(levels, leaves)
    joins = tuple(points.joins())
    joined = {(source, join.target) for join in joins for source in join.sources}
    try:
        found = tuple(_edges(points, leaves))
        # A certain edge into a join is the join; a candidate one says that it may wait in vain.
        edges = [e for e in found if e.candidate or (e.source, e.target) not in joined]
        workflow = Workflow(
            name=_name(graph, options.name, default_name),
            stages=tuple(_stage(leaf, options.roles) for leaf in leaves),
            # Beyond the limit only candidates of open-ended routing go: they are a prior anyway.
            edges=tuple(sorted(edges, key=lambda edge: edge.candidate)[:MAX_EDGES]),
            joins=joins,
            open_ended=tuple(points.open_ended()),
            supersteps=True,
        )
    except ValidationError as error:
        raise UnsupportedError(f"this graph does not fit the protocol: {error}") from error
    return GraphMap(workflow, {level.prefix: level for level in levels}, points)


def _edges(points: Points, leaves: Iterable[Leaf]) -> Iterator[Edge]:
    for source in (START, *(leaf.path for leaf in leaves)):
        for target, candidate in points.follow(source).items():
            yield Edge(source=source, target=target, candidate=candidate)


def _stage(leaf: Leaf, roles: Mapping[str, str]) -> Stage:
    model = leaf.marked.model if leaf.marked else None
    return Stage(
        path=leaf.path,
        role=_roles.role_of(leaf, roles),
        model=model,
        calls=False if leaf.only_tools else None,
        deferred=leaf.deferred,
    )


def _name(graph: AnyPregel, chosen: str | None, default: str | None) -> str:
    if chosen is not None:
        if not re.fullmatch(r"[^@\s]{1,128}", chosen):
            raise ConfigError(f"name={chosen!r}: use 1 to 128 characters, no spaces and no @")
        return chosen
    own = graph.name if graph.name and graph.name != UNNAMED else default or "langgraph"
    return re.sub(r"[@\s]+", "-", own)[:128]
