"""Tells the backend what no request carries: workflows and run events, in the background.

Whoever has something to tell never waits, not even for a lock: it may be an event loop.
"""

from __future__ import annotations

import _thread
import atexit
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Final, NamedTuple, TypeVar

from ._link import Link, Refused, Unreached
from ._log import fail_open, logger, warn_once
from ._settings import Settings, settings
from .protocol import MAX_EVENTS, RunEvent, Workflow

MAX_QUEUED: Final = 10_000
"""Most events that wait; beyond it the oldest is dropped and counted."""

MAX_AGE_S: Final = 30.0
"""How long an event waits for a backend that cannot be reached."""

LINGER_S: Final = 0.02
"""How long the first event waits for others: the events of a short run go in one POST."""

BACK_OFF_S: Final = (0.1, 5.0)
"""Shortest and longest pause before a backend that was not reached is tried again."""

EXIT_FLUSH_S: Final = 1.0


class _Item(NamedTuple):
    backend: Settings
    workflow: Workflow
    since: float
    run: str | None = None
    event: RunEvent | None = None


class _Flush(NamedTuple):
    backend: Settings
    done: SimpleQueue[bool]


class ControlClient:
    """Sends in order from one background thread, and never raises. A dead backend has no effect.

    `dropped` counts events that were lost: the queue was full, or the backend did not take them.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)
        atexit.register(self.flush, EXIT_FLUSH_S)

    @fail_open
    def register(self, workflow: Workflow) -> None:
        """Let the backend know `workflow` before its first call."""
        backend = settings()
        if backend.active:
            self._put(_Item(backend, workflow, time.monotonic()))

    @fail_open
    def post(
        self,
        workflow: Workflow,
        run: str,
        events: Iterable[RunEvent],
        backend: Settings | None = None,
    ) -> None:
        """Send the events of one run, in order, to `backend`: what the settings said when the run
        began, or say now."""
        backend = backend or settings()
        if backend.active:
            now = time.monotonic()
            for event in events:
                self._put(_Item(backend, workflow, now, run, event))

    @fail_open
    def flush(self, timeout_s: float) -> bool:
        """Try at once to send everything, and wait for that, at most `timeout_s` seconds.

        Returns:
            Whether nothing is left for the backend that the settings name now.
        """
        if not self._started.locked():
            return True
        flush = _Flush(settings(), SimpleQueue())
        self._flushes.put(flush)
        self._wake.put(None)
        try:
            return flush.done.get(timeout=timeout_s)
        except Empty:
            return False

    def _start_anew(self) -> None:
        """At first, and in a forked child: threads are gone, and the queue is the parent's."""
        self._items: deque[_Item] = deque(maxlen=MAX_QUEUED)
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._flushes: SimpleQueue[_Flush] = SimpleQueue()
        self._started = Lock()

    def _put(self, item: _Item) -> None:
        if len(self._items) == MAX_QUEUED:
            self.dropped += 1
        self._items.append(item)
        if self._wake.empty():
            self._wake.put(None)
        # Whoever takes the lock starts the thread; nobody ever waits for it. `Thread.start` would
        # wait until the thread runs.
        if not self._started.locked() and self._started.acquire(blocking=False):
            sender = _Sender(self, self._items, self._wake, self._flushes)
            try:
                _thread.start_new_thread(sender.send_forever, ())
            except RuntimeError:
                self._started.release()
                raise


class _Sender:
    """What the thread does."""

    def __init__(
        self,
        client: ControlClient,
        items: deque[_Item],
        wake: SimpleQueue[None],
        flushes: SimpleQueue[_Flush],
    ) -> None:
        self._client = client
        self._items = items
        self._wake = wake
        self._flushes = flushes
        self._waiting: list[_Item] = []
        self._pause_s = 0.0
        self._link: Link | None = None
        self._out: set[str] = set()

    def send_forever(self) -> None:
        while True:
            flushes = self._wait()
            self._send_all()
            for flush in flushes:
                flush.done.put(all(item.backend != flush.backend for item in self._waiting))

    def _wait(self) -> list[_Flush]:
        """Until there is something to do. A flush is always something to do."""
        flushes: list[_Flush] = []
        if self._waiting:
            self._pause_s = min(max(2 * self._pause_s, BACK_OFF_S[0]), BACK_OFF_S[1])
            flushes += _next(self._flushes, self._pause_s)
        else:
            self._pause_s = 0.0
            self._wake.get()
            time.sleep(LINGER_S)
        return [*flushes, *_drain(self._flushes)]

    def _send_all(self) -> None:
        batches = list(_batches(self._fresh()))
        unreached: set[Settings] = set()
        self._waiting = []
        for batch in batches:
            backend = batch[0].backend
            if backend in unreached or not self._send(batch):
                unreached.add(backend)
                self._waiting += batch

    def _fresh(self) -> list[_Item]:
        """All that is to be sent, less what is too old or too much."""
        items = [*self._waiting, *_drain(self._items)]
        oldest = time.monotonic() - MAX_AGE_S
        kept = [item for item in items if item.since >= oldest][-MAX_QUEUED:]
        self._client.dropped += sum(item.event is not None for item in items)
        self._client.dropped -= sum(item.event is not None for item in kept)
        return kept

    def _send(self, batch: list[_Item]) -> bool:
        """Whether the batch is done with, one way or the other."""
        backend, workflow, _, run, _ = batch[0]
        events = tuple(item.event for item in batch if item.event)
        reused = self._link is not None and self._link.backend == backend
        try:
            try:
                self._link_to(backend).send(workflow, run, events)
            except Unreached:
                if not reused:
                    raise
                # Perhaps only this connection is dead: an idle one is closed sooner or later.
                self._close()
                self._link_to(backend).send(workflow, run, events)
        except Unreached as error:
            self._complain(backend, error)
            return False
        except Refused as error:
            self._client.dropped += len(events)
            self._complain(backend, error)
            return True
        except Exception:
            self._client.dropped += len(events)
            warn_once("control", "events that cannot be sent; calls go on", exc_info=True)
            return True
        if backend.control_url in self._out:
            self._out.remove(backend.control_url)
            logger.info("%s takes events again", backend.control_url)
        return True

    def _link_to(self, backend: Settings) -> Link:
        if self._link and self._link.backend != backend:
            self._close()
        self._link = self._link or Link(backend)
        return self._link

    def _close(self) -> None:
        if self._link:
            self._link.close()
            self._link = None

    def _complain(self, backend: Settings, why: Exception) -> None:
        """Once per outage. After a failure the connection is in no known state."""
        self._close()
        if backend.control_url not in self._out:
            self._out.add(backend.control_url)
            logger.warning("%s takes no events (%s); calls go on", backend.control_url, why)


_T = TypeVar("_T")


def _drain(queue: deque[_T] | SimpleQueue[_T]) -> Iterator[_T]:
    take = queue.popleft if isinstance(queue, deque) else queue.get_nowait
    try:
        while True:
            yield take()
    except (IndexError, Empty):
        return


def _next(queue: SimpleQueue[_T], timeout_s: float) -> Iterator[_T]:
    try:
        yield queue.get(timeout=timeout_s)
    except Empty:
        return


def _batches(items: list[_Item]) -> Iterator[list[_Item]]:
    """Per backend, workflow and run, in order, at most MAX_EVENTS at a time."""
    groups: dict[tuple[Settings, str, str | None], list[_Item]] = {}
    for item in items:
        groups.setdefault((item.backend, item.workflow.id, item.run), []).append(item)
    for group in groups.values():
        for at in range(0, len(group), MAX_EVENTS):
            yield group[at : at + MAX_EVENTS]


control: Final = ControlClient()
"""The one of this process."""
