"""Pinned host memory, and copies between it and a GPU. Needs torch; of vLLM nothing.

Through the CUDA runtime that torch has loaded: PyTorch's own pinned allocator rounds up to a power
of two and never gives memory back. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

_CHUNK = 64 * 1024**2
"""One copy command's bytes: short, so that a neighbour's small copies get in between."""

_MEMCPY_DEFAULT = 4  # the driver tells the direction from the addresses
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; Python has no name for it
_PAGE = 2 * 1024**2
_THREADS = 8
_KINDS = {"p": ctypes.c_void_p, "z": ctypes.c_size_t, "i": ctypes.c_int}
_FUNCTIONS = {
    "cudaGetLastError": "",
    "cudaMemcpyAsync": "ppzip",
    "cudaHostRegister": "pzi",
    "cudaHostUnregister": "p",
}


def cuda_runtime() -> dict[str, Callable[..., int]]:
    """The functions of the CUDA runtime that are used here, by name; each returns 0 or an error.

    Raises:
        OSError: torch has no CUDA runtime, or one without them.
    """
    if torch.version.cuda is None:
        raise OSError("torch was built without CUDA")
    major = torch.version.cuda.partition(".")[0]
    return _functions(ctypes.CDLL(f"libcudart.so.{major}"))


def _functions(runtime: Any) -> dict[str, Callable[..., int]]:
    found: dict[str, Callable[..., int]] = {}
    for name, arguments in _FUNCTIONS.items():
        try:
            function = getattr(runtime, name)
        except AttributeError:
            raise OSError(f"the CUDA runtime has no {name}") from None
        function.restype = ctypes.c_int
        function.argtypes = [_KINDS[kind] for kind in arguments]
        found[name] = function
    return found


class Transfers:
    """Copies on a stream of their own, in chunks: they overlap with what the GPU computes."""

    def __init__(self) -> None:
        self._runtime: Mapping[str, Callable[..., int]] = cuda_runtime()
        self._stream = torch.cuda.Stream()

    def pin(self, size: int) -> mmap.mmap:
        """A pinned buffer of exactly `size` bytes.

        Raises:
            MemoryError: the system or the driver has not so much.
        """
        block = None
        try:
            # Huge pages: pinning walks every page. A private mapping gets them, a shared one not.
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            block.madvise(mmap.MADV_DONTFORK)  # a fork must not move pages that CUDA knows
            with suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
            _populate(_address(block), size)
            self._call("cudaHostRegister", _address(block), size, 0)
        except (OSError, RuntimeError) as error:
            if block is not None:
                block.close()
            raise MemoryError(f"no {size} bytes of pinned host memory: {error}") from error
        return block

    def unpin(self, block: mmap.mmap) -> None:
        """Give a buffer back to the system."""
        self._call("cudaHostUnregister", _address(block))
        block.close()

    def to_host(self, block: mmap.mmap, offset: int, pointer: int, size: int) -> None:
        """Begin a copy of device memory into a buffer; `synchronize` ends it."""
        self._copy(_address(block) + offset, pointer, size)

    def to_device(self, pointer: int, block: mmap.mmap, offset: int, size: int) -> None:
        """Begin a copy of a part of a buffer into device memory; `synchronize` ends it."""
        self._copy(pointer, _address(block) + offset, size)

    def synchronize(self) -> None:
        """Wait until the device has done everything asked of it."""
        torch.cuda.synchronize()

    def _copy(self, target: int, source: int, size: int) -> None:
        stream = self._stream.cuda_stream
        for start in range(0, size, _CHUNK):
            part = min(_CHUNK, size - start)
            here, there = target + start, source + start
            self._call("cudaMemcpyAsync", here, there, part, _MEMCPY_DEFAULT, stream)

    def _call(self, name: str, *arguments: Any) -> None:
        result = self._runtime[name](*arguments)
        if result:
            self._runtime["cudaGetLastError"]()  # or the next kernel of torch's fails of it
            raise RuntimeError(f"{name} failed with CUDA error {result}")


def _address(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def _populate(address: int, size: int) -> None:
    """Have the memory there before it is pinned, by several threads: one zeroes too slowly.

    Where the kernel cannot (before Linux 5.14), pinning does it, by one.
    """
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pages = -(-size // _PAGE)
    threads = max(1, min(_THREADS, os.cpu_count() or 1, pages))
    share = -(-pages // threads) * _PAGE

    def populate(start: int) -> None:
        advise(address + start, min(share, size - start), _POPULATE_WRITE)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(populate, range(0, size, share)))
