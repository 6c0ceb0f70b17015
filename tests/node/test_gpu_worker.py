"""Our sleep backend in a GPU worker of vLLM: real code of ours on a fake GPU and a fake vLLM.

What the fake vLLM looks like is held against the installed one in `test_gpu_contract`.
"""

from __future__ import annotations

import ctypes
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


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
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
    monkeypatch.delitem(sys.modules, f"{PLUGIN}._cumem", raising=False)
    yield FakeVllm(gpu, sys.modules["vllm.device_allocator.cumem"], runtime, registry, abandoned)
    sys.modules.pop(f"{PLUGIN}._cumem", None)


def register() -> bool:
    from maestro_backend.workers.vllm_plugin._sleep import register_sleep_backend

    return register_sleep_backend()


# --- the backend that vLLM's factory makes ------------------------------------------------------


@pytest.fixture
def backend(vllm: FakeVllm) -> Any:
    vllm.gpu.allocate("weights", LAYER)
    vllm.gpu.allocate("weights", SCALES)
    vllm.gpu.allocate("kv_cache", b"kv" * 50)
    assert register()
    return vllm.backend()


def test_registering_twice_is_registering_once(vllm: FakeVllm) -> None:
    assert register()
    assert register()
    assert list(vllm.registry) == ["maestro"]


def test_a_vllm_without_backends_is_left_alone(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.sleep_mode_backend", None)
    assert not register()


def test_level_1_copies_and_comes_back(vllm: FakeVllm, backend: Any) -> None:
    before = vllm.gpu.contents()
    size = sum(map(len, before.values()))
    assert backend.device_bytes == backend.host_copy_bytes == size
    assert backend.host_bytes == 0
    assert backend.suspend(1) == size
    assert backend.state() == "SUSPENDED"
    assert vllm.gpu.contents() == {}
    assert backend.host_bytes == vllm.gpu.pinned_bytes == size
    backend.resume(["weights"])
    assert backend.state() == "RUNNING"
    assert vllm.gpu.contents() == before
    vllm.gpu.copies.clear()
    backend.suspend(1)
    assert vllm.gpu.copies == []
    backend.resume()
    backend.drop_host_copy()
    assert vllm.gpu.pinned_bytes == 0


def test_copies_go_in_pieces(vllm: FakeVllm, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[f"{PLUGIN}._transfers"], "_CHUNK", 100)
    before = vllm.gpu.contents()
    backend.suspend(1)
    backend.resume()
    assert max(size for *_, size in vllm.gpu.copies) == 100
    assert vllm.gpu.contents() == before


def test_level_2_keeps_no_copy(vllm: FakeVllm, backend: Any) -> None:
    backend.suspend(1)
    backend.resume()
    backend.suspend(2)
    assert backend.state() == "SUSPENDED"
    assert vllm.gpu.pinned_bytes == 0
    backend.resume(["weights"])
    assert backend.state() == "RUNNING"


def test_a_failed_resume_is_still_suspended(vllm: FakeVllm, backend: Any) -> None:
    before = vllm.gpu.contents()
    backend.suspend(1)
    left = vllm.gpu.used
    vllm.gpu.fail["map"] = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        backend.resume()
    assert (backend.state(), vllm.gpu.used) == ("SUSPENDED", left)
    backend.resume()
    assert vllm.gpu.contents() == before


def test_a_refused_suspend_is_still_running(vllm: FakeVllm, backend: Any) -> None:
    before = vllm.gpu.contents()
    backend.set_host_budget(10)
    with pytest.raises(MemoryError, match="10 are granted"):
        backend.suspend(1)
    backend.set_host_budget(None)
    vllm.gpu.host = 10
    with pytest.raises(MemoryError, match="pinned host memory"):
        backend.suspend(1)
    assert (backend.state(), vllm.gpu.contents()) == ("RUNNING", before)


def test_the_kv_cache_leaves_only_when_asked(vllm: FakeVllm, backend: Any) -> None:
    backend.suspend(1)
    assert vllm.gpu.contents("kv_cache")
    backend.suspend(1, tags=("kv_cache",))
    assert vllm.gpu.used == 0
    backend.resume(["weights"])
    assert backend.state() == "SUSPENDED"
    backend.resume(["kv_cache"])
    assert backend.state() == "RUNNING"


def _without_argument(vllm: FakeVllm) -> None:
    vllm.cumem.create_and_map = lambda handle: None


def _without_field(vllm: FakeVllm) -> None:
    from dataclasses import make_dataclass

    vllm.cumem.AllocationData = make_dataclass("AllocationData", ["handle", "tag"])


def _without_pointers(vllm: FakeVllm) -> None:
    vllm.cumem.CuMemAllocator = SimpleNamespace(get_instance=lambda: SimpleNamespace())


def _without_symbol(vllm: FakeVllm) -> None:
    del vllm.runtime.functions["cudaMemcpyAsync"]


def _without_allocator(vllm: FakeVllm) -> None:
    vllm.cumem.cumem_available = False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without_argument, "create_and_map takes"),
        (_without_field, "AllocationData has"),
        (_without_pointers, "pointer_to_data"),
        (_without_symbol, "cudaMemcpyAsync"),
        (_without_allocator, "without its sleep allocator"),
    ],
)
def test_other_internals_fall_back_to_vllms_own_sleep_in_one_line(
    vllm: FakeVllm, caplog: pytest.LogCaptureFixture, change: Any, said: str
) -> None:
    change(vllm)
    register()
    with caplog.at_level(logging.WARNING, "vllm.maestro"):
        backend = vllm.backend()
    [line] = caplog.messages
    assert said in line
    stock = sys.modules["vllm.device_allocator.sleep_mode_backend"]
    assert isinstance(backend, stock.CuMemBackend)  # type: ignore[attr-defined]
    assert GpuWeights(worker_of(vllm, backend=backend)).tiers == ("device",)


# --- the weights of a worker --------------------------------------------------------------------


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


@pytest.fixture
def worker(vllm: FakeVllm) -> Worker:
    return worker_of(vllm)


@pytest.fixture
def weights(worker: Worker) -> Any:
    return GpuWeights(worker)


SIZE = len(LAYER) + len(SCALES)


def test_host_and_back(vllm: FakeVllm, worker: Worker, weights: Any) -> None:
    before = vllm.gpu.contents()
    assert weights.tiers == ("device", "host", "parked")
    assert (weights.device_bytes, weights.host_copy_bytes, weights.host_bytes) == (SIZE, SIZE, 0)
    weights.keep_copy(SIZE)
    assert weights.suspend() == SIZE
    assert not weights.on_device
    assert weights.suspend() == 0
    weights.resume()
    assert weights.on_device
    assert vllm.gpu.contents() == before
    assert worker.reloads == 0
    assert weights.host_bytes == SIZE


def test_the_backend_is_had_of_an_older_worker_too(vllm: FakeVllm) -> None:
    weights = GpuWeights(OldWorker(vllm))
    assert weights.tiers == ("device", "host", "parked")


def test_a_model_with_a_draft_model_is_never_parked(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    before = vllm.gpu.contents()
    worker.draft = torch.nn.Module()
    assert weights.tiers == ("device", "host")
    for copied in (False, True):
        if copied:
            weights.keep_copy(None)
            weights.suspend()
        with pytest.raises(RuntimeError, match="cannot reload a draft model"):
            weights.drop_copy() if copied else weights.suspend()
        weights.resume()
        assert weights.on_device and vllm.gpu.contents() == before


@pytest.mark.parametrize("copied", [True, False])
def test_what_vllm_keeps_beside_the_kv_cache_is_made_anew(
    vllm: FakeVllm, worker: Worker, weights: Any, copied: bool
) -> None:
    """vLLM 0.26 has tables of pointers in the cache's memory and a method that renews them."""
    before, _ = vllm.gpu.contents(), vllm.gpu.allocate("kv_cache", b"kv" * 50)
    renewed = []

    def renew() -> None:
        renewed.append(vllm.gpu.used)
        if len(renewed) == 1:
            raise RuntimeError("out of memory")

    worker.model_runner.post_kv_cache_wake_up = renew
    if copied:
        weights.keep_copy(None)
    weights.suspend()
    weights.resume()
    assert renewed == [], "the cache has not been away"
    weights.suspend()
    weights.release_kv()
    with pytest.raises(RuntimeError, match="out of memory"):
        weights.resume()
    assert (weights.on_device, vllm.gpu.used) == (False, 0)
    weights.resume()
    assert renewed == [SIZE + 100, SIZE + 100]
    assert vllm.gpu.contents().items() >= before.items()
    weights.suspend()
    weights.resume()
    assert len(renewed) == 2


def test_parked_weights_are_reloaded_and_buffers_survive(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    before = vllm.gpu.contents()
    assert weights.suspend() == SIZE
    assert (vllm.gpu.used, vllm.gpu.pinned_bytes) == (0, 0)
    weights.resume()
    assert worker.reloads == 1
    assert vllm.gpu.contents() == before
    weights.suspend()
    weights.resume()
    assert (worker.reloads, vllm.gpu.contents()) == (2, before)


@pytest.mark.parametrize("first", ["host", "device"])
def test_dropping_the_copy_parks(vllm: FakeVllm, worker: Worker, weights: Any, first: str) -> None:
    before = vllm.gpu.contents()
    weights.keep_copy(None)
    if first == "host":  # the device may hold another model by now: buffers come from the copy
        weights.suspend()
        weights.resume()
    weights.suspend()
    weights.drop_copy()
    weights.drop_copy()
    assert vllm.gpu.pinned_bytes == 0
    with pytest.raises(MemoryError, match="resume them first"):
        weights.keep_copy(None)
    weights.resume()
    assert (worker.reloads, vllm.gpu.contents()) == (1, before)
    weights.keep_copy(None)


def test_a_model_without_buffers_is_reloaded_too(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    worker.model = torch.nn.Module()
    weights.suspend()
    weights.resume()
    assert worker.reloads == 1


def test_a_failed_reload_is_parked_again(vllm: FakeVllm, worker: Worker, weights: Any) -> None:
    before = vllm.gpu.contents()
    weights.suspend()
    worker.fail_reload = True
    with pytest.raises(OSError, match="disk is gone"):
        weights.resume()
    assert not weights.on_device
    assert vllm.gpu.used == 0
    assert vllm.abandoned == [SIZE]
    worker.fail_reload = False
    weights.resume()
    assert vllm.gpu.contents() == before


@pytest.mark.parametrize("copied", [True, False])
def test_the_kv_cache_leaves_after_the_weights_and_comes_back_with_them(
    vllm: FakeVllm, worker: Worker, weights: Any, copied: bool
) -> None:
    before, kv = vllm.gpu.contents(), vllm.gpu.allocate("kv_cache", b"kv" * 50)
    assert weights.takes_kv_along and weights.release_kv() == 0, "the model needs it"
    if copied:
        weights.keep_copy(None)
    weights.suspend()
    assert [weights.release_kv(), weights.release_kv(), vllm.gpu.used] == [100, 0, 0]
    vllm.gpu.fail["map"] = 3  # the cache is the last
    worker.fail_reload = not copied
    for words in ("out of memory",) if copied else ("out of memory", "disk is gone"):
        with pytest.raises((RuntimeError, OSError), match=words):
            weights.resume()
        assert vllm.gpu.used == 0
    worker.fail_reload = False
    weights.resume()
    assert vllm.gpu.contents() == before and kv in vllm.gpu.mapped
    weights.suspend()
    assert vllm.gpu.used == 100, "it leaves only when asked for"


def test_a_failed_return_stays_where_it_was(vllm: FakeVllm, weights: Any) -> None:
    before = vllm.gpu.contents()
    weights.keep_copy(None)
    weights.suspend()
    vllm.gpu.fail["map"] = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        weights.resume()
    assert not weights.on_device
    weights.resume()
    assert vllm.gpu.contents() == before


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_suspend_that_fails_brings_everything_back(
    vllm: FakeVllm, weights: Any, copied: bool, nth: int
) -> None:
    before = vllm.gpu.contents()
    if copied:
        weights.keep_copy(None)
    vllm.gpu.fail["unmap"] = nth
    with pytest.raises(RuntimeError, match="illegal memory access"):
        weights.suspend()
    assert weights.on_device
    assert vllm.gpu.contents() == before
    assert weights.suspend() == SIZE


def test_over_the_budget_nothing_moves(vllm: FakeVllm, weights: Any) -> None:
    with pytest.raises(MemoryError, match="granted"):
        weights.keep_copy(SIZE - 1)
    assert weights.on_device
    assert (vllm.gpu.used, vllm.gpu.pinned_bytes) == (SIZE, 0)


def test_new_weights_make_the_copy_stale(vllm: FakeVllm, worker: Worker, weights: Any) -> None:
    weights.keep_copy(None)
    worker.update_weights(b"trained")
    assert weights.host_bytes == vllm.gpu.pinned_bytes == 0
    before = vllm.gpu.contents()
    weights.keep_copy(None)
    weights.suspend()
    weights.resume()
    assert vllm.gpu.contents() == before


def test_a_write_that_cannot_be_does_not_cost_the_only_copy(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    before = vllm.gpu.contents()
    weights.keep_copy(None)
    weights.suspend()
    with pytest.raises(AssertionError, match="without memory"):
        worker.update_weights(b"trained")
    weights.resume()
    assert vllm.gpu.contents() == before


@pytest.mark.parametrize("changing", [{"lora": object()}, {"eplb": True}])
def test_weights_that_change_by_themselves_are_copied_every_time(
    vllm: FakeVllm, changing: dict[str, Any]
) -> None:
    worker = worker_of(vllm, **changing)
    weights = GpuWeights(worker)
    weights.keep_copy(None)
    weights.suspend()
    assert weights.host_bytes == SIZE
    weights.resume()
    assert vllm.gpu.pinned_bytes == 0


def test_without_sleep_mode_the_weights_cannot_leave(vllm: FakeVllm) -> None:
    register()
    worker = worker_of(vllm)
    for data in vllm.gpu.pointer_to_data.values():
        data.tag = "default"
    weights = GpuWeights(worker)
    assert weights.tiers == ("device",)
    with pytest.raises(RuntimeError, match="--enable-sleep-mode"):
        weights.suspend()
