"""Everything of LangGraph and LangChain that is not a documented interface, named once.

Read in langgraph 1.2 and langchain-core 1.7.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, Final

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableBinding, RunnableSequence
from langchain_core.runnables.config import var_child_runnable_config
from langgraph._internal._runnable import RunnableSeq
from langgraph.func import _TaskFunction
from langgraph.graph.state import CompiledStateGraph, StateGraph
from langgraph.pregel import Pregel
from langgraph.pregel._utils import get_function_nonlocals

TaskFunction = _TaskFunction
NAMESPACE: Final = "langgraph_checkpoint_ns"
NODE: Final = "langgraph_node"
AGENT_NAME: Final = "lc_agent_name"
THREAD: Final = "thread_id"
UNNAMED: Final = "LangGraph"
"""What a compiled graph is called when nobody named it."""

HANDOFF: Final = "__handoff_destination"
"""Where a tool of langgraph-supervisor or langgraph-swarm hands over to, in its metadata."""

_PATH = "langgraph_path"
_SUPERSTEP = "graph:step:"
_SEQUENCE = "seq:step:"


def superstep_of(tags: Sequence[str] | None) -> int | None:
    """The superstep when these are the tags of a node's own run, else None."""
    return _number(tags, _SUPERSTEP)


def is_task(metadata: Mapping[str, Any], outer: str) -> bool:
    """Whether a run with this metadata, inside a task of namespace `outer`, is a `@task`."""
    path: Sequence[Any] = metadata.get(_PATH) or ()
    called = len(path) == 4 and path[-1] is True
    return called and metadata.get(NAMESPACE) != outer


def current_callback_run() -> tuple[Any, Sequence[BaseCallbackHandler]]:
    """The id of the callback run that this context is in, and its handlers; (None, ()) outside."""
    manager = (var_child_runnable_config.get() or {}).get("callbacks")
    return getattr(manager, "parent_run_id", None), getattr(manager, "handlers", None) or ()


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


def parts_of(item: object) -> Iterator[object]:
    """The runnables and functions that a runnable or tool is made of."""
    if isinstance(item, RunnableSequence | RunnableSeq):
        yield from item.steps
    elif isinstance(item, RunnableBinding):
        yield item.bound
    else:
        functions = (getattr(item, name, None) for name in ("func", "afunc", "coroutine"))
        yield from (function for function in functions if callable(function))


def reached_from(function: object) -> Iterator[object]:
    """The values that a function reaches from outside its own scope; none for what is none."""
    if callable(function):
        yield from get_function_nonlocals(function)
    if isinstance(function, FunctionType):  # LangGraph leaves out globals that only these name
        for code in _nested(function.__code__):
            for name in code.co_names:
                if name in function.__globals__:
                    yield function.__globals__[name]


def _nested(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


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
