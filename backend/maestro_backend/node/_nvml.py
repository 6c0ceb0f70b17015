"""What the GPUs of this host hold, as their driver says: by NVML, or else by nvidia-smi.

Written from NVIDIA's documentation of both; run on fakes, not yet on a GPU.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

_MIB = 1024**2
_TIMEOUT_S = 30
_FORMAT = "--format=csv,noheader,nounits"
_GPUS = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free", _FORMAT)
_PROCESSES = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", _FORMAT)


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of one GPU. `used_bytes` is all that is not free, the driver's own part too.

    `by_pid` is what each process holds; empty where the driver does not tell, or tells pids of
    another namespace (in a container).
    """

    total_bytes: int
    used_bytes: int
    free_bytes: int
    by_pid: Mapping[int, int]


def read_gpus() -> dict[str, GpuMemory]:
    """Every GPU of the host by name (`cuda:0` is the driver's number 0); {} where there is none.

    Blocks: some milliseconds with NVML, up to seconds with nvidia-smi. `CUDA_VISIBLE_DEVICES` does
    not count here: workers are started with the driver's numbers in it.
    """
    gpus = _by_nvml()
    return _by_tool() if gpus is None else gpus


def _by_nvml() -> dict[str, GpuMemory] | None:
    """None where NVML cannot be asked."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        with _running(pynvml):
            count = pynvml.nvmlDeviceGetCount()
            return {f"cuda:{index}": _gpu_by_nvml(pynvml, index) for index in range(count)}
    except pynvml.NVMLError:
        return None


@contextmanager
def _running(pynvml: Any) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _gpu_by_nvml(pynvml: Any, index: int) -> GpuMemory:
    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    except Exception:  # an old driver's library misses a function: that is no NVMLError
        processes = []
    held: dict[int, int] = {}
    for process in processes:
        if process.usedGpuMemory is not None:  # one pid may be told of several instances
            held[process.pid] = held.get(process.pid, 0) + process.usedGpuMemory
    return _gpu(int(memory.total), int(memory.free), held)


def _by_tool() -> dict[str, GpuMemory]:
    rows = _table(_GPUS)
    held: dict[str, dict[int, int]] = {}
    for uuid, pid, used in _table(_PROCESSES) if rows else ():
        if pid.isdigit() and used.isdigit():
            held.setdefault(uuid, {})[int(pid)] = int(used) * _MIB
    return {
        f"cuda:{int(index)}": _gpu(int(total) * _MIB, int(free) * _MIB, held.get(uuid, {}))
        for index, uuid, total, free in rows
        if total.isdigit() and free.isdigit()
    }


def _table(command: tuple[str, ...]) -> list[list[str]]:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(",") for line in run.stdout.splitlines() if line.strip())
    return [[cell.strip() for cell in row] for row in rows]


def _gpu(total: int, free: int, held: Mapping[int, int]) -> GpuMemory:
    """A pid that does not live here means that the pids are another namespace's."""
    ours = all(psutil.pid_exists(pid) for pid in held)
    return GpuMemory(total, total - free, free, dict(held) if ours else {})
