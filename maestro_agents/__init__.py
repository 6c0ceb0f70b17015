"""Maestro Agents: let the serving side see the workflow, not just requests."""

from ._decorators import agent, workflow
from ._instrument import instrument, uninstrument
from .protocol import BackendError, ConfigError, MaestroError, UnsupportedError

__all__ = [
    "BackendError",
    "ConfigError",
    "MaestroError",
    "UnsupportedError",
    "agent",
    "instrument",
    "uninstrument",
    "workflow",
]
