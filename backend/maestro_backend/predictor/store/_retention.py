"""Which runs the store keeps: whole ones, the newest, within its bounds of age and size."""

from __future__ import annotations

import math
import sqlite3
from contextlib import suppress

_TARGET = 0.9
"""A file that is too large shrinks to this part of its bound: not one run for each call (ours)."""


def drop_ended_before(connection: sqlite3.Connection, moment: float) -> set[int]:
    """Delete the runs whose last call ended before (seconds since the epoch); their ids."""
    found = connection.execute("SELECT id FROM runs WHERE last_at < ?", (moment,))
    gone = {run for (run,) in found}
    _drop(connection, gone)
    if gone:
        _shrink(connection)
    return gone


def drop_to_fit(connection: sqlite3.Connection, max_bytes: int) -> set[int]:
    """If the file is larger than `max_bytes`, delete whole runs, the oldest first; their ids."""
    gone: set[int] = set()
    if _pages(connection, "page_count") <= max_bytes:
        return gone
    while (excess := 1 - _TARGET * max_bytes / _used(connection)) > 0:
        oldest = _oldest(connection, excess)
        if not oldest:
            break
        _drop(connection, oldest)
        gone |= oldest
    _shrink(connection)
    return gone


def _oldest(connection: sqlite3.Connection, share: float) -> set[int]:
    """Runs, the oldest first, that hold this share of all calls."""
    [total] = connection.execute("SELECT coalesce(sum(calls), 0) FROM runs").fetchone()
    left, found = math.ceil(share * total), set()
    for run, calls in connection.execute("SELECT id, calls FROM runs ORDER BY last_at, id"):
        if left <= 0:
            break
        left -= calls
        found.add(run)
    return found


def _drop(connection: sqlite3.Connection, runs: set[int]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        ids = [(run,) for run in runs]
        connection.executemany("DELETE FROM calls WHERE run_id = ?", ids)
        connection.executemany("DELETE FROM runs WHERE id = ?", ids)
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _shrink(connection: sqlite3.Connection) -> None:
    """Give free pages back to the disk."""
    connection.executescript("PRAGMA incremental_vacuum")  # `execute` would stop at one page
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _used(connection: sqlite3.Connection) -> int:
    """Bytes of the pages that hold something."""
    return _pages(connection, "page_count") - _pages(connection, "freelist_count")


def _pages(connection: sqlite3.Connection, what: str) -> int:
    """Bytes of all pages (`page_count`) or of the free ones (`freelist_count`)."""
    [count] = connection.execute(f"PRAGMA {what}").fetchone()
    [size] = connection.execute("PRAGMA page_size").fetchone()
    return int(count * size)
