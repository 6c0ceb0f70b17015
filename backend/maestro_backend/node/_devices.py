"""Finds a node's devices and how many bytes of them, and of host memory, it may use."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter, ValidationError

from maestro_agents.protocol import ConfigError
from maestro_backend.config import NodeConfig
from maestro_backend.scheduler import DeviceInfo

from ._nvml import read_gpus

log = logging.getLogger(__name__)

GPU_SHARE = 0.8
CPU_SHARE = 0.65
CPU_HOST_SHARE = 0.15
GPU_HOST_SHARE = 0.5
"""Of the memory that is free when the agent starts, the parts it may use where none are given."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a node may use: of each device, and of host memory for weights put aside there."""

    devices: tuple[DeviceInfo, ...]
    host_capacity_bytes: int


_BUDGETS = TypeAdapter(Budgets)


def find_budgets(node: NodeConfig, earlier: Budgets | None = None) -> Budgets:
    """The configured devices, or else the GPUs, or else the CPU, with what they may be used for.

    `earlier` holds for what is not configured: while workers of an earlier agent live, what is free
    says nothing.

    Raises:
        ConfigError: a configured GPU is not there.
    """
    gpus = {} if node.devices == ("cpu",) else read_gpus()
    names = node.devices or tuple(gpus) or ("cpu",)
    missing = [name for name in names if name != "cpu" and name not in gpus]
    if missing:
        found = ", ".join(gpus) or "none"
        raise ConfigError(f"node {node.name}: no device {', '.join(missing)} (GPUs found: {found})")
    free_of_host = _free_host_bytes()
    if names == ("cpu",):
        room = {"cpu": int(free_of_host * CPU_SHARE)}
        host = int(free_of_host * CPU_HOST_SHARE)
    else:
        room = {name: int(gpus[name].free_bytes * GPU_SHARE) for name in names}
        host = int(free_of_host * GPU_HOST_SHARE)
    if earlier is not None:
        room |= {d.device: d.capacity_bytes for d in earlier.devices if d.device in room}
        host = earlier.host_capacity_bytes
    devices = tuple(DeviceInfo(name, node.memory or room[name]) for name in names)
    return Budgets(devices, host if node.host_memory is None else node.host_memory)


def read_budgets(file: Path) -> Budgets | None:
    """What an earlier agent wrote with `write_budgets`; None where nothing can be read."""
    try:
        return _BUDGETS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("cannot read %s: %s", file, error)
        return None


def write_budgets(file: Path, budgets: Budgets) -> None:
    """Keep them for a later agent."""
    fresh = file.with_name(f"{file.name}.new")
    try:
        fresh.write_bytes(_BUDGETS.dump_json(budgets))
        os.replace(fresh, file)
    except OSError as error:
        log.warning("cannot write %s: %s", file, error)


def _free_host_bytes() -> int:
    """What is available, in this container where it has a limit of its own."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int(
            (group / "memory.current").read_text()
        )
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit))
