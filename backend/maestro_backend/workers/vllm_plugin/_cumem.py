"""Our sleep-mode backend inside vLLM. Loaded by vLLM's factory, in a GPU worker only.

Written from the source of vLLM 0.30; the parts that touch CUDA have not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Iterable
from typing import Any

import torch
from vllm.device_allocator import cumem
from vllm.device_allocator.sleep_mode_backend import CuMemBackend, SleepModeBackend
from vllm.logger import init_logger

from ._pinned import PinnedWeights
from ._sleep import WEIGHTS, missing_internals

log = init_logger("vllm.maestro")

_CHUNK = 64 * 1024**2
"""One copy command's bytes: short, so that a neighbour's small copies get in between."""

_MEMCPY_DEFAULT = 4  # the driver tells the direction from the addresses


class Cuda:
    """A GPU through vLLM's allocator and the CUDA runtime that it has loaded.

    Buffers are anonymous memory registered with CUDA, of exactly the size asked for: PyTorch's own
    pinned allocator rounds up to a power of two and never gives memory back.
    """

    def __init__(self) -> None:
        self._cudart = cumem.libcudart
        self._copy = self._function("cudaMemcpyAsync", "ppzip")
        self._register = self._function("cudaHostRegister", "pzi")
        self._unregister = self._function("cudaHostUnregister", "p")
        self._stream = torch.cuda.Stream()

    def map(self, handle: Any) -> None:
        cumem.create_and_map(handle)

    def unmap(self, handle: Any) -> None:
        cumem.unmap_and_release(handle)

    def pin(self, size: int) -> mmap.mmap:
        try:
            block = mmap.mmap(-1, size)  # shared: a fork must not move pages that CUDA knows
            self._check(self._register(_address(block), size, 0))
        except (OSError, RuntimeError) as error:
            raise MemoryError(f"no {size} bytes of pinned host memory: {error}") from error
        return block

    def unpin(self, block: mmap.mmap) -> None:
        self._check(self._unregister(_address(block)))
        block.close()

    def to_host(self, block: mmap.mmap, offset: int, pointer: int, size: int) -> None:
        self._copy_in_chunks(_address(block) + offset, pointer, size)

    def to_device(self, pointer: int, block: mmap.mmap, offset: int, size: int) -> None:
        self._copy_in_chunks(pointer, _address(block) + offset, size)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def trim(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def _copy_in_chunks(self, target: int, source: int, size: int) -> None:
        stream = self._stream.cuda_stream
        for start in range(0, size, _CHUNK):
            part = min(_CHUNK, size - start)
            self._check(self._copy(target + start, source + start, part, _MEMCPY_DEFAULT, stream))

    def _function(self, name: str, arguments: str) -> Any:
        kinds = {"p": ctypes.c_void_p, "z": ctypes.c_size_t, "i": ctypes.c_int}
        function = self._cudart.lib[name]  # not the attribute: that object is vLLM's too
        function.restype = ctypes.c_int
        function.argtypes = [kinds[kind] for kind in arguments]
        return function

    def _check(self, result: int) -> None:
        self._cudart.CUDART_CHECK(result)


def _address(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


class MaestroSleepBackend(SleepModeBackend):  # type: ignore[misc]  # vLLM is untyped here
    """Weights to a pinned copy (level 1) or nowhere (level 2), and back; KV stays mapped.

    After a level 2 the device memory comes back with anything in it: `reload_weights` must follow.
    Not yet run on a GPU.
    """

    keeps_kv = True

    def __init__(self) -> None:
        super().__init__()
        self._weights = PinnedWeights(
            cumem.CuMemAllocator.get_instance().pointer_to_data, self._device()
        )

    @staticmethod
    def _device() -> Any:
        return Cuda()

    @property
    def device_bytes(self) -> int:
        """What the weights take on the device, or took before they left."""
        return self._weights.device_bytes

    @property
    def weights_away(self) -> bool:
        """Whether weights are off the device."""
        return self._weights.weights_away

    @property
    def host_copy_bytes(self) -> int:
        """What a copy of the weights takes in host memory."""
        return self._weights.device_bytes

    @property
    def host_bytes(self) -> int:
        """What that copy holds now."""
        return self._weights.host_bytes

    def set_host_budget(self, size: int | None) -> None:
        """The most bytes that the copy may take in this process; None: no limit.

        Raises:
            HostBudgetError: the weights are in a copy larger than that, and nowhere else.
        """
        self._weights.set_budget(size)

    def keep_host_copy(self) -> None:
        """Make the copy now; see `PinnedWeights.keep_copy`."""
        self._weights.keep_copy()

    def drop_host_copy(self) -> None:
        """Give the copy up; weights that are away are parked from then on."""
        self._weights.drop_copy()

    def copied(self, pointer: int, size: int) -> bytes | None:
        """Bytes at a device address as the copy has them."""
        return self._weights.read(pointer, size)

    def suspend(self, level: int = 1, tags: Iterable[str] = (WEIGHTS,)) -> int:
        """Take `tags` off the device; the bytes freed. `kv_cache` loses what it holds.

        Raises:
            HostBudgetError: level 1, and no room for a copy; nothing was done.
        """
        tags = tuple(tags)
        if level == 1 and WEIGHTS in tags:
            self._weights.keep_copy()
        try:
            freed = self._weights.unmap(tags)
        finally:
            self._settle()
        if level > 1 and WEIGHTS in tags:
            self._weights.drop_copy()
        return freed

    def resume(self, tags: list[str] | None = None) -> None:
        """Bring `tags` (None: all) back. On any failure all of it is off the device as before."""
        self._state = "RESUMING"
        try:
            self._weights.remap(tags)
        finally:
            self._settle()

    def trim(self) -> None:
        """Give back what PyTorch has cached of the device's memory."""
        self._weights.trim()

    def _settle(self) -> None:
        self._state = "SUSPENDED" if self._weights.away else "RUNNING"

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True


class StockSleepBackend(CuMemBackend):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's own sleep, where its allocator is not the one that ours was written for.

    It throws the KV cache away on every sleep, which Maestro's moves between tiers do not allow
    for: such a worker has the tiers `device` and `disk` only.
    """

    keeps_kv = False
    weights_away = False
    device_bytes = 0
    host_copy_bytes = 0
    host_bytes = 0


def _chosen() -> Any:
    missing = missing_internals()
    if missing:
        log.warning("maestro: vLLM's own sleep is used, without tiers for weights: %s", missing)
        return StockSleepBackend
    return MaestroSleepBackend


SleepBackend = _chosen()
