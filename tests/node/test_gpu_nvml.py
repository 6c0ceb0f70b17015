"""What the driver says of the GPUs, by NVML and by nvidia-smi, on fakes of both."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from maestro_backend.node._nvml import GpuMemory, read_gpus

MIB = 1024**2
GIB = 1024**3
NOBODY = 2**22 + 1
"""Above the kernel's largest pid."""


class NVMLError(Exception):
    pass


class LibraryMismatchError(Exception):
    """As pynvml's: it is no NVMLError."""


class Fakes:
    """A driver with some GPUs: what pynvml would tell of it."""

    def __init__(self) -> None:
        self.gpus: list[dict[str, Any]] = []
        self.open = 0
        self.broken = ""

    def module(self) -> ModuleType:
        module = ModuleType("pynvml")
        module.__dict__.update(
            NVMLError=NVMLError,
            nvmlInit=self._init,
            nvmlShutdown=self._shutdown,
            nvmlDeviceGetCount=lambda: len(self.gpus),
            nvmlDeviceGetHandleByIndex=lambda index: self.gpus[index],
            nvmlDeviceGetMemoryInfo=self._memory,
            nvmlDeviceGetComputeRunningProcesses=self._processes,
        )
        return module

    def _init(self) -> None:
        if self.broken == "init":
            raise NVMLError("Driver Not Loaded")
        self.open += 1

    def _shutdown(self) -> None:
        self.open -= 1

    def _memory(self, gpu: dict[str, Any]) -> Any:
        if self.broken == "memory":
            raise NVMLError("GPU is lost")
        return SimpleNamespace(total=gpu["total"], free=gpu["free"], used=0)

    def _processes(self, gpu: dict[str, Any]) -> list[Any]:
        if self.broken == "processes":
            raise NVMLError("Not Supported")
        if self.broken == "library":
            raise LibraryMismatchError("no nvmlDeviceGetComputeRunningProcesses_v3")
        held = [*gpu["held"].items(), *gpu.get("again", ())]
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in held]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    """NVML is there, nvidia-smi is not."""
    fakes = Fakes()
    monkeypatch.setitem(sys.modules, "pynvml", fakes.module())
    monkeypatch.setenv("PATH", str(tmp_path))
    return fakes


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """NVML is not there; the file says what nvidia-smi does."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "nvidia-smi"


def say(tool: Path, gpus: str, processes: str = "") -> None:
    tool.write_text(
        "#!/bin/sh\n"
        f'case "$1" in *=index,uuid,memory.total,memory.free) printf "{gpus}";;\n'
        f'*=gpu_uuid,pid,used_memory) printf "{processes}";; *) exit 6;; esac\n'
    )
    tool.chmod(0o755)


def test_nvml_tells_every_gpu_and_process(driver: Fakes) -> None:
    mine, parent = os.getpid(), os.getppid()
    driver.gpus = [
        {"total": 80 * GIB, "free": 50 * GIB, "held": {mine: 20 * GIB, parent: 9 * GIB}},
        {"total": 24 * GIB, "free": 24 * GIB, "held": {}},
    ]
    held = {mine: 20 * GIB, parent: 9 * GIB}
    assert read_gpus() == {
        "cuda:0": GpuMemory(80 * GIB, 30 * GIB, 50 * GIB, held),
        "cuda:1": GpuMemory(24 * GIB, 0, 24 * GIB, {}),
    }
    assert driver.open == 0


def test_visible_devices_do_not_change_the_names(
    driver: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    driver.gpus = [{"total": GIB, "free": GIB, "held": {}}] * 2
    assert list(read_gpus()) == ["cuda:0", "cuda:1"]


def test_pids_of_another_namespace_are_nobodys(driver: Fakes) -> None:
    held = {os.getpid(): GIB, NOBODY: GIB}
    driver.gpus = [{"total": 4 * GIB, "free": GIB, "held": held}]
    assert read_gpus() == {"cuda:0": GpuMemory(4 * GIB, 3 * GIB, GIB, {})}


def test_a_process_whose_memory_is_not_told_is_left_out(driver: Fakes) -> None:
    driver.gpus = [{"total": GIB, "free": GIB, "held": {os.getpid(): None}}]
    assert read_gpus()["cuda:0"].by_pid == {}


def test_a_process_that_is_told_twice_holds_both(driver: Fakes) -> None:
    pid = os.getpid()
    driver.gpus = [{"total": GIB, "free": 0, "held": {pid: 3 * MIB}, "again": [(pid, 4 * MIB)]}]
    assert read_gpus()["cuda:0"].by_pid == {pid: 7 * MIB}


@pytest.mark.parametrize("broken", ["processes", "library"])
def test_processes_that_cannot_be_asked_for_are_not_told(driver: Fakes, broken: str) -> None:
    driver.gpus = [{"total": GIB, "free": 0, "held": {os.getpid(): GIB}}]
    driver.broken = broken
    assert read_gpus() == {"cuda:0": GpuMemory(GIB, GIB, 0, {})}


@pytest.mark.parametrize("broken", ["init", "memory"])
def test_a_broken_nvml_gives_way_to_the_tool(
    driver: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    driver.gpus = [{"total": GIB, "free": GIB, "held": {}}]
    driver.broken = broken
    assert read_gpus() == {}
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    say(tmp_path / "nvidia-smi", r"0, GPU-a, 1024, 24\n")
    assert read_gpus() == {"cuda:0": GpuMemory(GIB, 1000 * MIB, 24 * MIB, {})}
    assert driver.open == 0


def test_the_tool_tells_the_same(tool: Path) -> None:
    mine = os.getpid()
    say(
        tool,
        r"0, GPU-a, 81920, 80000\n1, GPU-b, 24576, 24576\n",
        rf"GPU-a, {mine}, 1500\nGPU-b, {mine}, [N/A]\n",
    )
    assert read_gpus() == {
        "cuda:0": GpuMemory(81920 * MIB, 1920 * MIB, 80000 * MIB, {mine: 1500 * MIB}),
        "cuda:1": GpuMemory(24576 * MIB, 0, 24576 * MIB, {}),
    }


def test_a_gpu_that_tells_nothing_is_left_out(tool: Path) -> None:
    say(tool, r"0, GPU-a, [N/A], [N/A]\n1, GPU-b, 1024, 1024\n")
    assert list(read_gpus()) == ["cuda:1"]


def test_a_host_without_gpus_has_none(tool: Path) -> None:
    assert read_gpus() == {}
    say(tool, "")
    tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert read_gpus() == {}
