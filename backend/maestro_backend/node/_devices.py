"""Finds a node's devices and how many bytes each may use."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil

from maestro_agents.protocol import ConfigError
from maestro_backend.config import NodeConfig
from maestro_backend.scheduler import DeviceInfo

_SHARE = 0.8
"""Of the memory that is free when the agent starts, the part it may use."""

_MIB = 1024**2
_QUERY = ("nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits")


def find_devices(node: NodeConfig) -> tuple[DeviceInfo, ...]:
    """The configured devices, or else the GPUs, or else the CPU.

    Raises:
        ConfigError: a configured GPU is not there.
    """
    gpus = {} if node.devices == ("cpu",) else _gpus()
    names = node.devices or tuple(gpus) or ("cpu",)
    missing = [name for name in names if name != "cpu" and name not in gpus]
    if missing:
        found = ", ".join(gpus) or "none"
        raise ConfigError(f"node {node.name}: no device {', '.join(missing)} (GPUs found: {found})")
    free = gpus if names != ("cpu",) else {"cpu": _free_host_bytes()}
    return tuple(DeviceInfo(name, node.memory or int(free[name] * _SHARE)) for name in names)


def _gpus() -> dict[str, int]:
    """Free bytes of each GPU, as the driver's own tool says; not yet run on a GPU."""
    try:
        run = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = (line.split(",") for line in run.stdout.splitlines() if line.strip())
    return {f"cuda:{int(index)}": int(free) * _MIB for index, free in rows}


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
