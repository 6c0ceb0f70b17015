"""The static graph of an app, identified by its name and the hash of its content."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Annotated, NamedTuple, Self

from pydantic import Field, StringConstraints, model_validator

from ._base import END, MAX_EDGES, MAX_STAGES, PROTOCOL_VERSION, START, Message, Name

WorkflowName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^@\s]+$")]


class Stage(Message):
    """One node of a workflow, by its path (`a/b` is node `b` of subgraph `a`).

    `calls` says whether the stage makes LLM calls: None when the adapter cannot know. A `deferred`
    stage starts only when nothing else of its graph is left to run.
    """

    path: Name
    role: Name | None = None
    model: Name | None = None
    calls: bool | None = None
    deferred: bool = False


class Edge(Message):
    """A possible step from one stage to the next; a `candidate` only if routing chooses it."""

    source: Name
    target: Name
    candidate: bool = False


class Join(Message):
    """A barrier: `target` starts only when every one of `sources` has ended.

    It follows each of them certainly, but where an edge says that it is a candidate: then another
    source need not run, and the barrier may wait in vain.
    """

    sources: tuple[Name, ...] = Field(min_length=1)
    target: Name


class Successors(NamedTuple):
    """The stages that may follow a stage, in graph order."""

    certain: tuple[str, ...]
    candidates: tuple[str, ...]


class Workflow(Message):
    """A workflow: stages, edges and joins.

    `open_ended` lists stages whose routing may reach any stage (no path map was declared); their
    edges are then a prior, not knowledge. `supersteps` is True for bulk-synchronous frameworks:
    nothing starts before the slowest branch of the current step has ended.
    """

    version: int = PROTOCOL_VERSION
    name: WorkflowName
    stages: tuple[Stage, ...] = Field(max_length=MAX_STAGES)
    edges: tuple[Edge, ...] = Field(default=(), max_length=MAX_EDGES)
    joins: tuple[Join, ...] = Field(default=(), max_length=MAX_EDGES)
    open_ended: tuple[Name, ...] = ()
    supersteps: bool = False

    @model_validator(mode="after")
    def _references_exist(self) -> Self:
        paths = [stage.path for stage in self.stages]
        known = {*paths, START, END}
        if len(known) != len(paths) + 2:
            raise ValueError("stage paths must be unique and differ from __start__ and __end__")
        named = {p for e in self.edges for p in (e.source, e.target)}
        named |= {p for j in self.joins for p in (*j.sources, j.target)}
        if unknown := sorted((named | set(self.open_ended)) - known):
            raise ValueError(f"edges, joins or open_ended name unknown stages: {unknown[:5]}")
        return self

    @cached_property
    def content_hash(self) -> str:
        """First 12 hex digits of the canonical JSON's SHA-256; order is irrelevant."""
        content = self.model_dump(mode="json", exclude={"version", "name"})
        for stage in content["stages"]:
            if not stage["deferred"]:  # newer than the hash: an id must not change with us
                del stage["deferred"]
        for join in content["joins"]:
            join["sources"] = sorted(join["sources"])
        for key in ("stages", "edges", "joins", "open_ended"):
            content[key] = sorted(json.dumps(item, sort_keys=True) for item in content[key])
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def id(self) -> str:
        """`name@hash`: what headers and URLs carry."""
        return f"{self.name}@{self.content_hash}"

    @cached_property
    def stage_by_path(self) -> dict[str, Stage]:
        return {stage.path: stage for stage in self.stages}

    @cached_property
    def _successors(self) -> dict[str, Successors]:
        certain: dict[str, dict[str, None]] = {}
        candidates: dict[str, dict[str, None]] = {}
        for edge in self.edges:
            table = candidates if edge.candidate else certain
            table.setdefault(edge.source, {})[edge.target] = None
        for join in self.joins:
            for source in join.sources:
                if join.target not in candidates.get(source, ()):
                    certain.setdefault(source, {})[join.target] = None
        return {
            path: Successors(
                tuple(certain.get(path, ())),
                tuple(t for t in candidates.get(path, ()) if t not in certain.get(path, ())),
            )
            for path in {*certain, *candidates}
        }

    def successors(self, path: str) -> Successors:
        """What may follow `path` (a stage path or START); empty for an unknown one."""
        return self._successors.get(path, Successors((), ()))

    @cached_property
    def _join_sources(self) -> dict[str, tuple[str, ...]]:
        sources: dict[str, dict[str, None]] = {}
        for join in self.joins:
            sources.setdefault(join.target, {}).update(dict.fromkeys(join.sources))
        return {target: tuple(paths) for target, paths in sources.items()}

    def join_sources(self, path: str) -> tuple[str, ...]:
        """The stages that must have ended before `path` may start."""
        return self._join_sources.get(path, ())
