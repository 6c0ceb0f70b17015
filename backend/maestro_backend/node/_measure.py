"""Measures every second what the workers take, and draws the conclusions.

The ledger refuses what measurement forbids; what a settled worker takes beyond its promise is
learned as headroom; who follows the node's changes is told of each device.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping

from maestro_backend.scheduler import DeviceMeasured, WorkerState
from maestro_backend.workers import Worker

from ._learned import LearnedState
from ._ledger import Held, Ledger
from ._meter import Meter, Reading, Subject

log = logging.getLogger(__name__)

HOST = "host"
"""The name of the host budget among the devices."""

_EVERY_S = 1.0
_NEWS_BYTES = 1024**2
_SETTLED = (WorkerState.READY, WorkerState.SUSPENDED)


class Measurement:
    """What the workers of one node take. `told` is the last that was published of each device."""

    def __init__(
        self,
        workers: Mapping[str, Worker],
        meter: Meter,
        ledger: Ledger,
        learned: LearnedState,
        publish: Callable[[DeviceMeasured], None],
    ) -> None:
        self.told: dict[str, DeviceMeasured] = {}
        self._workers = workers
        self._meter = meter
        self._ledger = ledger
        self._learned = learned
        self._publish = publish
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Measure for ever."""
        while True:
            await self.once()
            await asyncio.sleep(_EVERY_S)

    async def once(self) -> None:
        """Measure all workers now."""
        try:
            await self._once()
        except Exception:  # the next second may be better; nothing else may end with this
            log.exception("the workers could not be measured")

    async def _once(self) -> None:
        async with self._turn:
            before = {model: worker.info.state for model, worker in self._workers.items()}
            claims = dict(self._ledger.held)
            reading = await asyncio.to_thread(self._read, claims)
            for model, claim in claims.items():
                if model in reading.models:
                    self._ledger.measured(model, claim, reading.models[model])
                    settled = before[model] in _SETTLED
                    if settled and self._workers[model].info.state is before[model]:
                        self._learn(model, claim, reading.models[model])
            for device, size in reading.outside.items():
                self._ledger.measured_outside(device, size)
            for measured in self._devices(reading):
                self._tell(measured)

    def _read(self, claims: Mapping[str, Held]) -> Reading:
        subjects = {}
        for model, worker in self._workers.items():
            if pids := tuple(worker.pids()):
                info, claim = worker.info, claims.get(model)
                claimed = claim.memory.total_bytes if claim else 0
                subjects[model] = Subject(info.device, pids, info.host_bytes, claimed)
        return self._meter.read(subjects)

    def _learn(self, model: str, claim: Held, size: int) -> None:
        """Its KV cache is taken as full: what it does not hold yet must not pass for headroom."""
        if self._ledger.held.get(model) == Held(claim.device, claim.memory, size):
            beside = size - claim.memory.weights_bytes - claim.memory.kv_bytes
            self._learned.residual_measured(model, beside)

    def _devices(self, reading: Reading) -> Iterator[DeviceMeasured]:
        for device, size in reading.devices.items():
            yield DeviceMeasured(device, size)
        copies = sum(worker.info.host_bytes for worker in self._workers.values())
        yield DeviceMeasured(HOST, copies)

    def _tell(self, now: DeviceMeasured) -> None:
        told = self.told.get(now.device)
        if told is None or abs(now.used_bytes - told.used_bytes) >= _NEWS_BYTES:
            self.told[now.device] = now
            self._publish(now)
