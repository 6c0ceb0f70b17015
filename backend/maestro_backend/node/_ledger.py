"""The node's account of promised bytes, device by device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from maestro_backend.scheduler import DeviceInfo
from maestro_backend.workers import DoesNotFitError, Memory

_GIB = 1024**3


class Ledger:
    """capacity >= weights + KV limits + residual, on each device, at any time."""

    def __init__(self, devices: Sequence[DeviceInfo]) -> None:
        self._capacity = {device.device: device.capacity_bytes for device in devices}
        self._held: dict[str, dict[str, int]] = {device: {} for device in self._capacity}

    def free_bytes(self, device: str) -> int:
        """What is not promised to anybody."""
        return self._capacity[device] - sum(self._held[device].values())

    @contextmanager
    def promise(self, model: str, memory: Memory, device: str) -> Iterator[None]:
        """Hold `memory` for `model` on `device` until the exit.

        Raises:
            DoesNotFitError: the device has not that much free.
        """
        if memory.total_bytes > self.free_bytes(device):
            raise DoesNotFitError(self._refusal(model, memory, device))
        self._held[device][model] = memory.total_bytes
        try:
            yield
        finally:
            del self._held[device][model]

    def _refusal(self, model: str, memory: Memory, device: str) -> str:
        held = ", ".join(f"{name} {_gib(size)}" for name, size in self._held[device].items())
        return (
            f"does not fit yet: {model} needs {_gib(memory.total_bytes)}"
            f" (weights {_gib(memory.weights_bytes)}, KV {_gib(memory.kv_bytes)},"
            f" residual {_gib(memory.residual_bytes)}); {device} has"
            f" {_gib(self.free_bytes(device))} free of {_gib(self._capacity[device])}"
            f" (held: {held or 'nothing'}). Lower its kv_memory, stop another model, or raise"
            " the node's memory"
        )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
