"""How much of a device models may take, and how crowded a cluster is."""

from __future__ import annotations

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import Cluster

USABLE_SHARE = 0.92
"""Of a device's memory, what engines may take: the rest is for activations, the driver and what
fragments (ours; vLLM takes 0.9 of a GPU where nothing is said)."""
KV_SHARE = 0.4
"""Of the usable memory, meant for KV where a cluster's crowdedness is told (ours)."""


def fitting_bytes(cluster: Cluster) -> float:
    """Weights that fit with KV: 0.6 of the usable memory, less the processes of all engines."""
    return sum(
        (1 - KV_SHARE) * device.capacity_bytes
        - device.profile.residual_bytes * device.devices * len(device.models)
        for node in cluster.nodes
        for device in node.devices
    )


def weights_ratio(cluster: Cluster) -> float:
    """Weights of all models on all devices that may hold them, over those that fit with KV."""
    weights = sum(
        cluster.models[model].weights_bytes
        for node in cluster.nodes
        for device in node.devices
        for model in device.models
    )
    return weights / fitting_bytes(cluster)


def check_room(cluster: Cluster) -> None:
    """Every model must fit each of its devices alone, with its longest request.

    Raises:
        ConfigError: one does not, or a KV cache of one size is too small or too large.
    """
    for name, size in cluster.kv_bytes.items():
        longest = cluster.models[name].longest_request_bytes
        if size < longest:
            raise ConfigError(
                f"kv.{name}: {size} bytes are less than one request of max_model_len ({longest})"
            )
    for node in cluster.nodes:
        for device in node.devices:
            for name in device.models:
                model = cluster.models[name]
                kv = cluster.kv_bytes.get(name, model.longest_request_bytes)
                needed = model.weights_bytes + kv + device.profile.residual_bytes * device.devices
                if needed > device.capacity_bytes:
                    raise ConfigError(
                        f"{name} does not fit {node.name}/{device.name}: {needed / 2**30:.1f} GiB "
                        f"of {device.capacity_bytes / 2**30:.1f} GiB; take it out of models there"
                    )
