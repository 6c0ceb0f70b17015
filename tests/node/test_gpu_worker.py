"""Our sleep backend in a GPU worker of vLLM: real code of ours on a fake GPU and a fake vLLM."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from node.fake_vllm import (
    LAYER,
    PLUGIN,
    SCALES,
    FakeVllm,
    GpuWeights,
    fake_vllm,
    register,
    worker_of,
)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    yield from fake_vllm(monkeypatch)


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
