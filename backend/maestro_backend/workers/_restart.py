"""What to make of an engine that ended: why it did, and whether another try may help."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from maestro_agents.protocol import BackendError

from ._process import EngineProcess
from ._telling import mend, telling_line

_LAST_WORDS_S = 2.0
_USAGE_ERROR = 2

T = TypeVar("T")


class EngineEndedError(BackendError):
    """The process is gone, or no longer of any use; the message says why."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds before the n-th restart: `first`, doubling up to `cap`.

    After `tries` failures in a row within `quick` seconds of being ready the worker gives up.
    """

    first: float = 0.5
    cap: float = 30.0
    tries: int = 3
    quick: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.cap, self.first * 2.0 ** (failures - 1))


@dataclass(frozen=True, slots=True)
class Failure:
    """`hopeless`: another try would fail in the same way."""

    reason: str
    hopeless: bool


async def failure(process: EngineProcess, reason: str) -> Failure:
    """What its last words make of `reason`."""
    await process.exits_within(_LAST_WORDS_S)
    status = process.returncode
    output = process.output()
    if status is None or (status < 0 and not mend(output)):
        told = reason if status is None else f"the engine was killed by signal {-status}"
        return Failure(told, hopeless=False)
    told = telling_line(output) or f"{reason} with exit status {status}"
    return Failure(told, hopeless=status == _USAGE_ERROR or bool(mend(output)))


async def while_running(process: EngineProcess, work: Awaitable[T]) -> T:
    """The result of `work`, unless the process ends first: then it is cancelled.

    Raises:
        EngineEndedError: the process ended, or did not do the work in time.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait((task, process.ended), return_when=asyncio.FIRST_COMPLETED)
        if process.ended.done():
            raise EngineEndedError("the engine ended")
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def uninterrupted(work: Awaitable[T]) -> T:
    """The result of `work`, done to its end; a cancellation meanwhile is raised after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
