"""The SQLite file under the store: opening, checking and migrating it."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from maestro_agents.protocol import ConfigError

_log = logging.getLogger("maestro.store")

_MAGIC = b"SQLite format 3\0"
_APPLICATION = 0x4D414553  # "MAES"
_BUSY_S = 5.0
_LARGEST_WAL = 4 * 1024**2

Migration = Sequence[str]

MIGRATIONS: tuple[Migration, ...] = (
    (
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY, source TEXT NOT NULL DEFAULT 'live', run TEXT NOT NULL,
            task TEXT NOT NULL, calls INTEGER NOT NULL, last_at REAL NOT NULL)""",
        "CREATE INDEX runs_by_name ON runs (run)",
        """CREATE TABLE calls (
            run_id INTEGER NOT NULL, idx INTEGER NOT NULL, parents TEXT NOT NULL, started_s REAL,
            at REAL NOT NULL, version TEXT NOT NULL,
            model TEXT NOT NULL, workflow TEXT NOT NULL, stage TEXT NOT NULL, role TEXT NOT NULL,
            prompt_bytes INTEGER NOT NULL, max_tokens INTEGER, n INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL, messages INTEGER NOT NULL,
            prompt_chars INTEGER NOT NULL, prompt_lines INTEGER NOT NULL,
            code_chars INTEGER NOT NULL, tools INTEGER NOT NULL, tool_choice TEXT NOT NULL,
            output_format TEXT NOT NULL, gap_s REAL,
            actual_prompt_tokens INTEGER NOT NULL, actual_output_tokens INTEGER NOT NULL,
            actual_cached_tokens INTEGER NOT NULL, actual_first_s REAL, actual_total_s REAL,
            actual_finish TEXT NOT NULL,
            predicted_point REAL, predicted_p50 REAL, predicted_p90 REAL, predicted_p95 REAL,
            predicted_p99 REAL, predicted_rest_p50 REAL,
            PRIMARY KEY (run_id, idx)) WITHOUT ROWID""",
        "CREATE TABLE state (name TEXT PRIMARY KEY, json TEXT NOT NULL, at REAL NOT NULL)",
    ),
)
"""What brings a file from version n (its place here) to n + 1. Append; never change one."""


class DamagedError(Exception):
    """The file is a database and its pages do not hang together."""


def open_to_write(path: Path) -> sqlite3.Connection:
    """The database at `path`, made or brought to this version if need be; for one thread at a time.

    A damaged one is moved aside, logged, and a fresh one begun.

    Raises:
        ConfigError: the file is not ours, of a newer version, or cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return _opened(path)
        except (DamagedError, sqlite3.DatabaseError) as error:
            if not is_damage(error):
                raise
            set_aside(path, error)
            return _opened(path)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"cannot store calls in {path} ({error}): make it writable, set another state_dir,"
            " or turn predictor.store off"
        ) from error


def open_to_read(path: Path) -> sqlite3.Connection:
    """The database at `path`, read-only.

    Raises:
        ConfigError: there is none, it is not ours, damaged, or of another version.
    """
    if not path.is_file():
        raise ConfigError(f"no calls are stored in {path} yet: `maestro serve` stores them")
    try:
        _refuse_another_kind(path)
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S, isolation_level=None
        )
        try:
            _refuse_another_program(connection, path)
            if _version(connection, path) < len(MIGRATIONS):
                raise ConfigError(f"{path} is of an older version: `maestro serve` brings it up")
        except BaseException:
            connection.close()
            raise
        return connection
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot read the calls in {path} ({error}): is it damaged?") from error


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the file to the version after the last of `migrations`, wholly or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        [version] = connection.execute("PRAGMA user_version").fetchone()
        for number, statements in enumerate(migrations[version:], start=version + 1):
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def is_damage(error: Exception) -> bool:
    """Whether the file itself is broken, not the disk or the moment."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return isinstance(error, DamagedError) or code & 0xFF in damage


def is_passing(error: sqlite3.Error) -> bool:
    """Whether another connection just holds the file."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def set_aside(path: Path, reason: Exception) -> Path:
    """Rename a damaged file, and what lies beside it, to NAME.corrupt-TIME; where it went."""
    stem = f"{path.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    target, count = path.with_name(stem), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{stem}.{count}")
    path.rename(target)
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))
    _log.error("%s is damaged (%s): it is now %s, and a fresh one begins", path, reason, target)
    return target


def _opened(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its other files this mode
    path.chmod(0o600)
    _refuse_another_kind(path)
    left_open = _ended_badly(path)
    connection = sqlite3.connect(
        path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        _refuse_another_program(connection, path)
        _version(connection, path)
        if left_open:
            _check(connection)
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {_LARGEST_WAL}")
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _ended_badly(path: Path) -> bool:
    """Whether the last writer was killed: a clean end leaves no log beside the file."""
    wal = path.with_name(path.name + "-wal")
    return wal.exists() and wal.stat().st_size > 0


def _check(connection: sqlite3.Connection) -> None:
    [first, *_] = connection.execute("PRAGMA quick_check(1)").fetchone()
    if first != "ok":
        raise DamagedError(first)


def _refuse_another_kind(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start and start != _MAGIC:
        raise ConfigError(f"{path} is no database: move it away, or set another state_dir")


def _refuse_another_program(connection: sqlite3.Connection, path: Path) -> None:
    [application] = connection.execute("PRAGMA application_id").fetchone()
    [tables] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != _APPLICATION:
        raise ConfigError(
            f"{path} is the database of another program: move it away, or set another state_dir"
        )


def _version(connection: sqlite3.Connection, path: Path) -> int:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise ConfigError(
            f"{path} is of a newer Maestro (version {version}, this one reads {len(MIGRATIONS)}):"
            " update maestro-mas, move the file away, or set another state_dir"
        )
    return int(version)
