"""The worker half of elastic KV on a CPU: memory of blocks that may not be used goes back.

The cache is one tensor per layer; a block of a layer is contiguous there. `madvise` gives its pages
back to the kernel; the block reads as zeros and takes memory again once it is written.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)


def total_bytes(caches: list[Any]) -> int:
    """Bytes of the whole cache."""
    return sum(size for _, size in _buffers(caches))


def is_releasable(caches: list[Any]) -> bool:
    """Whether blocks are contiguous memory of this process."""
    flat = list(_flat(caches))
    on_cpu = all(cache.device.type == "cpu" for cache in flat)
    return bool(flat) and on_cpu and all(cache[0].is_contiguous() for cache in flat)


def release(caches: list[Any], blocks: list[int]) -> None:
    """Give the pages of `blocks` back to the kernel, in every layer.

    Raises:
        OSError: the kernel refused.
    """
    for cache in _flat(caches):
        stride, start = _stride_bytes(cache), cache.data_ptr()
        for first, last in _runs(sorted(blocks)):
            _advise(start + first * stride, start + (last + 1) * stride)


def resident_bytes(caches: list[Any]) -> int:
    """Bytes of the cache that take memory now, by the kernel's count (`mincore`); 0 on a GPU."""
    if any(cache.device.type != "cpu" for cache in _flat(caches)):
        return 0
    return sum(_resident(start, size) for start, size in _buffers(caches))


def _buffers(caches: list[Any]) -> Iterator[tuple[int, int]]:
    """Address and bytes of the memory behind the layers; layers may share it."""
    storages = (cache.untyped_storage() for cache in _flat(caches))
    yield from {storage.data_ptr(): storage.nbytes() for storage in storages}.items()


def _flat(caches: list[Any]) -> Iterator[Any]:
    """The tensors; a layer of a hybrid model has several (vLLM 0.26)."""
    for cache in caches:
        yield from cache if isinstance(cache, list | tuple) else (cache,)


def _resident(start: int, size: int) -> int:
    page = mmap.PAGESIZE
    first, pages = start // page * page, -(-(start % page + size) // page)
    told = (ctypes.c_ubyte * pages)()
    if _libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * page), told) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return (pages - bytes(told).count(0)) * page


def _stride_bytes(cache: Any) -> int:
    return int(cache.stride(0) * cache.element_size())


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring blocks as (first, last)."""
    if not blocks:
        return
    first = blocks[0]
    for block, following in pairwise(blocks):
        if following != block + 1:
            yield first, block
            first = following
    yield first, blocks[-1]


def _advise(start: int, end: int) -> None:
    """Only whole pages: a page on the edge holds a neighbour's bytes too."""
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, end // page * page
    if last <= first:
        return
    address, size = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
    if _libc.madvise(address, size, mmap.MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
