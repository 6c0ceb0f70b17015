"""What an agent does at its start with the workers of an agent that is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from maestro_backend.workers import (
    DoesNotFitError,
    Memory,
    Worker,
    WorkerRecord,
    end_stray,
    read_records,
)

from ._ledger import Ledger

log = logging.getLogger(__name__)

_SOON_S = 3.0
_LIMIT_S = 60.0


class TakeOver:
    """Adopts each recorded worker that matches the present configuration, and ends the others.

    Without `adopting` all are ended: a tied agent cannot tie what it did not start.
    """

    def __init__(
        self, records: Path, workers: Mapping[str, Worker], ledger: Ledger, *, adopting: bool
    ) -> None:
        self._workers = workers
        self._ledger = ledger
        self._adopting = adopting
        self._tasks = {
            record.model: asyncio.create_task(self._take(file, record))
            for file, record in read_records(records).items()
        }

    async def soon(self) -> None:
        """Wait until it is done, but for workers that are slow to answer: in the middle of a long
        move, or hung. They count as all that they may take."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=_SOON_S)
        for model, task in self._tasks.items():
            if not task.done() and model in self._workers:
                self._count(self._workers[model])

    async def of(self, model: str) -> None:
        """Wait until it is done for `model`: nothing else may happen to that worker before."""
        if task := self._tasks.get(model):
            await asyncio.wait((task,))

    async def give_up(self) -> None:
        """Leave those that are still slow to whoever comes next; their records stay."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _take(self, file: Path, record: WorkerRecord) -> None:
        worker = self._workers.get(record.model)
        mine = worker if self._adopting and record.lives() else None
        if mine is not None and await _adopted(mine, record):
            return
        if record.lives():
            log.warning("ending %s (pid %d): it cannot be adopted", record.model, record.pid)
        await end_stray(record)
        self._ledger.release(record.model)
        file.unlink(missing_ok=True)

    def _count(self, worker: Worker) -> None:
        """The most that it may take, until it is known how much it takes."""
        info = worker.info
        most = Memory(info.weights_bytes, info.kv_max_bytes, info.residual_bytes)
        with suppress(DoesNotFitError):
            self._ledger.hold(info.model, info.device, most)


async def _adopted(worker: Worker, record: WorkerRecord) -> bool:
    try:
        async with asyncio.timeout(_LIMIT_S):
            return await worker.adopt(record)
    except TimeoutError:
        return False


def remove_stale_sockets(folder: Path, records: Path) -> None:
    """Remove the sockets in `folder` that no recorded worker listens on."""
    live = {record.address for record in read_records(records).values() if record.lives()}
    for path in folder.glob("*.sock"):
        if str(path) not in live:
            path.unlink(missing_ok=True)
