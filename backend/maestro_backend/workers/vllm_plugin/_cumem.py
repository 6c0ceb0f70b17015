"""Our sleep-mode backend inside vLLM. Loaded by vLLM's factory, in a GPU worker only.

Written from the source of vLLM 0.26 and 0.30; the parts that touch CUDA have not yet run on a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from vllm.device_allocator import cumem
from vllm.device_allocator.sleep_mode_backend import CuMemBackend, SleepModeBackend
from vllm.logger import init_logger

from ._pinned import PinnedWeights
from ._sleep import WEIGHTS, missing_internals
from ._transfers import Transfers

log = init_logger("vllm.maestro")


class Cuda(Transfers):
    """A GPU through vLLM's allocator and the CUDA runtime."""

    def map(self, handle: Any) -> None:
        cumem.create_and_map(handle)

    def unmap(self, handle: Any) -> None:
        cumem.unmap_and_release(handle)

    def trim(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


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
