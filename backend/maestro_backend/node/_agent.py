"""The node agent: owns the workers of one host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from maestro_agents.protocol import BackendError
from maestro_backend.config import Config, NodeConfig
from maestro_backend.scheduler import DeviceMeasured, NodeInfo, Residency, WorkerInfo, WorkerState
from maestro_backend.workers import (
    DoesNotFitError,
    Worker,
    cache_dir,
    file_name,
    read_records,
    socket_path,
)

from ._adoption import TakeOver, remove_stale_sockets
from ._devices import Budgets, find_budgets, read_budgets, write_budgets
from ._ledger import Ledger
from ._lock import runtime_folder
from ._measure import Measurement
from ._meter import meter_of
from ._report import memory_report
from ._served import learned_state, served_models

log = logging.getLogger(__name__)

Change = WorkerInfo | DeviceMeasured

_ENDED = (WorkerState.STOPPED, WorkerState.FAILED)


class UnknownModelError(BackendError):
    """The configuration has no model of that name."""


class Agent:
    """The workers of one node.

    Make it while holding the lock of the state folder, then `take_over` what an earlier agent has
    left. `tied` workers die with the agent; the others live on under a lease when it leaves.

    Raises:
        ConfigError: a device or an engine is missing, or a model's settings do not fit its engine.
    """

    def __init__(self, config: Config, node: NodeConfig, *, tied: bool) -> None:
        self._node = node.name
        self._sockets = runtime_folder(config.state_dir)
        self._records = config.state_dir / "workers"
        self._tied = tied
        self._budgets = _budgets(node, config.state_dir, self._records)
        devices, host_bytes = self._budgets.devices, self._budgets.host_capacity_bytes
        served = served_models(config, node, devices)
        self._learned = learned_state(config, served)
        self._ledger = Ledger(devices, host_bytes, self._worker_infos)
        self._listeners: set[asyncio.Queue[Change | None]] = set()
        self._closed = False
        self._workers = {
            one.model.name: Worker(
                one.model,
                one.engine,
                node=node.name,
                device=one.device,
                address=socket_path(self._sockets, one.model.name),
                log=config.state_dir / "logs" / f"{file_name(one.model.name)}.log",
                cache=cache_dir(node.disk_cache),
                cache_limit=node.disk_cache_size,
                record=self._records / f"{file_name(one.model.name)}.json",
                account=self._ledger,
                learned=self._learned,
                publish=self._publish,
                tied=tied,
                lease_s=node.lease,
            )
            for one in served
        }
        self._measurement = Measurement(
            self._workers, meter_of(devices), self._ledger, self._learned, self._publish
        )
        self._arrival: TakeOver | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._turns = {
            device.device: asyncio.Semaphore()
            for device in self._budgets.devices
            if device.device != "cpu"
        }
        self._moved: dict[str, None] = {}  # in the order of their last moves

    async def take_over(self) -> None:
        """Adopt the live workers that an earlier agent has left, end what does not match, and begin
        to measure."""
        remove_stale_sockets(self._sockets, self._records)
        self._arrival = TakeOver(
            self._records, self._workers, self._ledger, adopting=not self._tied
        )
        await self._arrival.soon()
        self._measuring = asyncio.create_task(self._measurement.run(), name="measurement")

    def info(self) -> NodeInfo:
        """The node as it is now."""
        return NodeInfo(
            self._node,
            self._budgets.devices,
            self._worker_infos(),
            self._budgets.host_capacity_bytes,
        )

    def memory(self) -> dict[str, Any]:
        """The ledger beside the last measurements, in bytes."""
        return memory_report(self._ledger, self._measurement.told, self._learned)

    async def set_residency(
        self, model: str, residency: Residency, kv_limit_bytes: int | None = None
    ) -> None:
        """Bring `model` to `residency`, and its KV limit to `kv_limit_bytes`; returns when it is
        there. Starts and resumes on one GPU take turns: engines that size themselves at the same
        time misjudge each other's memory.

        Raises:
            UnknownModelError: there is no such model.
            UnsupportedError: its engine has no such tier.
            DoesNotFitError: the ledger refuses.
            MaestroError: the worker could not be brought there.
        """
        worker = await self._worker(model)
        try:
            await self._bring(worker, residency, kv_limit_bytes)
        except DoesNotFitError:
            if self._arrival is None or not await self._arrival.over():
                raise
            # Workers of an earlier agent have told by now what they really take.
            await self._bring(worker, residency, kv_limit_bytes)
        finally:
            self._moved.pop(model, None)
            self._moved[model] = None
            await self._measurement.once()  # what it has freed counts only when measured

    async def _bring(self, worker: Worker, residency: Residency, kv_limit: int | None) -> None:
        if residency is Residency.HOST and not self._closed:
            await self._make_host_room(worker)
        async with self._turn(worker, residency):
            if self._closed and residency is not Residency.DISK:
                raise BackendError("the node agent is stopping")
            await worker.bring(residency, kv_limit)

    async def set_kv_limit(self, model: str, limit_bytes: int) -> int:
        """Let the worker of `model` hold so many bytes of KV cache; those it holds now, which are
        more while calls still use them.

        Raises:
            MaestroError: unknown model, no such limit, or the ledger refuses.
        """
        held = await (await self._worker(model)).set_kv_limit(limit_bytes)
        await self._measurement.once()
        return held

    async def keep_prefix(self, model: str, call: str, seconds: float) -> int:
        """Hold the KV blocks of a call that ended; the bytes that are held so."""
        return await (await self._worker(model)).keep_prefix(call, seconds)

    async def drop_prefix(self, model: str, call: str) -> None:
        """Hold them no longer."""
        await (await self._worker(model)).drop_prefix(call)

    async def warm_prefix(
        self, model: str, call: str, messages: list[dict[str, Any]], seconds: float
    ) -> int:
        """Compute the prefix of a coming call and keep it; the bytes that are held so."""
        return await (await self._worker(model)).warm_prefix(call, messages, seconds)

    async def changes(self, heartbeat_s: float) -> AsyncIterator[Change | None]:
        """Every worker and measured device now, then each change; None after `heartbeat_s` seconds
        without one."""
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            for worker in self._workers.values():
                yield worker.info
            for measured in self._measurement.told.values():
                yield measured
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
        await self._end()
        await asyncio.gather(*(worker.stop() for worker in self._workers.values()))

    async def leave(self) -> None:
        """End all streams of changes; the workers live on under their lease."""
        await self._end()
        await asyncio.gather(*(worker.leave() for worker in self._workers.values()))

    async def _end(self) -> None:
        self._closed = True
        if self._arrival is not None:
            await self._arrival.give_up()
        if self._measuring is not None:
            self._measuring.cancel()
        for queue in self._listeners:
            queue.put_nowait(None)

    async def _worker(self, model: str) -> Worker:
        worker = self._workers.get(model)
        if worker is None:
            known = ", ".join(self._workers)
            raise UnknownModelError(f"there is no model {model!r} (models: {known})")
        if self._arrival is not None:
            await self._arrival.of(model)
        return worker

    def _worker_infos(self) -> tuple[WorkerInfo, ...]:
        return tuple(worker.info for worker in self._workers.values())

    def _turn(
        self, worker: Worker, residency: Residency
    ) -> AbstractAsyncContextManager[asyncio.Semaphore | None]:
        """What a move waits for that takes memory, or makes the engine size itself."""
        info = worker.info
        starts = residency is not Residency.DISK and info.state in _ENDED
        if starts or residency is Residency.DEVICE:
            return self._turns.get(info.device) or nullcontext()
        return nullcontext()

    async def _make_host_room(self, worker: Worker) -> None:
        """Drop the copies of models that are on their device, longest unmoved first."""
        model, need = worker.info.model, worker.info.host_copy_bytes or worker.info.weights_bytes
        spare = [
            other
            for other in (self._workers[name] for name in self._moved if name != model)
            if other.info.state is WorkerState.READY and other.info.host_bytes
        ]
        room = self._ledger.host_room(model)
        if room + sum(other.info.host_bytes for other in spare) < need:
            return  # in vain: the ledger will say so
        for other in spare:
            if self._ledger.host_room(model) >= need:
                return
            log.info("%s gives up its copy in host memory", other.info.model)
            with suppress(BackendError):  # it has just left the device itself
                await other.drop_host_copy()

    def _publish(self, change: Change) -> None:
        if isinstance(change, WorkerInfo):
            detail = f" ({change.detail})" * bool(change.detail)
            log.info("%s: %s%s", change.model, change.state.value, detail)
        for queue in self._listeners:
            queue.put_nowait(change)


def _budgets(node: NodeConfig, state_dir: Path, records: Path) -> Budgets:
    """As an earlier agent had them while workers of it live: what is free now is without theirs."""
    file = state_dir / "budgets.json"
    inherited = any(record.lives() for record in read_records(records).values())
    budgets = find_budgets(node, read_budgets(file) if inherited else None)
    write_budgets(file, budgets)
    return budgets
