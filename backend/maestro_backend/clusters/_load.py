"""A cluster file as a `Cluster`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import Cluster, DeviceProfile, ModelGeometry, SimDevice, SimNode

from ._catalogue import Catalogue, chosen, likely, read_section, read_text, shipped, with_file
from ._room import check_room
from ._sections import ClusterSection, DeviceSection, NodeSection

CLUSTERS = ("paper", "single", "three-clusters")
"""Those that come with Maestro."""


def load_cluster(name: str | os.PathLike[str]) -> Cluster:
    """One of `CLUSTERS`, or a YAML file.

    Raises:
        ConfigError: there is no such cluster or file, or something in it is wrong.
    """
    path = Path(name)
    if os.fspath(name) in CLUSTERS:
        source = f"{os.fspath(name)}.yaml"
        text = files(__package__).joinpath("files", source).read_text(encoding="utf-8")
    elif path.suffix or path.is_file():
        source, text = str(path), read_text(path)
    else:
        hint = likely(os.fspath(name), CLUSTERS)
        raise ConfigError(f"there is no cluster {os.fspath(name)!r}, nor such a file{hint}")
    section = read_section(ClusterSection, text, source, path.absolute().parent)
    try:
        return _built(section)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _built(section: ClusterSection) -> Cluster:
    catalogue = shipped()
    for file in section.catalogues:
        catalogue = with_file(catalogue, file)
    catalogue = catalogue.with_sections(section.profiles, section.models)
    nodes: list[SimNode] = []
    for at, node in enumerate(section.nodes):
        nodes.extend(_nodes(node, f"nodes.{at}", catalogue))
    _check_once([node.name for node in nodes], "nodes")
    if not any(node.devices for node in nodes):
        raise ConfigError("nodes: describe one node with a device at least")
    held = {model for node in nodes for device in node.devices for model in device.models}
    models = {name: model for name, model in catalogue.models.items() if name in held}
    for name in section.kv:
        chosen(models, name, "kv")
    cluster = Cluster(
        section.name,
        tuple(nodes),
        models,
        dict(section.kv),
        section.max_num_seqs,
        section.max_batched_tokens,
    )
    check_room(cluster)
    return cluster


def _nodes(section: NodeSection, where: str, catalogue: Catalogue) -> Iterator[SimNode]:
    devices: list[SimDevice] = []
    first = 0
    for at, part in enumerate(section.devices):
        found = _devices(part, f"{where}.devices.{at}", first, section.profile, catalogue)
        devices.extend(found)
        first += part.count * part.devices
    _check_once([device.name for device in devices], f"{where}.devices")
    for number in range(section.count):
        yield SimNode(
            section.name if section.count == 1 else f"{section.name}-{number}",
            tuple(devices),
            section.host_memory,
            section.disk,
            section.cluster,
            section.rtt,
        )


def _devices(
    section: DeviceSection, where: str, first: int, profile: str | None, catalogue: Catalogue
) -> Iterator[SimDevice]:
    named = section.profile or profile
    if named is None:
        raise ConfigError(f"{where}: name a profile here, or one for the whole node")
    if section.name is not None and section.count > 1:
        raise ConfigError(f"{where}.name: {section.count} devices cannot share a name")
    kind: DeviceProfile = chosen(catalogue.profiles, named, f"{where}.profile")
    for model in section.models:
        geometry: ModelGeometry = chosen(catalogue.models, model, f"{where}.models")
        if geometry.tensor_parallel != section.devices:
            raise ConfigError(
                f"{where}.models: {model} spans {geometry.tensor_parallel} devices, this is a "
                f"group of {section.devices}; change devices here or the model's tensor_parallel"
            )
    _check_once(list(section.models), f"{where}.models")
    if section.static not in section.models:
        hint = likely(section.static, section.models)
        raise ConfigError(f"{where}.static: {section.static!r} is not one of its models{hint}")
    for number in range(section.count):
        low = first + number * section.devices
        high = low + section.devices - 1
        name = section.name or (f"gpu{low}" if low == high else f"gpu{low}-{high}")
        yield SimDevice(name, kind, section.models, section.static, section.devices)


def _check_once(names: list[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: {', '.join(twice)} stands twice")
