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
    def promise(self, model: str, memory: Memory, count: int = 1) -> Iterator[tuple[str, ...]]:
        """Hold `memory` for `model` on each of `count` devices, the emptiest ones, until the exit.

        Raises:
            DoesNotFitError: fewer than `count` devices have that much free.
        """
        emptiest = sorted(self._capacity, key=self.free_bytes, reverse=True)
        fitting = [d for d in emptiest if self.free_bytes(d) >= memory.total_bytes][:count]
        if len(fitting) < count:
            raise DoesNotFitError(self._refusal(model, memory, emptiest[0]))
        for device in fitting:
            self._held[device][model] = memory.total_bytes
        try:
            yield tuple(fitting)
        finally:
            for device in fitting:
                del self._held[device][model]

    def _refusal(self, model: str, memory: Memory, device: str) -> str:
        held = ", ".join(f"{name} {_gib(size)}" for name, size in self._held[device].items())
        return (
            f"{model} does not fit: it needs {_gib(memory.total_bytes)}"
            f" (weights {_gib(memory.weights_bytes)}, KV {_gib(memory.kv_bytes)},"
            f" residual {_gib(memory.residual_bytes)}); {device} has"
            f" {_gib(self.free_bytes(device))} free of {_gib(self._capacity[device])}"
            f" (held: {held or 'nothing'}). Lower its kv_memory, stop another model, or raise"
            " the node's memory"
        )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
