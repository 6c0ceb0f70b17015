"""Pinned memory and copies: on a fake CUDA runtime everywhere, on a real one where there is one."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path
from typing import Any, Protocol

import pytest
from node.gpus import FakeGpu, use_runtime

torch = pytest.importorskip("torch", reason="torch comes with the engine (make setup)")

from maestro_backend.workers.vllm_plugin import _transfers  # noqa: E402  # it needs torch

MIB = 1024**2
CONTENT = bytes(range(256)) * 4 * 1024 + b"not a whole number of chunks"


class Gpu(Protocol):
    def allocate(self, content: bytes) -> int: ...
    def read(self, pointer: int) -> bytes: ...


class Fake:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def allocate(self, content: bytes) -> int:
        return self.gpu.allocate("weights", content)

    def read(self, pointer: int) -> bytes:
        return self.gpu.contents()[pointer]


class Real:
    def __init__(self) -> None:
        self.tensors: dict[int, Any] = {}

    def allocate(self, content: bytes) -> int:
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8).cuda()
        self.tensors[tensor.data_ptr()] = tensor
        return int(tensor.data_ptr())

    def read(self, pointer: int) -> bytes:
        return bytes(self.tensors[pointer].cpu().numpy())


@pytest.fixture(params=["fake", "real"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("no GPU here")
        return Real()
    fake = FakeGpu(capacity=64 * MIB, host=64 * MIB)
    use_runtime(monkeypatch, fake)
    return Fake(fake)


@pytest.fixture
def transfers(gpu: Gpu) -> _transfers.Transfers:
    return _transfers.Transfers()


@pytest.mark.parametrize("chunk", [1 << 26, 1000, len(CONTENT)])
def test_bytes_go_there_and_back(
    gpu: Gpu, transfers: _transfers.Transfers, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(_transfers, "_CHUNK", chunk)
    source, target = gpu.allocate(CONTENT), gpu.allocate(bytes(len(CONTENT)))
    block = transfers.pin(2 * len(CONTENT) + 7)
    assert len(block) == 2 * len(CONTENT) + 7
    transfers.to_host(block, 7, source, len(CONTENT))
    transfers.synchronize()
    assert block[7 : 7 + len(CONTENT)] == CONTENT
    transfers.to_device(target, block, 7, len(CONTENT))
    transfers.synchronize()
    assert gpu.read(target) == CONTENT
    transfers.unpin(block)
    assert block.closed


def test_a_buffer_is_there_before_it_is_pinned_and_no_fork_takes_it_along(
    transfers: _transfers.Transfers,
) -> None:
    size = 32 * MIB
    block = transfers.pin(size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    [mapping] = re.findall(
        rf"^{address & ~(mmap.PAGESIZE - 1):x}-.*?^VmFlags: (.*?)$",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert "dc" in mapping.split(), "a fork copies it"
    seen = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), seen) == 0
    assert all(page & 1 for page in seen)
    transfers.unpin(block)


def test_what_the_driver_refuses_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(host=10)
    runtime = use_runtime(monkeypatch, gpu)
    transfers = _transfers.Transfers()
    mappings = Path("/proc/self/maps").read_text().count("\n")
    for _ in range(20):
        with pytest.raises(MemoryError, match=r"no 1048576 bytes of pinned .* CUDA error 2"):
            transfers.pin(MIB)
    assert Path("/proc/self/maps").read_text().count("\n") < mappings + 20
    assert runtime.last_error == 0, "torch would fail of it"


def test_more_than_the_system_has_is_a_memory_error(transfers: _transfers.Transfers) -> None:
    with pytest.raises(MemoryError, match="pinned host memory"):
        transfers.pin(1 << 60)


def test_a_failed_copy_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    runtime = use_runtime(monkeypatch, gpu)
    transfers, source = _transfers.Transfers(), gpu.allocate("weights", b"content")
    block = transfers.pin(7)
    gpu.fail["copy"] = 1
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync failed with CUDA error 719"):
        transfers.to_host(block, 0, source, 7)
    assert runtime.last_error == 0


def test_torch_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(OSError, match="built without CUDA"):
        _transfers.cuda_runtime()
