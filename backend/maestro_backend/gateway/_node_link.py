"""Between the scheduler and a node: its changes come in, commands go out and are answered."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from maestro_agents.protocol import BackendError, MaestroError, UnsupportedError
from maestro_backend import scheduler as core
from maestro_backend.node import NodeHandle, NodeLostError

if TYPE_CHECKING:
    from ._shell import Shell

_log = logging.getLogger("maestro.gateway")

_REJOIN_S = 1.0


class NodeLink:
    """Follows one node for the shell and carries out what concerns its workers."""

    def __init__(self, shell: Shell, node: NodeHandle) -> None:
        self._shell = shell
        self._node = node
        self._joins = 0

    async def follow(self) -> None:
        """Join the node, follow its changes; after a loss, join again."""
        while True:
            try:
                info = await self._node.join()
            except Exception as error:  # whatever it is, the next try may work
                _log.error("no node: %s", error)
                await asyncio.sleep(_REJOIN_S)
                continue
            self._joins += 1
            self._shell.handle(core.NodeJoined(info, self._shell.preload))
            _warn_of_misfits(info)
            try:
                async for change in self._node.changes():
                    self._changed(info.node, change)
            except Exception as error:
                _log.warning("lost node %s, joining again: %s", info.node, error)
            self._shell.handle(core.NodeLost(info.node))

    async def carry_out(self, command: core.Command) -> None:
        """Do it, and tell the scheduler how it went: first the worker as it is then."""
        joins = self._joins
        try:
            await self._ask(command)
            await self._refresh(command)
        except Exception as error:
            if isinstance(error, NodeLostError) and not await self._still_there(joins):
                return  # NodeLost clears what was under way: the worker itself did not fail
            if not isinstance(error, MaestroError):
                _log.exception("could not carry out %s", command)
            with suppress(Exception):
                await self._refresh(command)
            self._shell.handle(core.CommandFailed(command.id, str(error)))
        else:
            self._shell.handle(core.CommandApplied(command.id))

    async def _still_there(self, joins: int) -> bool:
        """Whether only one request has broken: the node has not been joined again, and answers."""
        with suppress(Exception):
            await self._node.info()
            return self._joins == joins
        return False

    async def _ask(self, command: core.Command) -> None:
        node = self._node
        match command:
            case core.SetResidency(model=model):
                await node.set_residency(model, command.residency, command.kv_limit_bytes)
            case core.SetKvLimit(worker=worker):
                await node.set_kv_limit(self._model(worker), command.limit_bytes)
            case core.KeepPrefix(worker=worker):
                await node.keep_prefix(self._model(worker), command.call, command.seconds)
            case core.DropPrefix(worker=worker):
                await node.drop_prefix(self._model(worker), command.call)
            case _:
                raise UnsupportedError(f"{type(command).__name__} is not supported")

    def _model(self, worker: str) -> str:
        info = self._shell.scheduler.workers.get(worker)
        if info is None:
            raise BackendError(f"the worker {worker} is gone")
        return info.model

    async def _refresh(self, command: core.Command) -> None:
        """Read the worker's state now: its change may still be on the way."""
        match command:
            case core.SetResidency(model=model):
                pass
            case core.SetKvLimit(worker=worker):
                model = self._model(worker)
            case _:
                return
        for info in (await self._node.info()).workers:
            if info.model == model:
                self._worker_changed(info)

    def _changed(self, node: str, change: core.WorkerInfo | core.DeviceMeasured) -> None:
        if isinstance(change, core.WorkerInfo):
            self._worker_changed(change)
            return
        device = f"{node}/{change.device}"
        if self._shell.scheduler.ledger.measured.get(device) != change.used_bytes:
            self._shell.handle(core.MemoryMeasured(device, change.used_bytes))

    def _worker_changed(self, info: core.WorkerInfo) -> None:
        if self._shell.scheduler.workers.get(info.worker) == info:
            return
        self._shell.handle(core.WorkerChanged(info))
        self._shell.feed.publish({"type": "worker", **asdict(info)})


def _warn_of_misfits(node: core.NodeInfo) -> None:
    """Say at once which models can never run here, and why."""
    room = max((d.capacity_bytes for d in node.devices), default=0)
    for worker in node.workers:
        floor = worker.kv_floor_bytes if worker.elastic else 0
        kv = floor or max(worker.kv_max_bytes, worker.kv_limit_bytes)
        need = worker.weights_bytes + kv + worker.residual_bytes
        if need > room:
            _log.error(
                "%s cannot run here: it needs %.1f GiB (weights %.1f, KV cache %.1f), "
                "a device has %.1f: give it less kv_memory, or the node more memory",
                worker.model,
                *(size / 2**30 for size in (need, worker.weights_bytes, kv, room)),
            )
