"""Finds what a node's function calls (graphs, `@task`s) and returns, by what it refers to.

This over-approximates: what is referred to need not be called. Stages found so are candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Final

from langchain_core.tools import BaseTool
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel
from langgraph.types import Command

from ._internals import TaskFunction, parts_of, reached_from

MAX_LOOKED_AT: Final = 500
"""Most objects looked at for one node."""


@dataclass(slots=True)
class Called:
    """What one node calls: graphs, and the names of tasks. `routes`: it may return a `Command`."""

    graphs: list[Pregel[Any, Any, Any, Any]] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    routes: bool = False


Parts = dict[int, tuple[object, tuple[object, ...]]]
"""What each object consists of, by its id; the object is kept alive, so that the id stays its."""


def called_by(runnable: object, known: Parts) -> Called:
    """What `runnable`, its parts, its tools and the functions of its own module refer to.

    Only a node of tools runs them: other nodes that refer to tools offer them to a model. `known`
    spares looking twice, and is filled.
    """
    found = Called()
    run = [*runnable.tools_by_name.values()] if isinstance(runnable, ToolNode) else [runnable]
    agenda: list[object] = [*run]
    seen: set[int] = set()
    for item in agenda:
        if id(item) in seen or len(seen) >= MAX_LOOKED_AT:
            continue
        seen.add(id(item))
        found.routes = found.routes or _makes_commands(item)
        if isinstance(item, Pregel):
            found.graphs.append(item)
        elif isinstance(item, TaskFunction):
            found.tasks.append(str(item.func.__name__))
        elif not isinstance(item, BaseTool | ToolNode) or any(item is own for own in run):
            if id(item) not in known:
                known[id(item)] = (item, _parts_if_any(item))
            agenda.extend(known[id(item)][1])
    return found


def _parts_if_any(item: object) -> tuple[object, ...]:
    """These are the app's own objects, and some raise when they are only looked at (proxies)."""
    try:
        return tuple(_parts(item))
    except Exception:
        return ()


def _makes_commands(item: object) -> bool:
    """Whether `item` is `Command`, or something that can make one out of our sight."""
    if isinstance(item, FunctionType):
        return Command.__name__ in item.__code__.co_names
    return item is Command or isinstance(item, Pregel | ToolNode | BaseTool)


def _parts(item: object) -> Iterator[object]:
    if isinstance(item, FunctionType):
        yield from _own(reached_from(item), item.__module__)
    elif isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list | tuple):
        yield from item
    else:
        for part in parts_of(item):
            yield from (part, *_own(reached_from(part), getattr(part, "__module__", "")))


def _own(values: Iterable[object], module: str) -> Iterator[object]:
    """Of what a function refers to: the objects of methods, and functions of its module."""
    for value in values:
        value = getattr(value, "__self__", value)
        if not isinstance(value, FunctionType) or value.__module__ == module:
            yield value
        elif _makes_commands(value):
            yield Command
