"""The node agent: owns the workers of one host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from maestro_agents.protocol import BackendError, UnsupportedError
from maestro_backend.config import Config, NodeConfig
from maestro_backend.scheduler import NodeInfo, Residency, WorkerInfo
from maestro_backend.workers import (
    Checkpoint,
    ServedModel,
    Worker,
    cache_dir,
    choose_engine,
    file_name,
    known_checkpoint,
    socket_path,
)

from ._devices import find_devices
from ._ledger import Ledger

log = logging.getLogger(__name__)


class UnknownModelError(BackendError):
    """The configuration has no model of that name."""


class Agent:
    """The workers of one node, all stopped at first; `sockets` is the folder of their sockets.

    Raises:
        ConfigError: a device or an engine is missing, or a model's settings do not fit its engine.
    """

    def __init__(self, config: Config, node: NodeConfig, sockets: Path) -> None:
        self._node = node.name
        self._devices = find_devices(node)
        self._listeners: set[asyncio.Queue[WorkerInfo | None]] = set()
        self._closed = False
        self._workers = {w.info.model: w for w in self._make_workers(config, node, sockets)}
        # Engines that start together on a GPU misjudge each other's memory.
        on_cpu = [device.device for device in self._devices] == ["cpu"]
        self._turns = asyncio.Semaphore(len(self._workers) if on_cpu else 1)

    def _make_workers(self, config: Config, node: NodeConfig, sockets: Path) -> Iterator[Worker]:
        """Each on the device that the workers before it leave the most room on."""
        ledger = Ledger(self._devices)
        cache = cache_dir(node.disk_cache)
        room = {device.device: device.capacity_bytes for device in self._devices}
        for name, settings in config.models.items():
            engine = choose_engine(name, settings, list(room))
            known = known_checkpoint(settings.source, cache) if engine.needs_checkpoint else None
            model = ServedModel(name, settings, known or Checkpoint(settings.source))
            device = max(room, key=lambda device: room[device])
            room[device] -= engine.memory(model).total_bytes
            yield Worker(
                model,
                engine,
                node=node.name,
                device=device,
                address=socket_path(sockets, name),
                log=config.state_dir / "logs" / f"{file_name(name)}.log",
                cache=cache,
                promise=ledger.promise,
                publish=self._publish,
            )

    def info(self) -> NodeInfo:
        """The node as it is now."""
        return NodeInfo(self._node, self._devices, tuple(w.info for w in self._workers.values()))

    async def set_residency(self, model: str, residency: Residency) -> None:
        """Bring `model` to `device` (start it) or `disk` (stop it); returns when it is there.

        Raises:
            UnknownModelError: there is no such model.
            UnsupportedError: a tier that this version lacks.
            DoesNotFitError: the ledger refuses.
            MaestroError: the worker could not be started.
        """
        worker = self._workers.get(model)
        if worker is None:
            known = ", ".join(self._workers)
            raise UnknownModelError(f"there is no model {model!r} (models: {known})")
        if residency is Residency.DISK:
            await worker.stop()
        elif residency is not Residency.DEVICE:
            raise UnsupportedError(
                f"residency {residency.value!r} arrives with residency tiers; use device or disk"
            )
        elif self._closed:
            raise BackendError("the node agent is stopping")
        else:
            async with self._turns:
                await worker.start()

    async def changes(self, heartbeat_s: float) -> AsyncIterator[WorkerInfo | None]:
        """Every worker now, then each change; None after `heartbeat_s` seconds without one."""
        queue: asyncio.Queue[WorkerInfo | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            for worker in self._workers.values():
                yield worker.info
            while not (self._closed and queue.empty()):
                try:
                    change = await asyncio.wait_for(queue.get(), heartbeat_s)
                except TimeoutError:
                    change = None
                yield change
        finally:
            self._listeners.discard(queue)

    async def close(self) -> None:
        """Stop all workers and end all streams of changes."""
        self._closed = True
        await asyncio.gather(*(worker.stop() for worker in self._workers.values()))
        for queue in self._listeners:
            queue.put_nowait(None)

    def _publish(self, info: WorkerInfo) -> None:
        log.info("%s: %s%s", info.model, info.state.value, f" ({info.detail})" * bool(info.detail))
        for queue in self._listeners:
            queue.put_nowait(info)
