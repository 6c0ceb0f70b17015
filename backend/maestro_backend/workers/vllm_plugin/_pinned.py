"""A GPU model's weights off the device and on again, with a copy in pinned host memory.

vLLM's own sleep copies device to host every time and gives the copy up on every wake. Weights do
not change, so this copy outlives the wake: only the first suspend copies, later ones just unmap.
Written from the source of vLLM 0.26 and 0.30 (`device_allocator/cumem.py`); run on fakes, not yet
on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ._sleep import WEIGHTS


class HostBudgetError(MemoryError):
    """A copy of the weights would take more host memory than is granted, or than there is."""


class Allocation(Protocol):
    """vLLM's `AllocationData`: `handle` is (device, bytes, pointer, driver's handle)."""

    handle: tuple[int, int, int, Any]
    tag: str
    is_asleep: bool


class Device(Protocol):
    """What is done to a GPU. Copies may run on until `synchronize`."""

    def map(self, handle: Any) -> None:
        """Put memory behind an allocation's addresses; raises where there is none."""

    def unmap(self, handle: Any) -> None:
        """Give that memory back; the addresses stay reserved."""

    def pin(self, size: int) -> Any:
        """A pinned buffer of `size` bytes; raises MemoryError where it cannot be had."""

    def unpin(self, block: Any) -> None:
        """Give a pinned buffer back to the system."""

    def to_host(self, block: Any, offset: int, pointer: int, size: int) -> None:
        """Copy device memory into a buffer."""

    def to_device(self, pointer: int, block: Any, offset: int, size: int) -> None:
        """Copy a part of a buffer into device memory."""

    def synchronize(self) -> None:
        """Wait until the device has done everything asked of it."""

    def trim(self) -> None:
        """Give back what the framework has cached of the device's memory."""


class PinnedWeights:
    """The allocations of one vLLM allocator, and the pinned copy of those that are weights.

    `allocations` is live: vLLM adds and removes entries (`CuMemAllocator.pointer_to_data`).
    """

    def __init__(self, allocations: Mapping[int, Allocation], device: Device) -> None:
        self._allocations = allocations
        self._device = device
        self._budget: int | None = None
        self._block: Any = None
        self._copied: dict[int, tuple[Allocation, int]] = {}
        self._away: dict[int, Allocation] = {}

    @property
    def device_bytes(self) -> int:
        """What the weights take on the device, or took before they left."""
        return sum(data.handle[1] for data in self._tagged((WEIGHTS,)).values())

    @property
    def host_bytes(self) -> int:
        """What the copy holds now."""
        return sum(data.handle[1] for data, _ in self._copied.values())

    @property
    def away(self) -> bool:
        """Whether anything is off the device."""
        return any(self._allocations.get(p) is data for p, data in self._away.items())

    @property
    def weights_away(self) -> bool:
        """Whether weights are off the device."""
        return any(pointer in self._away for pointer in self._tagged((WEIGHTS,)))

    @property
    def copy_is_whole(self) -> bool:
        """Whether the copy is of just the allocations that the weights have now."""
        weights = self._tagged((WEIGHTS,))
        if not weights or weights.keys() != self._copied.keys():
            return False
        return all(self._copied[pointer][0] is data for pointer, data in weights.items())

    def set_budget(self, size: int | None) -> None:
        """The most host memory a copy may take; None: as much as there is.

        A copy that the weights on the device do not need is dropped where it is larger.

        Raises:
            HostBudgetError: the copy is larger, and the weights are nowhere else.
        """
        if size is not None and self.host_bytes > size:
            if self.weights_away:
                raise HostBudgetError(_over(self.host_bytes, size))
            self.drop_copy()
        self._budget = size

    def keep_copy(self) -> None:
        """Copy the weights to the host, unless that copy is there; the device is left as it is.

        Raises:
            HostBudgetError: over the budget, or the memory cannot be had.
            RuntimeError: the weights are not on the device.
        """
        if self.copy_is_whole:
            return
        weights = self._tagged((WEIGHTS,))
        if self.weights_away:
            raise RuntimeError("the weights are not on the device, so they cannot be copied")
        self.drop_copy()
        size = sum(data.handle[1] for data in weights.values())
        if self._budget is not None and size > self._budget:
            raise HostBudgetError(_over(size, self._budget))
        if size:
            self._copy(weights, size)

    def drop_copy(self) -> None:
        """Give the copy's memory back; weights that are away are then lost."""
        self._copied = {}
        if self._block is not None:
            self._device.unpin(self._block)
            self._block = None

    def unmap(self, tags: Iterable[str]) -> int:
        """Give the device memory of these tags back; the bytes that went.

        What is not in the copy is lost. On an error of the driver the rest stays mapped, and
        `remap` brings all of it back.
        """
        freed = 0
        self._device.synchronize()
        for pointer, data in self._tagged(tags).items():
            if data.is_asleep:
                continue
            self._away[pointer] = data
            self._device.unmap(data.handle)
            data.is_asleep = True
            freed += data.handle[1]
        self._device.trim()
        return freed

    def remap(self, tags: Iterable[str] | None = None) -> None:
        """Put these tags (None: all) back on the device, and the copy into the weights.

        All or nothing: whatever fails, what was mapped is unmapped again and stays away.
        """
        self._device.trim()
        wanted = self._tagged(tags)
        back = {p: data for p, data in self._away.items() if wanted.get(p) is data}
        try:
            for pointer, data in back.items():
                if data.is_asleep:
                    self._device.map(data.handle)
                    data.is_asleep = False
                self._fill(pointer, data)
            self._device.synchronize()
        except BaseException:
            self._roll_back(back)
            raise
        self._away = {
            p: data
            for p, data in self._away.items()
            if p not in back and self._allocations.get(p) is data
        }

    def trim(self) -> None:
        """Give back what the framework has cached of the device's memory."""
        self._device.trim()

    def read(self, pointer: int, size: int) -> bytes | None:
        """Bytes at a device address as the copy has them; None where it has none of them."""
        for start, (data, offset) in self._copied.items():
            if start <= pointer and pointer + size <= start + data.handle[1]:
                begin = offset + pointer - start
                return bytes(memoryview(self._block)[begin : begin + size])
        return None

    def _tagged(self, tags: Iterable[str] | None) -> dict[int, Allocation]:
        wanted = None if tags is None else set(tags)
        return {
            pointer: data
            for pointer, data in self._allocations.items()
            if wanted is None or data.tag in wanted
        }

    def _copy(self, weights: Mapping[int, Allocation], size: int) -> None:
        block = self._device.pin(size)
        copied: dict[int, tuple[Allocation, int]] = {}
        offset = 0
        try:
            self._device.synchronize()
            for pointer, data in weights.items():
                self._device.to_host(block, offset, pointer, data.handle[1])
                copied[pointer] = (data, offset)
                offset += data.handle[1]
            self._device.synchronize()
        except BaseException:
            self._device.synchronize()  # a copy may still be on its way into it
            self._device.unpin(block)
            raise
        self._block, self._copied = block, copied

    def _fill(self, pointer: int, data: Allocation) -> None:
        """Begin to copy it; meanwhile the next is mapped."""
        copied = self._copied.get(pointer)
        if copied is not None and copied[0] is data:
            self._device.to_device(pointer, self._block, copied[1], data.handle[1])

    def _roll_back(self, back: Mapping[int, Allocation]) -> None:
        self._device.synchronize()  # a copy may still be on its way
        for data in back.values():
            if not data.is_asleep:
                self._device.unmap(data.handle)
                data.is_asleep = True
        self._device.trim()


def _over(size: int, budget: int) -> str:
    return (
        f"a copy of the weights takes {size} bytes of host memory, {budget} are granted:"
        " raise the node's host_memory or park the model"
    )
