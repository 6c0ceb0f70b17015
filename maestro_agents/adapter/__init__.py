"""What an adapter for a framework is made of. `adapters/README.md` says how to write one."""

from maestro_agents._adapters import Adapter, Options
from maestro_agents._context import CallContext, Caller, add_finder, current_caller
from maestro_agents._control import control
from maestro_agents._decorators import Agent, agent_of
from maestro_agents._log import fail_open
from maestro_agents._openai_hook import install as annotate_openai
from maestro_agents._settings import Settings, is_maestro, settings
from maestro_agents._tracker import Events, Tracker

__all__ = [
    "Adapter",
    "Agent",
    "CallContext",
    "Caller",
    "Events",
    "Options",
    "Settings",
    "Tracker",
    "add_finder",
    "agent_of",
    "annotate_openai",
    "control",
    "current_caller",
    "fail_open",
    "is_maestro",
    "settings",
]
