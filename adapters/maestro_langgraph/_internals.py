"""Everything of LangGraph and LangChain that is not a documented interface, named once.

Read in langgraph 1.2 and langchain-core 1.7.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Final

from langgraph.graph.state import CompiledStateGraph, StateGraph
from langgraph.pregel import Pregel

NAMESPACE: Final = "langgraph_checkpoint_ns"
AGENT_NAME: Final = "lc_agent_name"
THREAD: Final = "thread_id"
UNNAMED: Final = "LangGraph"
"""What a compiled graph is called when nobody named it."""

_SEPARATOR = "|"
_ID = ":"
_SUPERSTEP = "graph:step:"
_SEQUENCE = "seq:step:"


def names_of(namespace: str) -> tuple[str, ...]:
    """`work:<id>|1|model:<id>` -> `("work", "model")`: node names without ids and counters."""
    parts = namespace.split(_SEPARATOR) if namespace else []
    return tuple(part.split(_ID)[0] for part in parts if not part.isdigit())


def superstep_of(tags: Sequence[str] | None) -> int | None:
    """The superstep when these are the tags of a node's own run, else None."""
    return _number(tags, _SUPERSTEP)


def follows_node(tags: Sequence[str] | None) -> bool:
    """Whether these are the tags of what runs after a node's function: branches, among others."""
    return (_number(tags, _SEQUENCE) or 0) >= 2


def _number(tags: Sequence[str] | None, prefix: str) -> int | None:
    for tag in tags or ():
        if tag.startswith(prefix) and tag[len(prefix) :].isdigit():
            return int(tag[len(prefix) :])
    return None


def builder_of(graph: Pregel[Any, Any, Any, Any]) -> StateGraph[Any, Any, Any, Any] | None:
    """The builder of a compiled state graph; None for `@entrypoint` functions."""
    return graph.builder if isinstance(graph, CompiledStateGraph) else None


def functions_of(runnable: object) -> Iterator[object]:
    """The callables a node was made of, sync and async."""
    for attribute in ("func", "afunc"):
        if function := getattr(runnable, attribute, None):
            yield function
    yield runnable


def metadata_of(graph: Pregel[Any, Any, Any, Any]) -> Mapping[str, Any]:
    """The metadata bound to a graph with `with_config`."""
    return (graph.config or {}).get("metadata") or {}


def is_observable(branch: Any) -> bool:
    """Whether a branch's choice is reported to callbacks; `create_agent` turns that off."""
    return bool(getattr(branch.path, "trace", True))


def ends_of(branch: Any) -> Mapping[Hashable, str] | None:
    """A branch's targets by label; None when any node may follow."""
    ends: Mapping[Hashable, str] | None = branch.ends
    return ends
