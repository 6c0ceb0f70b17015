"""Reads what workers take: of a CPU's memory by PSS, of GPUs by what their driver tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Protocol

from maestro_backend.scheduler import DeviceInfo

from ._nvml import GpuMemory, read_gpus

_MOVED_BYTES = 1024**2
_TRUST_S = 10.0
"""A process whose resident size has not moved is read in full again only after this long.

A full reading walks the page tables of the process: 14 ms per GiB, measured. The resident size
costs 40 microseconds, and hides only what is shared with others that came or went.
"""


@dataclass(frozen=True, slots=True)
class Subject:
    """A worker to be measured: where it runs, its processes, its copy in host memory, its claim."""

    device: str
    pids: tuple[int, ...]
    host_bytes: int
    claimed_bytes: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read, in bytes: of each model on its device (where it can be told), of all our
    workers on each device, and of others there beyond what this node leaves to them."""

    models: Mapping[str, int]
    devices: Mapping[str, int]
    outside: Mapping[str, int]


class Meter(Protocol):
    """Reads memory. It may take a while, and is not used by two threads at once."""

    def read(self, subjects: Mapping[str, Subject]) -> Reading:
        """What is taken now. Processes that are gone take nothing."""


@dataclass(frozen=True, slots=True)
class _Process:
    """One process when it was last read. Pages that are shared count in part."""

    total_bytes: int
    shared_memory_bytes: int
    resident_bytes: int
    at: float

    def holds(self, resident_bytes: int, now: float) -> bool:
        """Whether it is still good enough at `now`, in seconds."""
        moved = abs(resident_bytes - self.resident_bytes) >= _MOVED_BYTES
        return not moved and now - self.at < _TRUST_S


class CpuMeter:
    """PSS of all processes of a worker, without the copy in host memory while that is mapped."""

    def __init__(self) -> None:
        self._last: dict[int, _Process] = {}

    def read(self, subjects: Mapping[str, Subject]) -> Reading:
        """What is taken now. What others take is not looked at."""
        now = time.monotonic()
        read: dict[int, _Process] = {}
        sizes: dict[str, int] = {}
        for model, subject in subjects.items():
            mine = {pid: process for pid in subject.pids if (process := self._one(pid, now))}
            sizes[model] = _device_bytes(tuple(mine.values()), subject.host_bytes)
            read |= mine
        self._last = read
        return Reading(sizes, {"cpu": sum(sizes.values())}, {})

    def _one(self, pid: int, now: float) -> _Process | None:
        """None for a process that is gone."""
        try:
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGESIZE
            last = self._last.get(pid)
            if last is not None and last.holds(resident, now):
                return last
            return _Process(*_pss(pid), resident, now)
        except OSError:
            return None


def _device_bytes(processes: Sequence[_Process], host_bytes: int) -> int:
    mapped = sum(process.shared_memory_bytes for process in processes)
    return sum(process.total_bytes for process in processes) - min(mapped, host_bytes)


def _pss(pid: int) -> tuple[int, int]:
    """PSS of a process, and what of it is shared memory; 0 for a zombie.

    Raises:
        OSError: it is gone, or not ours to look at.
    """
    sizes = {b"Pss": 0, b"Pss_Shmem": 0}
    with open(f"/proc/{pid}/smaps_rollup", "rb") as lines:
        next(lines, None)
        for line in lines:
            kind, size = line.split(b":")
            sizes[kind] = int(size.split()[0]) * 1024
    return sizes[b"Pss"], sizes[b"Pss_Shmem"]


class GpuMeter:
    """What the driver tells of each process, or else of the whole device.

    In a container it may hide the processes: then our workers are taken to hold their claims, and
    what a device holds beyond them counts as others'. Run on fakes, not yet on a GPU.
    """

    def __init__(
        self,
        devices: Sequence[DeviceInfo],
        gpus: Callable[[], Mapping[str, GpuMemory]] = read_gpus,
    ) -> None:
        self._devices = devices
        self._gpus = gpus

    def read(self, subjects: Mapping[str, Subject]) -> Reading:
        """What is taken now. A device that cannot be read is left out."""
        gpus, models = self._gpus(), dict[str, int]()
        used, outside = dict[str, int](), dict[str, int]()
        for name, capacity in ((d.device, d.capacity_bytes) for d in self._devices):
            if (gpu := gpus.get(name)) is None:
                continue
            mine = {model: s for model, s in subjects.items() if s.device == name}
            told = {
                model: sum(gpu.by_pid.get(pid, 0) for pid in subject.pids)
                for model, subject in mine.items()
                if gpu.by_pid
            }
            ours = sum(told.get(model, subject.claimed_bytes) for model, subject in mine.items())
            models |= told
            used[name] = min(ours, gpu.used_bytes)
            left = gpu.total_bytes - capacity
            outside[name] = max(0, gpu.used_bytes - used[name] - left)
        return Reading(models, used, outside)


def meter_of(devices: Sequence[DeviceInfo]) -> Meter:
    """The one for these devices: a node has GPUs, or one CPU."""
    on_cpu = [device.device for device in devices] == ["cpu"]
    return CpuMeter() if on_cpu else GpuMeter(devices)
