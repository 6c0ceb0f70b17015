"""Pluggable scheduling rules, by name."""

from maestro_agents.protocol import ConfigError

from ._base import Policy
from ._fcfs import Fcfs
from ._maestro import Maestro

__all__ = ["POLICIES", "Fcfs", "Maestro", "Policy", "policy"]

POLICIES: dict[str, type[Fcfs] | type[Maestro]] = {"fcfs": Fcfs, "maestro": Maestro}


def policy(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
