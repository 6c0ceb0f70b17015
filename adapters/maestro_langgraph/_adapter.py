"""The adapter behind `workflow(graph)`: a copy of the graph that carries our callback handler."""

from __future__ import annotations

import sys
from typing import Any, TypeVar, cast

from maestro_agents._adapters import Options

T = TypeVar("T")


class LangGraphAdapter:
    """Reads compiled LangGraph graphs, `create_agent` agents and `@entrypoint` functions.

    LangGraph is imported when the first graph is wrapped, not when the adapter is found.
    """

    def handles(self, obj: object) -> bool:
        """Whether `obj` is a graph that runs in this process."""
        if "langgraph" not in sys.modules:
            return False
        from langgraph.pregel import Pregel

        return isinstance(obj, Pregel)

    def wrap(self, obj: T, options: Options, default_name: str | None = None) -> T:
        """A copy of the graph, of the same class. A graph that is wrapped already is wrapped
        anew: the last options hold."""
        from maestro_agents._control import control

        from ._graph import read_graph
        from ._handler import MaestroHandler

        graph = cast(Any, obj)
        found = read_graph(graph, options, default_name)
        control.register(found.workflow)
        config = dict(graph.config or {})
        config["callbacks"] = _without(MaestroHandler, config.get("callbacks"))
        bare = graph.copy({"config": config})
        return cast(T, bare.with_config(callbacks=[MaestroHandler(found, options)]))


def _without(handler: type, callbacks: Any) -> Any:
    """`callbacks`, a list or a LangChain callback manager, less the handlers of one class."""
    if callbacks is None or isinstance(callbacks, list):
        return [other for other in callbacks or () if not isinstance(other, handler)]
    manager = callbacks.copy()
    for other in list(manager.handlers):
        if isinstance(other, handler):
            manager.remove_handler(other)
    return manager


adapter = LangGraphAdapter()
