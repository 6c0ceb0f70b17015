"""A copy of a graph that carries our callback handler."""

from __future__ import annotations

from typing import Any

from maestro_agents.adapter import Options, control

from ._graph import read_graph
from ._handler import MaestroHandler
from ._levels import AnyPregel


def handler_for(
    graph: AnyPregel, options: Options, default_name: str | None = None
) -> MaestroHandler:
    """A handler that can follow the runs of `graph`; the backend gets to know its workflow.

    Raises:
        ConfigError: an option does not fit the graph.
        UnsupportedError: the graph is larger than the protocol allows.
    """
    found = read_graph(graph, options, default_name)
    control.register(found.workflow)
    return MaestroHandler(found, options)


def follow(graph: AnyPregel, handler: MaestroHandler) -> AnyPregel:
    """A copy of `graph`, of the same class, whose runs `handler` follows, and no other of ours."""
    config = dict(graph.config or {})
    config["callbacks"] = _without_ours(config.get("callbacks"))
    return graph.copy({"config": config}).with_config(callbacks=[handler])


def is_followed(graph: AnyPregel) -> bool:
    """Whether `graph` is such a copy."""
    return any(
        isinstance(h, MaestroHandler) for h in _handlers((graph.config or {}).get("callbacks"))
    )


def _handlers(callbacks: Any) -> list[Any]:
    """Of a list, or a LangChain callback manager, or None."""
    return callbacks if isinstance(callbacks, list) else getattr(callbacks, "handlers", [])


def _without_ours(callbacks: Any) -> Any:
    if callbacks is None or isinstance(callbacks, list):
        return [other for other in callbacks or () if not isinstance(other, MaestroHandler)]
    manager = callbacks.copy()
    for other in list(manager.handlers):
        if isinstance(other, MaestroHandler):
            manager.remove_handler(other)
    return manager
