"""Pluggable scheduling rules, by name."""

from maestro_agents.protocol import ConfigError

from ._atlas import Atlas
from ._base import Policy
from ._edf import Edf
from ._fcfs import Fcfs
from ._kairos import Kairos
from ._las import Las
from ._maestro import Maestro
from ._oracle import Oracle
from ._plas import Plas
from ._sjf import Sjf

__all__ = [
    "POLICIES",
    "Atlas",
    "Edf",
    "Fcfs",
    "Kairos",
    "Las",
    "Maestro",
    "Oracle",
    "Plas",
    "Policy",
    "Sjf",
    "policy",
]

POLICIES: dict[str, type[Policy]] = {
    "fcfs": Fcfs,
    "maestro": Maestro,
    "edf": Edf,
    "sjf": Sjf,
    "las": Las,
    "plas": Plas,
    "atlas": Atlas,
    "kairos": Kairos,
    "oracle": Oracle,
}


def policy(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
