"""The stub's batch: `limit` requests run, the others wait by priority, then arrival."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count


class Slots:
    """At most `limit` holders at a time. A lower priority number is served sooner, as in vLLM."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()
        self.running = 0

    @property
    def waiting(self) -> int:
        return sum(not turn.done() for _, _, turn in self._queue)

    @asynccontextmanager
    async def taken(self, priority: int) -> AsyncIterator[None]:
        """Wait for a slot and hold it."""
        if self.running < self._limit:
            self.running += 1
        else:
            await self._turn(priority)
        try:
            yield
        finally:
            self._pass_on()

    async def _turn(self, priority: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (priority, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._pass_on()  # the slot was handed over in the moment of the cancellation
            raise

    def _pass_on(self) -> None:
        while self._queue:
            _, _, turn = heapq.heappop(self._queue)
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
