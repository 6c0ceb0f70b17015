"""A cluster many times over, for tests of speed."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import Cluster, SimDevice, SimNode


def scaled(cluster: Cluster, devices: int) -> Cluster:
    """The nodes over and over, as `NAME-0`, `NAME-1`, ..., until there are `devices` devices.

    Of the last node only the first devices are taken; of a tensor-parallel group each counts.

    Raises:
        ConfigError: the cluster has more than that, or a group does not fit the end.
    """
    whole = sum(device.devices for node in cluster.nodes for device in node.devices)
    if devices < whole:
        raise ConfigError(f"{cluster.name} has {whole} devices; it cannot be scaled to {devices}")
    nodes: list[SimNode] = []
    left = devices
    for number in count():
        for node in cluster.nodes:
            if left == 0:
                return replace(cluster, name=f"{cluster.name}-{devices}", nodes=tuple(nodes))
            part = _first(node, left)
            nodes.append(replace(node, name=f"{node.name}-{number}", devices=part))
            left -= sum(device.devices for device in part)
    raise AssertionError("count() has no end")


def _first(node: SimNode, most: int) -> tuple[SimDevice, ...]:
    taken: list[SimDevice] = []
    for device in node.devices:
        if device.devices <= most:
            taken.append(device)
            most -= device.devices
    if not taken:
        raise ConfigError(f"no device of {node.name} fits the last {most}; scale to another number")
    return tuple(taken)
