"""Changes as they happen, to any number of listeners (server-sent state, the demo's live lines)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_BACKLOG = 1000


class Feed:
    """Publishes JSON-ready dicts. A listener that falls 1,000 behind misses the oldest."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[dict[str, Any] | None]] = set()

    def publish(self, change: dict[str, Any]) -> None:
        for queue in self._listeners:
            self._put(queue, change)

    @contextmanager
    def listening(self) -> Iterator[AsyncIterator[dict[str, Any]]]:
        """Every change from the start of the block until its end, or until the feed closes."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_BACKLOG)
        self._listeners.add(queue)
        try:
            yield _drain(queue)
        finally:
            self._listeners.discard(queue)

    def close(self) -> None:
        for queue in list(self._listeners):
            self._put(queue, None)

    @staticmethod
    def _put(queue: asyncio.Queue[dict[str, Any] | None], change: dict[str, Any] | None) -> None:
        if queue.full():
            with suppress(asyncio.QueueEmpty):
                queue.get_nowait()
        queue.put_nowait(change)


async def _drain(queue: asyncio.Queue[dict[str, Any] | None]) -> AsyncIterator[dict[str, Any]]:
    while (change := await queue.get()) is not None:
        yield change
