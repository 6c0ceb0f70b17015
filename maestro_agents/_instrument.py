"""`instrument()`: everything at once, without touching the app's code."""

from __future__ import annotations

from . import _openai_hook
from ._adapters import adapters
from ._decorators import read_options
from ._settings import settings


def instrument(
    *, slo: str = "standard", deadline: float | None = None, tenant: str | None = None
) -> None:
    """Let Maestro follow every graph of this process, as if each had been given to `workflow()`.

        import maestro_agents as maestro

        maestro.instrument()

    Graphs made before count too. One that `workflow()` has wrapped keeps its own options. Call it
    once, when the app starts; called again, the last options hold. `uninstrument()` undoes it.

    Args:
        slo: the service-level class of every run, as in `workflow()`.
        deadline: seconds from a run's start to its end; never tighter than its class's.
        tenant: on whose account the runs go.

    Raises:
        ConfigError: an argument or a MAESTRO_ variable is wrong; the message names the fix.
    """
    settings()
    options = read_options(None, slo, deadline, None, tenant)
    _openai_hook.install()
    for adapter in adapters():
        adapter.instrument(options)


def uninstrument() -> None:
    """Undo `instrument()`: new runs are followed only of graphs that `workflow()` wrapped."""
    for adapter in adapters():
        adapter.uninstrument()
    _openai_hook.uninstall()
