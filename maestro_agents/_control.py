"""Tells the backend what no request carries: workflows and run events, in the background."""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Final
from urllib.parse import quote

import httpx

from ._log import fail_open, warn_once
from ._settings import Settings, settings
from .protocol import (
    HEADER_WORKFLOW,
    MAX_EVENTS,
    MAX_WORKFLOW_BYTES,
    RunEvent,
    RunEvents,
    Workflow,
)

MAX_QUEUED: Final = 10_000
"""Most events that wait; beyond it the oldest is dropped and counted."""

TIMEOUT_S: Final = 2.0
EXIT_FLUSH_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Item:
    backend: Settings
    workflow: Workflow
    run: str | None = None
    event: RunEvent | None = None


@dataclass(slots=True)
class _Queue:
    """What one process has still to send."""

    items: deque[_Item] = field(default_factory=deque)
    changed: Condition = field(default_factory=Condition)
    thread: Thread | None = None
    busy: bool = False


class ControlClient:
    """Sends in order from one daemon thread, and never raises. A dead backend has no effect.

    `dropped` counts events that were lost: the queue was full, or the backend did not take them.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._queue = _Queue()
        self._known: set[tuple[str, str]] = set()
        os.register_at_fork(after_in_child=self._start_anew)
        atexit.register(self.flush, EXIT_FLUSH_S)

    @fail_open
    def register(self, workflow: Workflow) -> None:
        """Let the backend know `workflow` before its first call."""
        backend = settings()
        if backend.active:
            self._put([_Item(backend, workflow)])

    @fail_open
    def post(self, workflow: Workflow, run: str, events: Iterable[RunEvent]) -> None:
        """Send the events of one run, in order."""
        backend = settings()
        if backend.active:
            self._put([_Item(backend, workflow, run, event) for event in events])

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is sent, at most `timeout_s` seconds. Returns whether it is."""
        queue = self._queue
        with queue.changed:
            return queue.changed.wait_for(lambda: not queue.items and not queue.busy, timeout_s)

    def _put(self, items: list[_Item]) -> None:
        queue = self._queue
        with queue.changed:
            queue.items.extend(items)
            while len(queue.items) > MAX_QUEUED:
                queue.items.popleft()
                self.dropped += 1
            if queue.thread is None:
                queue.thread = Thread(
                    target=self._send_forever, name="maestro-control", daemon=True
                )
                queue.thread.start()
            queue.changed.notify_all()

    def _start_anew(self) -> None:
        """In a forked child: threads are gone, locks may be held, the queue is the parent's."""
        self._queue = _Queue()

    def _send_forever(self) -> None:
        queue = self._queue
        with httpx.Client(timeout=TIMEOUT_S) as http:
            while True:
                with queue.changed:
                    queue.busy = False
                    queue.changed.notify_all()
                    queue.changed.wait_for(lambda: bool(queue.items))
                    items = list(queue.items)
                    queue.items.clear()
                    queue.busy = True
                for batch in _batches(items):
                    self._send(http, batch)

    def _send(self, http: httpx.Client, batch: list[_Item]) -> None:
        first = batch[0]
        events = [item.event for item in batch if item.event]
        try:
            self._ensure_known(http, first.backend, first.workflow)
            if events:
                self._send_events(http, first, events)
        except Exception as error:
            self.dropped += len(events)
            url, why = first.backend.control_url, str(error).partition("\n")[0]
            warn_once(f"control:{url}", "%s takes no events (%s); calls go on", url, why)

    def _send_events(self, http: httpx.Client, item: _Item, events: list[RunEvent]) -> None:
        url = f"{item.backend.control_url}/runs/{quote(item.run or '', safe='')}/events"
        body = RunEvents(events=tuple(events)).model_dump_json(by_alias=True, exclude_none=True)
        reply = http.post(url, content=body, headers=_headers(item.backend))
        reply.raise_for_status()
        if reply.headers.get(HEADER_WORKFLOW) == "unknown":
            self._known.discard((item.backend.control_url, item.workflow.id))
            self._ensure_known(http, item.backend, item.workflow)

    def _ensure_known(self, http: httpx.Client, backend: Settings, workflow: Workflow) -> None:
        key = (backend.control_url, workflow.id)
        if key in self._known:
            return
        body = workflow.model_dump_json(exclude_none=True).encode()
        if len(body) <= MAX_WORKFLOW_BYTES:
            url = f"{backend.control_url}/workflows/{quote(workflow.id, safe='')}"
            reply = http.put(url, content=body, headers=_headers(backend))
            if reply.is_server_error:
                reply.raise_for_status()
            if reply.is_error:
                warn_once(f"refused:{url}", "%s refused: %s", url, reply.text[:500])
        else:
            warn_once(
                f"size:{workflow.id}", "workflow %s not sent: %d bytes", workflow.id, len(body)
            )
        self._known.add(key)


def _headers(backend: Settings) -> dict[str, str]:
    key = {"authorization": f"Bearer {backend.api_key}"} if backend.api_key else {}
    return {"content-type": "application/json", **key}


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
