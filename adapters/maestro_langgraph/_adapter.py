"""The adapter that the core finds by its entry point. LangGraph is imported when it is needed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, TypeVar, cast

from maestro_agents.adapter import Options
from maestro_agents.protocol import UnsupportedError

T = TypeVar("T")


class LangGraphAdapter:
    """Reads compiled LangGraph graphs, `create_agent` agents and `@entrypoint` functions."""

    def handles(self, obj: object) -> bool:
        """Whether `obj` is of LangGraph; `wrap` says so if it is no graph that runs here."""
        if "langgraph" not in sys.modules:
            return False
        from langgraph.graph import StateGraph
        from langgraph.pregel.protocol import PregelProtocol

        from . import _following  # noqa: F401  now: a factory may be called in an event loop

        return isinstance(obj, PregelProtocol | StateGraph)

    def wrap(self, obj: T, options: Options, default_name: str | None = None) -> T:
        """A copy of the graph, of the same class. A graph that is wrapped already is wrapped
        anew: the last options hold."""
        from langgraph.graph import StateGraph
        from langgraph.pregel import Pregel

        from ._following import follow, handler_for

        if isinstance(obj, StateGraph):
            raise UnsupportedError("compile the graph first: workflow(builder.compile())")
        if not isinstance(obj, Pregel):
            kind = type(obj).__qualname__
            raise UnsupportedError(f"a {kind} runs elsewhere: call workflow() where the graph is")
        graph = cast(Any, obj)
        return cast(T, follow(graph, handler_for(graph, options, default_name)))

    def instrument(self, options: Options) -> None:
        """Follow every graph of this process that runs from now on and is not wrapped."""
        if find_spec("langgraph"):
            from ._instrument import instrumentation

            instrumentation.start(options)

    def uninstrument(self) -> None:
        """Undo `instrument`."""
        if "langgraph" in sys.modules:
            from ._instrument import instrumentation

            instrumentation.stop()


adapter = LangGraphAdapter()
