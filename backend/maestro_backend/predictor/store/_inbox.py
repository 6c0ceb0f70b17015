"""What is on its way to the disk: put from any thread without waiting, taken by one writer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Row = TypeVar("Row")


@dataclass(slots=True)
class Batch(Generic[Row]):
    """Rows in order, and the newest JSON text under each name."""

    rows: list[Row] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)


class Inbox(Generic[Row]):
    """Holds `most` rows at most; a batch is handed on when it has `full` rows or is `old_s` old."""

    def __init__(self, most: int, full: int, old_s: float) -> None:
        self._most, self._full, self._old_s = most, full, old_s
        self._changed = threading.Condition()
        self._waiting: Batch[Row] = Batch()
        self._put = self._settling = self._settled = 0
        self._hurry = self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, row: Row) -> bool:
        """Whether there was room."""
        with self._changed:
            rows = self._waiting.rows
            if self._closed or len(rows) >= self._most:
                return False
            rows.append(row)
            self._put += 1
            if len(rows) in (1, self._full):
                self._changed.notify_all()
            return True

    def put_state(self, name: str, text: str) -> bool:
        """Replaces what waits under `name`. False: it is closed."""
        with self._changed:
            if not self._closed:
                self._waiting.states[name] = text
                self._put += 1
                self._changed.notify_all()
            return not self._closed

    def take(self, patience_s: float) -> Batch[Row]:
        """The next batch; an empty one after `patience_s` seconds of silence, or when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._any() or self._closed, patience_s)
            if self._any():
                self._changed.wait_for(self._ripe, self._old_s)
            batch, self._waiting = self._waiting, Batch()
            self._settling = self._put
            return batch

    def settle(self) -> None:
        """The batch that was taken last is on the disk, or given up."""
        with self._changed:
            self._settled = self._settling
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put before is settled; whether it is."""
        until = time.monotonic() + timeout_s
        with self._changed:
            target, self._hurry = self._put, True
            self._changed.notify_all()
            while self._settled < target and time.monotonic() < until:
                self._changed.wait(until - time.monotonic())
            self._hurry = False
            return self._settled >= target

    def close(self) -> Batch[Row]:
        """Take nothing more. What still waits stays for `take`; a copy of it is returned."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return Batch(list(self._waiting.rows), dict(self._waiting.states))

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than until it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _any(self) -> bool:
        return bool(self._waiting.rows or self._waiting.states)

    def _ripe(self) -> bool:
        return self._closed or self._hurry or len(self._waiting.rows) >= self._full
