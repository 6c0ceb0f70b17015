"""What tests of nodes ask of one, and of the processes behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psutil

from maestro_backend.config import Config
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import WorkerInfo

MakeConfig = Callable[..., Config]

_PATIENCE_S = 60.0


async def worker_of(node: LocalNode, model: str) -> WorkerInfo:
    """The worker of `model` now."""
    return next(w for w in (await node.info()).workers if w.model == model)


async def wait_for(node: LocalNode, holds: Callable[[WorkerInfo], bool]) -> WorkerInfo:
    """The first reported worker, now or later, for which `holds`."""
    async with asyncio.timeout(_PATIENCE_S):
        async for change in node.changes():
            if isinstance(change, WorkerInfo) and holds(change):
                return change
    raise AssertionError("the stream of changes ended")


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def survivors(processes: list[psutil.Process], timeout: float = 10.0) -> list[psutil.Process]:
    """Those still running after at most `timeout` seconds; zombies do not run."""
    _, alive = psutil.wait_procs(
        [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], timeout
    )
    return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
