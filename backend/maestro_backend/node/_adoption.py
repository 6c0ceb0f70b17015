"""What an agent does at its start with the workers of an agent that is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from maestro_agents.protocol import MaestroError
from maestro_backend.workers import (
    Worker,
    WorkerRecord,
    end_stray,
    read_records,
)

from ._ledger import Expected, Ledger

log = logging.getLogger(__name__)

_SOON_S = 3.0
_LIMIT_S = 60.0


class TakeOver:
    """Adopts each recorded worker that matches the present configuration, and ends the others.

    Until a process has told what it takes, or has ended, it counts as all that it may take.
    Without `adopting` all are ended: a tied agent cannot tie what it did not start.
    """

    def __init__(
        self, records: Path, workers: Mapping[str, Worker], ledger: Ledger, *, adopting: bool
    ) -> None:
        self._workers = workers
        self._ledger = ledger
        self._adopting = adopting
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._settling: list[asyncio.Task[None]] = []
        for file, record in read_records(records).items():
            if record.lives():
                self._expect(record)
            self._tasks[record.model] = asyncio.create_task(self._take(file, record))

    async def soon(self) -> None:
        """Wait until it is done, but for workers that are slow to answer: in the middle of a long
        move, or hung."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=_SOON_S)

    async def of(self, model: str) -> None:
        """Wait until it is done for `model`: nothing else may happen to that worker before."""
        if task := self._tasks.get(model):
            await asyncio.wait((task,))

    async def give_up(self) -> None:
        """Leave those that are still slow to whoever comes next; their records stay."""
        tasks = self._all_tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def over(self) -> bool:
        """Wait, a minute at most, until nothing is expected any more; False where nothing was."""
        if not self._ledger.expected:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(_LIMIT_S):
                while under_way := [t for t in self._all_tasks() if not t.done()]:
                    await asyncio.wait(under_way)
        return True

    def _all_tasks(self) -> list[asyncio.Task[None]]:
        return [*self._tasks.values(), *self._settling]

    def _expect(self, record: WorkerRecord) -> None:
        """By its record, or by what is known of its model, whatever is more."""
        device, most, host = record.device, record.most_bytes, record.host_bytes
        if worker := self._workers.get(record.model):
            info = worker.info
            device = device or info.device
            most, host = max(most, info.most_bytes), max(host, info.host_copy_bytes)
        self._ledger.expect(record.model, Expected(device, most, host))

    async def _take(self, file: Path, record: WorkerRecord) -> None:
        worker = self._workers.get(record.model)
        mine = worker if self._adopting and record.lives() else None
        if mine is not None and await _adopted(mine, record):
            self._settling.append(asyncio.create_task(self._settle(mine)))
            return
        try:
            if record.lives():
                log.warning("ending %s (pid %d): it cannot be adopted", record.model, record.pid)
            await end_stray(record)
            file.unlink(missing_ok=True)
        finally:
            self._ledger.known(record.model)

    async def _settle(self, worker: Worker) -> None:
        """A move of the earlier agent's may be under way, and tells what it takes when it ends."""

        def known() -> None:
            self._ledger.known(worker.info.model)

        try:
            with suppress(MaestroError):  # it has ended, and tells so itself
                await worker.settled(known)
        finally:
            known()


async def _adopted(worker: Worker, record: WorkerRecord) -> bool:
    try:
        async with asyncio.timeout(_LIMIT_S):
            return await worker.adopt(record)
    except TimeoutError:
        return False
    except Exception:  # an engine that answers nonsense is no worker of ours
        log.exception("%s (pid %d) could not be adopted", record.model, record.pid)
        return False


def remove_stale_sockets(folder: Path, records: Path) -> None:
    """Remove the sockets in `folder` that no recorded worker listens on."""
    live = {record.address for record in read_records(records).values() if record.lives()}
    for path in folder.glob("*.sock"):
        if str(path) not in live:
            path.unlink(missing_ok=True)
