"""A cluster as the scheduler hears of it, and what each worker of it costs.

One worker per device and model that may live there. At first the device's static model is ready,
with all the KV memory that the others leave it; the others live, with their weights in host memory
as far as that goes, else parked. A process that the device has no room for is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from maestro_agents.protocol import ConfigError
from maestro_backend.scheduler import (
    DeviceInfo,
    NodeInfo,
    Residency,
    WorkerInfo,
    WorkerState,
    one_group,
)

from ._cluster import Cluster, SimDevice, SimNode
from ._hardware import DeviceProfile, ModelGeometry
from ._steps import StepCosts, step_costs
from ._system import System

_STATES = {Residency.DEVICE: WorkerState.READY, Residency.DISK: WorkerState.STOPPED}
_TIERS = (Residency.DEVICE, Residency.HOST, Residency.PARKED, Residency.DISK)

Service = Callable[[str, int, int, int], float]
"""Model, prompt tokens, output tokens, cached tokens -> seconds alone on an idle engine."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a simulated worker is made of."""

    info: WorkerInfo
    costs: StepCosts
    model: ModelGeometry
    profile: DeviceProfile
    node: SimNode
    block_bytes: int


def places(cluster: Cluster, system: System) -> dict[str, Place]:
    """By worker, in the order of the cluster file."""
    found: dict[str, Place] = {}
    for node in cluster.nodes:
        host_left = node.host_bytes
        for device in node.devices:
            ready = _place(cluster, system, node, device, device.static, Residency.DEVICE)
            left = device.capacity_bytes - _least(ready.info)
            asleep = []
            names = () if system.weights == "static" else device.models
            for name in names:
                if name == device.static:
                    continue
                size = cluster.models[name].weights_bytes
                tier = Residency.HOST if size <= host_left else Residency.PARKED
                place = _place(cluster, system, node, device, name, tier)
                if _held(place) > left:
                    place = _place(cluster, system, node, device, name, Residency.DISK)
                left -= _held(place)
                host_left -= place.info.host_bytes
                asleep.append(place)
            for place in (_grown(ready, left), *asleep):
                found[place.info.worker] = place
    return found


def _grown(ready: Place, room: int) -> Place:
    """With all the KV memory that is left, if its limit moves."""
    info = ready.info
    if not info.elastic:
        return ready
    limit = min(info.kv_max_bytes, info.kv_limit_bytes + room)
    limit -= limit % ready.block_bytes
    return replace(ready, info=replace(info, kv_limit_bytes=limit))


def node_infos(cluster: Cluster, made: dict[str, Place]) -> list[NodeInfo]:
    return [
        NodeInfo(
            node.name,
            tuple(DeviceInfo(d.name, d.capacity_bytes) for d in node.devices),
            tuple(p.info for p in made.values() if p.info.node == node.name),
            node.host_bytes,
            node.rtt_s,
        )
        for node in cluster.nodes
    ]


def idle_service(cluster: Cluster) -> Service:
    """Seconds alone, on the first device of the cluster that may hold the model."""
    costs: dict[str, StepCosts] = {}
    for node in cluster.nodes:
        for device in node.devices:
            for name in device.models:
                if name not in costs:
                    model = cluster.models[name]
                    costs[name] = step_costs(device.profile, model, cluster.max_batched_tokens)
    return lambda model, prompt, output, cached: costs[model].service_s(prompt, output, cached)


def activation_s(
    model: ModelGeometry, node: SimNode, profile: DeviceProfile
) -> dict[Residency, float]:
    """Seconds from each tier to the device. Each device of a group moves its own part."""
    share = model.weights_bytes / model.tensor_parallel
    up_s, read_s = share / profile.to_device, model.weights_bytes / node.disk
    return {
        Residency.HOST: profile.wake_s + up_s,
        Residency.PARKED: profile.wake_s + max(up_s, read_s),
        Residency.DISK: profile.start_s + max(up_s, read_s),
    }


def _least(info: WorkerInfo) -> int:
    return info.weights_bytes + info.kv_limit_bytes + info.residual_bytes


def _held(place: Place) -> int:
    """Of its device, while its weights are elsewhere."""
    gone = place.info.state is WorkerState.STOPPED
    return 0 if gone else place.info.residual_bytes + place.info.kv_limit_bytes


def _place(
    cluster: Cluster,
    system: System,
    node: SimNode,
    device: SimDevice,
    name: str,
    tier: Residency,
) -> Place:
    model, profile = cluster.models[name], device.profile
    block_bytes = model.block_bytes
    residual = profile.residual_bytes * device.devices
    most = device.capacity_bytes - model.weights_bytes - residual
    if not system.elastic and system.weights != "static":
        if system.whole_device:
            most -= residual * (len(device.models) - 1)
        else:
            most = min(most, cluster.kv_bytes.get(name, most))
    most -= most % block_bytes
    if most <= 0:
        raise ConfigError(
            f"model {name!r} does not fit {device.name} of node {node.name!r} with its KV cache: "
            "take it off that device in the cluster file"
        )
    floor = min(most, model.longest_request_bytes)
    limit = floor
    if tier is not Residency.DEVICE:  # the cache goes and comes with the weights
        limit = 0
    elif not system.elastic:
        limit = most
    info = WorkerInfo(
        worker=f"{node.name}/{device.name}/{name}",
        node=node.name,
        device=device.name,
        model=name,
        state=_STATES.get(tier, WorkerState.SUSPENDED),
        residency=tier,
        weights_bytes=model.weights_bytes,
        kv_limit_bytes=limit,
        kv_floor_bytes=floor,
        kv_max_bytes=most,
        kv_bytes_per_token=model.kv_bytes_per_token,
        kv_geometry=one_group(block_bytes, model.block_tokens),
        elastic=system.elastic,
        residual_bytes=residual,
        host_copy_bytes=model.weights_bytes,
        host_bytes=model.weights_bytes if tier is Residency.HOST else 0,
        tiers=_TIERS,
        activation_s=activation_s(model, node, profile),
        max_inflight=cluster.max_num_seqs,
        max_model_len=model.max_model_len,
    )
    costs = step_costs(profile, model, cluster.max_batched_tokens)
    return Place(info, costs, model, profile, node, block_bytes)
