"""Which role a stage plays."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from maestro_agents.protocol import ConfigError

from ._levels import Leaf

GENERIC = frozenset({"agent", "call_model", "llm", "model", "tools"})
"""Node names that say nothing: the role is then the name of the graph they are in."""


def role_of(leaf: Leaf, roles: Mapping[str, str]) -> str:
    """`workflow(roles=)`, else `@agent`, else the agent's name, else metadata, else the node name.

    `roles` is looked up by the stage's path, then by its parents' from the inside out, then by
    its plain node name.
    """
    return (
        _chosen(leaf.path, roles)
        or (leaf.marked.role if leaf.marked else None)
        or leaf.agent_name
        or leaf.metadata_role
        or _by_name(leaf.path)
    )


def check(roles: Mapping[str, str], paths: Collection[str]) -> None:
    """See that every key of `roles` names something.

    Raises:
        ConfigError: a key is no stage, subgraph or node of the graph.
    """
    known = {*paths}
    for path in paths:
        parts = path.split("/")
        known |= {"/".join(parts[:end]) for end in range(1, len(parts))} | {parts[-1]}
    if unknown := sorted(set(roles) - known):
        raise ConfigError(f"roles= names {unknown}, which the graph lacks; it has {sorted(known)}")


def _chosen(path: str, roles: Mapping[str, str]) -> str | None:
    at = path
    while at:
        if at in roles:
            return roles[at]
        at = at.rpartition("/")[0]
    return roles.get(path.rpartition("/")[2])


def _by_name(path: str) -> str:
    parts = path.split("/")
    telling = (part for part in reversed(parts) if part not in GENERIC)
    return next(telling, parts[-1])
