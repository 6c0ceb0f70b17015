"""A GPU of plain memory, and a vLLM around it: what the GPU code of a worker is tested on.

`FakeGpu` does what CUDA's virtual memory calls do: memory comes and goes behind addresses that
stay, what was unmapped is lost, copies run only by the time of a synchronisation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

Handle = tuple[int, int, int, int]


@dataclass
class AllocationData:
    """As vLLM's."""

    handle: Handle
    tag: str
    cpu_backup_tensor: Any = None
    is_asleep: bool = False


class FakeGpu:
    """So many bytes of device memory and an allocator's table of what lies in it."""

    def __init__(self, capacity: int = 1 << 20, host: int = 1 << 20) -> None:
        self.capacity = capacity
        self.host = host
        self.pointer_to_data: dict[int, AllocationData] = {}
        self.mapped: dict[int, int] = {}
        self.pinned: dict[int, Any] = {}
        self.copies: list[tuple[int, int, int]] = []
        self.fail: dict[str, int] = {}
        """Fail the n-th `map`, `unmap`, `copy` from now on."""
        self._memory: dict[int, Any] = {}
        self._waiting: list[Callable[[], object]] = []

    # --- what a model does ----------------------------------------------------------------------

    def allocate(self, tag: str, content: bytes) -> int:
        memory = (ctypes.c_char * len(content))()
        pointer = ctypes.addressof(memory)
        self._memory[pointer] = memory
        data = AllocationData((0, len(content), pointer, pointer + 1), tag)
        self.map(data.handle)
        self.pointer_to_data[pointer] = data
        self.write(pointer, content)
        return pointer

    def free(self, pointer: int) -> None:
        data = self.pointer_to_data.pop(pointer)
        if not data.is_asleep:
            self.unmap(data.handle)

    def write(self, pointer: int, content: bytes) -> None:
        assert pointer in self.mapped, "write to addresses without memory"
        ctypes.memmove(pointer, content, len(content))

    def contents(self, tag: str = "weights") -> dict[int, bytes]:
        return {
            pointer: ctypes.string_at(pointer, data.handle[1])
            for pointer, data in self.pointer_to_data.items()
            if data.tag == tag and pointer in self.mapped
        }

    @property
    def used(self) -> int:
        return sum(self.mapped.values())

    @property
    def pinned_bytes(self) -> int:
        return sum(map(len, self.pinned.values()))

    # --- what the driver does -------------------------------------------------------------------

    def map(self, handle: Handle) -> None:
        _, size, pointer, _ = handle
        assert pointer not in self.mapped, "mapped twice"
        if self._fails("map") or self.used + size > self.capacity:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:118")
        self.mapped[pointer] = size
        ctypes.memset(pointer, 0xCC, size)

    def unmap(self, handle: Handle) -> None:
        _, size, pointer, _ = handle
        if self._fails("unmap"):
            raise RuntimeError("CUDA Error: an illegal memory access was encountered")
        assert not self._waiting, "unmapped under a copy"
        del self.mapped[pointer]
        ctypes.memset(pointer, 0xEE, size)

    def copy(self, target: int, source: int, size: int) -> None:
        if self._fails("copy"):
            raise RuntimeError("CUDART error: unspecified launch failure")
        self.copies.append((target, source, size))
        self._waiting.append(lambda: ctypes.memmove(target, source, size))

    def synchronize(self) -> None:
        if self._fails("synchronize"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        waiting, self._waiting = self._waiting, []
        for copy in waiting:
            copy()

    def _fails(self, what: str) -> bool:
        if what in self.fail:
            self.fail[what] -= 1
            if self.fail[what] == 0:
                del self.fail[what]
                return True
        return False

    # --- the `Device` of `_pinned`, without torch or vLLM ---------------------------------------

    def pin(self, size: int) -> bytearray:
        if self.pinned_bytes + size > self.host:
            raise MemoryError("no pinned host memory")
        block = bytearray(size)
        self.pinned[id(block)] = block
        return block

    def unpin(self, block: bytearray) -> None:
        assert not self._waiting, "given back under a copy"
        del self.pinned[id(block)]

    def unpin_address(self, address: int) -> None:
        assert not self._waiting, "given back under a copy"
        del self.pinned[address]

    def to_host(self, block: bytearray, offset: int, pointer: int, size: int) -> None:
        self.copy(_address(block) + offset, pointer, size)

    def to_device(self, pointer: int, block: bytearray, offset: int, size: int) -> None:
        self.copy(pointer, _address(block) + offset, size)

    def trim(self) -> None:
        pass


def _address(block: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


class FakeRuntime:
    """libcudart as ctypes shows it."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.last_error = 0
        """As CUDA keeps it: the next kernel launch of torch would fail of it."""
        self.functions: dict[str, Function] = {
            "cudaGetLastError": Function(self._told),
            "cudaMemcpyAsync": Function(self._memcpy),
            "cudaHostRegister": Function(self._register),
            "cudaHostUnregister": Function(self._unregister),
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return self.functions[name]
        except KeyError:
            raise AttributeError(name) from None

    def _memcpy(self, target: int, source: int, size: int, kind: int, stream: int) -> int:
        assert (kind, stream) == (4, 77)
        try:
            self._gpu.copy(target, source, size)
        except RuntimeError:
            return self._failed(719)
        return 0

    def _register(self, address: int, size: int, flags: int) -> int:
        if self._gpu.pinned_bytes + size > self._gpu.host:
            return self._failed(2)
        assert flags == 0
        self._gpu.pinned[address] = (ctypes.c_char * size).from_address(address)
        return 0

    def _failed(self, error: int) -> int:
        self.last_error = error
        return error

    def _told(self) -> int:
        error, self.last_error = self.last_error, 0
        return error

    def _unregister(self, address: int) -> int:
        self._gpu.unpin_address(address)
        return 0


class Function:
    """A foreign function: it wants its types told before it is called."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> int:
        assert self.restype is ctypes.c_int
        assert len(self.argtypes) == len(arguments)
        return int(self._call(*arguments))


def use_runtime(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> FakeRuntime:
    """Let torch look as if it had CUDA, on `gpu`."""
    import torch

    from maestro_backend.workers.vllm_plugin import _transfers

    runtime, load = FakeRuntime(gpu), ctypes.CDLL
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(
        _transfers.ctypes,
        "CDLL",
        lambda name: runtime if name == "libcudart.so.13" else load(name),
    )
    return runtime
