"""The node's account of bytes: what each worker was promised, and what it was measured to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from maestro_backend.scheduler import DeviceInfo, WorkerInfo
from maestro_backend.workers import DoesNotFitError, Memory

from ._refusal import device_refusal, host_refusal


@dataclass(frozen=True, slots=True)
class Held:
    """What one worker takes of its device. `measured_bytes` is None until it has been measured."""

    device: str
    memory: Memory
    measured_bytes: int | None = None

    @property
    def taken_bytes(self) -> int:
        """What counts against the device: the promise, or the measurement where that is more."""
        return max(self.memory.total_bytes, self.measured_bytes or 0)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a live process may take at most that has not told yet what it takes. Bytes."""

    device: str
    device_bytes: int
    host_bytes: int


class Ledger:
    """capacity >= weights + KV limits + residual, on each device and at any time; so the host.

    The `Account` of the workers: whatever is held is held, a move in flight as much as a settled
    worker. A claim grows only into what is free by promise *and* by measurement; it may always
    shrink. `workers` tells of the present workers, for the advice in a refusal.

    A live process that has not told yet what it takes is `expected` to take its most: nothing new
    gets that room. Its own claim, which tells of what is there already, is not held up by it.
    """

    def __init__(
        self,
        devices: Sequence[DeviceInfo],
        host_capacity_bytes: int = 0,
        workers: Callable[[], Iterable[WorkerInfo]] = tuple,
    ) -> None:
        self.capacity = {device.device: device.capacity_bytes for device in devices}
        self.host_capacity = host_capacity_bytes
        self._outside = dict.fromkeys(self.capacity, 0)
        self._workers = workers
        self._held: dict[str, Held] = {}
        self._host: dict[str, int] = {}
        self._expected: dict[str, Expected] = {}

    @property
    def held(self) -> Mapping[str, Held]:
        """What each model holds of its device now."""
        return self._held

    @property
    def host_held(self) -> Mapping[str, int]:
        """What each model holds of the host budget now, in bytes."""
        return self._host

    @property
    def expected(self) -> Mapping[str, Expected]:
        """Those that have not told yet what they take."""
        return self._expected

    def free_bytes(self, device: str) -> int:
        """What nobody was promised and nobody takes; below 0 where more is taken than there is."""
        return self._room(device, but_for="")

    def hold(self, model: str, device: str, memory: Memory) -> None:
        """Set what `model` holds of `device`.

        Raises:
            DoesNotFitError: the device has not that much free; nothing has changed.
        """
        old, new = self._held.get(model), Held(device, memory)
        if old is not None and (old.device, old.memory) == (device, memory):
            return
        before = old.memory.total_bytes if old and old.device == device else 0
        if memory.total_bytes > max(before, self._room(device, but_for=model)):
            raise DoesNotFitError(self._refusal(model, device, memory))
        self._held[model] = new  # not measured: what was, was before this change

    def hold_host(self, model: str, size: int) -> None:
        """Set what `model` holds of the host budget.

        Raises:
            DoesNotFitError: the host budget has not that much free; nothing has changed.
        """
        if size > max(self._host.get(model, 0), self.host_room(model)):
            taken = self._host_taken(but_for=model)
            raise DoesNotFitError(host_refusal(model, size, self.host_capacity, taken))
        if size:
            self._host[model] = size
        else:
            self._host.pop(model, None)

    def release(self, model: str) -> None:
        """Free all that `model` holds; may be repeated."""
        self._held.pop(model, None)
        self._host.pop(model, None)

    def host_room(self, model: str) -> int:
        """The most host bytes that `model` could hold now, what it holds already among them."""
        return max(0, self.host_capacity - sum(self._host_taken(but_for=model).values()))

    def expect(self, model: str, most: Expected) -> None:
        """Nobody else gets so much, whatever is free, until `known`."""
        self._expected[model] = most

    def known(self, model: str) -> None:
        """From now on what `model` holds is all that it takes."""
        self._expected.pop(model, None)

    def measured(self, model: str, since: Held, size: int) -> None:
        """The worker of `model` takes `size` bytes of its device.

        `since` is what it held when the measurement began: a claim that has changed meanwhile is
        not touched.
        """
        if self._held.get(model) == since:
            self._held[model] = Held(since.device, since.memory, size)

    def measured_outside(self, device: str, size: int) -> None:
        """Others than our workers take `size` bytes of what was this node's part of `device`."""
        self._outside[device] = size

    def _room(self, device: str, but_for: str) -> int:
        counted = sum(counted for _, counted in self._taken(device, but_for).values())
        return self.capacity[device] - self._outsiders(device, but_for) - counted

    def _outsiders(self, device: str, but_for: str) -> int:
        """What others take. Who is only expected is measured as one, and must not count twice."""
        if but_for in self._expected:
            return 0
        strangers = (
            most.device_bytes
            for model, most in self._expected.items()
            if most.device == device and model not in self._held
        )
        return max(0, self._outside[device] - sum(strangers))

    def _taken(self, device: str, but_for: str) -> dict[str, tuple[int, int]]:
        """What each other model was promised of the device, and what counts for it. Bytes."""
        taken = {
            model: (held.memory.total_bytes, held.taken_bytes)
            for model, held in self._held.items()
            if held.device == device
        }
        if but_for not in self._expected:
            for model, most in self._expected.items():
                if most.device == device:
                    promised, counted = taken.get(model, (most.device_bytes, 0))
                    taken[model] = (promised, max(most.device_bytes, counted))
        taken.pop(but_for, None)
        return taken

    def _host_taken(self, but_for: str) -> dict[str, int]:
        """What counts for each other model of the host budget."""
        taken = dict(self._host)
        if but_for not in self._expected:
            for model, most in self._expected.items():
                taken[model] = max(most.host_bytes, taken.get(model, 0))
        taken.pop(but_for, None)
        return taken

    def _refusal(self, model: str, device: str, memory: Memory) -> str:
        return device_refusal(
            model,
            memory,
            device=DeviceInfo(device, self.capacity[device]),
            room=self._room(device, but_for=model),
            outside=self._outsiders(device, but_for=model),
            taken=self._taken(device, but_for=model),
            workers={worker.model: worker for worker in self._workers()},
        )
