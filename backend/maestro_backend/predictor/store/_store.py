"""The store of finished calls: SQLite, features and counts only, written in the background."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor import Example, Recent, RunExamples

from ._database import is_damage, is_passing, open_to_write, set_aside
from ._inbox import Batch, Inbox
from ._retention import drop_ended_before, drop_to_fit
from ._rows import COLUMNS, Predicted, StoredCall, plain, row_of
from ._view import StoreView

_log = logging.getLogger("maestro.store")

MAX_BYTES = 256 * 1024**2
MAX_AGE_S = 90 * 86_400.0
_MOST_WAITING = 10_000
_FULL_BATCH = 256
_OLD_BATCH_S = 1.0
_FLUSH_S = 30.0
_RETRY_S = 0.5
_SWEEP_S = 3600.0
_OPEN_RUNS = 10_000
"""Rows that may wait, rows and seconds that make a batch, patience of `flush`, seconds between
tries while another connection holds the file, and between looks for old runs; runs whose next call
is still known to belong to them (all ours)."""

_INSERT = f"INSERT INTO calls (run_id, {', '.join(COLUMNS)}) VALUES (?{', ?' * len(COLUMNS)})"


class Store:
    """Keeps finished calls and learned state in one file; one process writes it at a time.

    What is added is written by a thread of its own within a second. When more than 10,000 calls
    wait, new ones are dropped; when the disk fails or is full, storing ends and serving goes on.
    Both are logged once and counted. Runs whose last call ended `max_age_s` seconds ago are
    deleted, and the oldest runs when the file would hold more than `max_bytes` bytes (its log
    beside it takes a few MiB more). It survives `kill -9`: what was flushed is there.

    Raises:
        ConfigError: the file is not ours, of a newer version, cannot be written, or another
            process writes it.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.written = 0
        self.dropped = 0
        self.failure = ""
        """Calls written and dropped so far; why storing has ended, "" while it has not."""
        self._max_bytes, self._max_age_s, self._clock = max_bytes, max_age_s, clock
        self._lock = _take_lock(path)
        try:
            self._connection = open_to_write(path)
        except BaseException:
            os.close(self._lock)
            raise
        self._open: Recent[tuple[str, str], tuple[int, set[int]]] = Recent(_OPEN_RUNS)
        self._inbox: Inbox[StoredCall] = Inbox(_MOST_WAITING, _FULL_BATCH, _OLD_BATCH_S)
        self._swept = 0.0
        self._thread = threading.Thread(target=self._write, name="maestro-store", daemon=True)
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------

    def add(self, example: Example, predicted: Predicted | None, version: str, at: float) -> None:
        """A call has ended at `at` (seconds since the epoch); `version` is the model that foretold
        it, "" the plain tables. Returns at once.

        A run is known by its source and name; "" is a run of one call. If a number in it comes a
        second time, or after another start, whoever counts has begun anew: so does the run.
        """
        call = StoredCall(example, predicted or Predicted(), version, at)
        if self._inbox.put(call):
            return
        self.dropped += 1
        if self.dropped == 1 and not self.failure and not self._inbox.closed:
            _log.warning("calls end faster than %s takes them: some are not stored", self.path)

    def put_state(self, name: str, value: Any) -> None:
        """Keep `value` (whatever JSON can say: names and numbers, never text of prompts) under
        `name`. It is encoded now and written soon."""
        self._inbox.put_state(name, json.dumps(value, separators=(",", ":")))

    def state(self, name: str) -> Any:
        """What was put last under `name`, None if nothing was. Waits for the disk.

        Raises:
            ConfigError: the file cannot be read.
        """
        self.flush()
        with StoreView(self.path) as view:
            return view.state(name)

    def runs(self, since: float | None = None, limit: int | None = None) -> list[RunExamples]:
        """`StoreView.runs` of all that was added. Waits for the disk.

        Raises:
            ConfigError: the file cannot be read.
        """
        self.flush()
        with StoreView(self.path) as view:
            return view.runs(since, limit)

    def flush(self, timeout_s: float = _FLUSH_S) -> bool:
        """Wait until all that was added is on its way to the disk even if this process is killed.

        False: storing has ended, or another connection holds the file for too long.
        """
        return self._inbox.flush(timeout_s) and not self.failure

    def close(self) -> None:
        """Write what waits, and let the next one in. Waits for the disk."""
        self._inbox.close()
        self._thread.join()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- on the store's own thread --------------------------------------------------------------

    def _write(self) -> None:
        try:
            self._sweep()
            while True:
                closed = self._inbox.closed
                batch = self._inbox.take(_SWEEP_S)
                self._keep(batch)
                self._inbox.settle()
                self._sweep()
                if closed:
                    break
        except Exception as error:
            self._end(error)
        finally:
            with suppress(sqlite3.Error):
                self._connection.close()

    def _keep(self, batch: Batch[StoredCall]) -> None:
        """Write a batch; again while another connection holds the file, and into a fresh file if
        this one turns out to be damaged."""
        anew = False
        while batch.rows or batch.states:
            try:
                self._commit(batch)
                return
            except sqlite3.Error as error:
                if is_passing(error) and not self._inbox.closed:
                    self._inbox.pause(_RETRY_S)
                elif is_damage(error) and not anew:
                    anew = True
                    self._begin_anew(error)
                else:
                    self.dropped += len(batch.rows)
                    raise

    def _commit(self, batch: Batch[StoredCall]) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            for call in batch.rows:
                run = self._run_of(call)
                connection.execute(_INSERT, (run, *row_of(call)))
            connection.executemany(
                "INSERT OR REPLACE INTO state VALUES (?, ?, ?)",
                [(name, text, self._clock()) for name, text in batch.states.items()],
            )
            connection.execute("COMMIT")
        except BaseException:
            self._open.clear()  # it tells of rows that are not there
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        self.written += len(batch.rows)

    def _run_of(self, call: StoredCall) -> int:
        """The row of a call's run, made if need be, with the call counted in it."""
        example = call.example
        name = (example.source, example.run)
        found = self._open.get(name)
        if found is not None and example.run and example.index not in found[1]:
            self._connection.execute(
                "UPDATE runs SET calls = calls + 1, last_at = max(last_at, ?) WHERE id = ?",
                (call.at, found[0]),
            )
        else:
            cursor = self._connection.execute(
                "INSERT INTO runs (source, run, task, calls, last_at) VALUES (?, ?, ?, 1, ?)",
                (*(plain(part) for part in (*name, example.task)), call.at),
            )
            assert cursor.lastrowid is not None
            found = cursor.lastrowid, set()
        found[1].add(example.index)
        self._open[name] = found
        return found[0]

    def _sweep(self) -> None:
        """Keep the file within its bounds of age, once an hour, and of size."""
        gone: set[int] = set()
        try:
            now = self._clock()
            if not 0 <= now - self._swept < _SWEEP_S:
                self._swept = now
                gone |= drop_ended_before(self._connection, now - self._max_age_s)
            gone |= drop_to_fit(self._connection, self._max_bytes)
        except sqlite3.Error as error:
            if is_damage(error):
                self._begin_anew(error)
            elif not is_passing(error):
                raise
        for name in [name for name, (run, _) in self._open.items() if run in gone]:
            del self._open[name]

    def _begin_anew(self, error: Exception) -> None:
        self._open.clear()
        self._connection.close()
        set_aside(self.path, error)
        self._connection = open_to_write(self.path)

    def _end(self, error: Exception) -> None:
        """Storing ends, serving goes on."""
        self.failure = str(error) or type(error).__name__
        _log.error("storing calls in %s ends here: %s", self.path, self.failure)
        self.dropped += len(self._inbox.close().rows)
        self._inbox.take(0)
        self._inbox.settle()


def _take_lock(path: Path) -> int:
    """The right to write the file; the kernel frees it with the process."""
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot store calls in {path} ({error.strerror}): make it writable, set another"
            " state_dir, or turn predictor.store off"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise ConfigError(
            f"another server stores calls in {path}: stop it, or set another state_dir for this one"
        ) from error
    return file
