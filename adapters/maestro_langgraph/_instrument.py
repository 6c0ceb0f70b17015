"""Follows every graph of the process, also those that were made before and those nobody wraps.

Callbacks do not say which graph runs, so the graph's own `stream` and `astream`, through which
every way to run it goes, are replaced by functions that run a followed copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, Final
from weakref import WeakKeyDictionary

from langgraph.pregel import Pregel

from maestro_agents.adapter import Options, fail_open, settings

from ._following import follow, handler_for, is_followed
from ._handler import MaestroHandler
from ._internals import builder_of, current_callback_run
from ._levels import AnyPregel

_METHODS: Final = ("stream", "astream")


class Instrumentation:
    """On or off, for the whole process. `start` and `stop` are idempotent."""

    def __init__(self) -> None:
        self._originals: dict[str, Callable[..., Any]] = {}
        self._ours: dict[str, Callable[..., Any]] = {}
        self._on = False
        self._handlers: WeakKeyDictionary[object, tuple[object, MaestroHandler | None]]
        self._lock = Lock()

    def start(self, options: Options) -> None:
        """Follow graphs from now on; if that is so already, `options` replace the former."""
        with self._lock:
            self._on, self._options = True, options
            self._handlers = WeakKeyDictionary()
            for name in _METHODS:
                if name not in self._originals:
                    original = self._originals[name] = getattr(Pregel, name)
                    self._ours[name] = self._following(original)
                    setattr(Pregel, name, self._ours[name])

    def stop(self) -> None:
        """Put everything back. What others have put around it since stays, and ours rests in it."""
        with self._lock:
            self._on = False
            for name in tuple(self._originals):
                if getattr(Pregel, name) is self._ours[name]:
                    setattr(Pregel, name, self._originals.pop(name))

    def _following(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def run(graph: AnyPregel, *args: Any, **kwargs: Any) -> Any:
            return original(self._followed(graph) or graph, *args, **kwargs)

        return run

    @fail_open
    def _followed(self, graph: AnyPregel) -> AnyPregel | None:
        """A followed copy; None for a graph that is followed by other means, or not at all."""
        if not (self._on and settings().active) or is_followed(graph) or _inside_a_followed_run():
            return None
        handler = self._handler(graph)
        return follow(graph, handler) if handler else None

    def _handler(self, graph: AnyPregel) -> MaestroHandler | None:
        """Copies of a graph share their builder, and so their handler, while it stays the same."""
        builder = builder_of(graph)
        state = builder and (
            graph.name,
            *map(len, (builder.nodes, builder.edges, builder.branches)),
        )
        known = self._handlers.get(builder or graph)
        if known is None or known[0] != state:
            # Two runs that begin at once may both read; a graph that cannot be read is read once.
            known = self._handlers[builder or graph] = (state, self._read(graph))
        return known[1]

    @fail_open
    def _read(self, graph: AnyPregel) -> MaestroHandler | None:
        return handler_for(graph, self._options)


def _inside_a_followed_run() -> bool:
    _, handlers = current_callback_run()
    return any(isinstance(handler, MaestroHandler) for handler in handlers)


instrumentation: Final = Instrumentation()
