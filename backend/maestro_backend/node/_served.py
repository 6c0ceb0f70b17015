"""The configured models on the devices of a node: which engine, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maestro_backend.config import Config, NodeConfig
from maestro_backend.scheduler import DeviceInfo
from maestro_backend.workers import (
    Checkpoint,
    Engine,
    ServedModel,
    cache_dir,
    choose_engine,
    known_checkpoint,
)

from ._learned import LearnedState, settings_fingerprint


@dataclass(frozen=True, slots=True)
class Served:
    """A model with its engine, and the device that it is for."""

    model: ServedModel
    engine: Engine
    device: str


def served_models(
    config: Config, node: NodeConfig, devices: Sequence[DeviceInfo]
) -> tuple[Served, ...]:
    """Each on the device that the models before it leave the most room on.

    Raises:
        ConfigError: an engine is missing, or a model's settings do not fit its engine.
    """
    cache = cache_dir(node.disk_cache)
    room = {device.device: device.capacity_bytes for device in devices}
    served = []
    for name, settings in config.models.items():
        engine = choose_engine(name, settings, list(room))
        known = known_checkpoint(settings.source, cache) if engine.needs_checkpoint else None
        model = ServedModel(name, settings, known or Checkpoint(settings.source))
        device = max(room, key=lambda device: room[device])
        room[device] -= engine.memory(model).total_bytes
        served.append(Served(model, engine, device))
    return tuple(served)


def learned_state(config: Config, served: Sequence[Served]) -> LearnedState:
    """What was learned of these models under these settings."""
    return LearnedState(
        config.state_dir / "learned.json",
        {s.model.name: settings_fingerprint(s.model.settings, s.engine.name) for s in served},
        {s.model.name: s.engine.memory(s.model).residual_bytes for s in served},
    )
