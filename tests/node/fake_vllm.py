"""A vLLM around the fake GPU: what our sleep backend sees of one, and a worker with weights.

What it looks like is held against the installed vLLM in `test_gpu_contract`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from node.gpus import AllocationData, FakeGpu, FakeRuntime, use_runtime

torch = pytest.importorskip("torch", reason="torch comes with the engine (make setup)")

PLUGIN = "maestro_backend.workers.vllm_plugin"
LAYER = bytes(range(256)) * 4
SCALES = bytes(range(64))


@dataclass
class FakeVllm:
    gpu: FakeGpu
    cumem: Any
    runtime: FakeRuntime
    registry: dict[str, Any]
    abandoned: list[int]
    """Device memory in use when vLLM was taken out of a reload that broke off."""

    @property
    def backend(self) -> Any:
        module, name = self.registry["maestro"]
        return getattr(importlib.import_module(module), name)


def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    gpu, registry, abandoned = FakeGpu(), {}, []

    def finalize_layerwise_reload(model: Any, model_config: Any) -> None:
        abandoned.append(gpu.used)
        raise ValueError("half the weights")

    class Base:
        def __init__(self) -> None:
            self._state = "RUNNING"

        def state(self) -> str:
            return self._state

    class CuMemBackend(Base):
        pass

    class Factory:
        @classmethod
        def register_backend(cls, name: str, module_path: str, class_name: str) -> None:
            if name in registry:
                raise ValueError("already registered")
            registry[name] = (module_path, class_name)

    def map_(allocation_handle: Any) -> None:
        gpu.map(allocation_handle)

    def unmap(allocation_handle: Any) -> None:
        gpu.unmap(allocation_handle)

    cumem = SimpleNamespace(
        cumem_available=True,
        AllocationData=AllocationData,
        CuMemAllocator=SimpleNamespace(get_instance=lambda: gpu),
        create_and_map=map_,
        unmap_and_release=unmap,
    )
    backends = SimpleNamespace(
        SleepModeBackend=Base, CuMemBackend=CuMemBackend, SleepModeBackendFactory=Factory
    )
    modules = {
        "vllm": SimpleNamespace(),
        "vllm.logger": SimpleNamespace(init_logger=logging.getLogger),
        "vllm.config": SimpleNamespace(set_current_vllm_config=nullcontext),
        "vllm.model_executor.model_loader.reload": SimpleNamespace(
            finalize_layerwise_reload=finalize_layerwise_reload
        ),
        "vllm.device_allocator": SimpleNamespace(cumem=cumem),
        "vllm.device_allocator.cumem": cumem,
        "vllm.device_allocator.sleep_mode_backend": backends,
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(vars(content))
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm.device_allocator"].cumem = sys.modules["vllm.device_allocator.cumem"]  # type: ignore[attr-defined]
    runtime = use_runtime(monkeypatch, gpu)
    monkeypatch.setattr(gc, "freeze", lambda: None)  # this process has more to do
    monkeypatch.delitem(sys.modules, f"{PLUGIN}._cumem", raising=False)
    yield FakeVllm(gpu, sys.modules["vllm.device_allocator.cumem"], runtime, registry, abandoned)
    sys.modules.pop(f"{PLUGIN}._cumem", None)


def register() -> bool:
    from maestro_backend.workers.vllm_plugin._sleep import register_sleep_backend

    return register_sleep_backend()


def GpuWeights(worker: Any) -> Any:  # imported late, after the fake vLLM
    from maestro_backend.workers.vllm_plugin import _sleep

    return _sleep.GpuWeights(worker)


class Worker:
    """As vLLM's GPU worker: a layer's weight and a buffer, both in the allocator's memory."""

    def __init__(self, vllm: FakeVllm, backend: Any = None, **changing: Any) -> None:
        self._vllm = vllm
        self._backend = backend
        self.reloads = 0
        self.fail_reload = False
        self.draft: Any = None
        self.model_runner = SimpleNamespace()
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(sleep_mode_backend="cumem"),
            lora_config=changing.get("lora"),
            parallel_config=SimpleNamespace(enable_eplb=changing.get("eplb", False)),
        )
        if backend is None:
            self.layer = vllm.gpu.allocate("weights", LAYER)
            self.scales = vllm.gpu.allocate("weights", SCALES)
            self.model = torch.nn.Module()
            memory = (ctypes.c_char * len(SCALES)).from_address(self.scales)
            flat = torch.frombuffer(memory, dtype=torch.bfloat16)
            self.model.register_buffer("scales", flat.view(4, 8).t())

    @property
    def sleep_mode_backend(self) -> Any:
        if self._backend is None:
            assert self.vllm_config.model_config.sleep_mode_backend == "maestro"
            self._backend = self._vllm.backend()
        return self._backend

    def get_model(self) -> Any:
        return self.model

    def get_draft_model(self) -> Any:
        return self.draft

    def reload_weights(self) -> None:
        self.reloads += 1
        self._vllm.gpu.write(self.layer, LAYER)
        if self.fail_reload:
            raise OSError("the disk is gone")

    def update_weights(self, content: bytes) -> None:
        self._vllm.gpu.write(self.layer, content)


class OldWorker(Worker):
    """As vLLM 0.26 has it."""

    sleep_mode_backend = property()

    def _get_sleep_mode_backend(self) -> Any:
        return Worker.sleep_mode_backend.fget(self)  # type: ignore[attr-defined]


def worker_of(vllm: FakeVllm, **settings: Any) -> Worker:
    return Worker(vllm, **settings)
