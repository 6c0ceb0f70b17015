"""What the store holds, for other processes to read while a gateway writes it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor import Example, RunExamples

from ._database import open_to_read
from ._rows import COLUMNS, StoredCall, call_of, closed_up

_EVER = float("-inf")


class StoreView:
    """What is stored, read-only: for the trainer and for people, while a gateway writes.

    Raises:
        ConfigError: there is no file, it is not ours, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = open_to_read(path)

    def runs(self, since: float | None = None, limit: int | None = None) -> list[RunExamples]:
        """Whole runs in order of arrival (of their first finished call).

        `since`: only those whose last call ended then or later (seconds since the epoch).
        `limit`: the newest runs, of so many calls together at most. Where calls of a run are
        missing (they failed, still run, or were dropped) the others are counted anew and lose
        their links to those.

        Raises:
            ConfigError: the file cannot be read.
        """
        with self._reading() as connection:
            chosen = set(_choose(connection, since, limit))
            if not chosen:
                return []
            found = connection.execute(
                f"SELECT run_id, source, run, task, {', '.join(COLUMNS)} FROM calls"
                " JOIN runs ON runs.id = run_id WHERE run_id >= ? ORDER BY run_id, idx",
                (min(chosen),),
            )
            return [
                _run_of([call_of(row[1:]).example for row in rows])
                for run, rows in groupby(found, itemgetter(0))
                if run in chosen
            ]

    def calls(self, run: str) -> list[StoredCall]:
        """The calls of a run by its name, as they were counted, with what was foretold.

        Raises:
            ConfigError: the file cannot be read.
        """
        return self._calls("WHERE runs.run = ? ORDER BY run_id, idx", run)

    def newest(self, count: int) -> list[StoredCall]:
        """The last `count` calls that ended among the newest runs, in the order in which they did.

        Raises:
            ConfigError: the file cannot be read.
        """
        found = self._calls("ORDER BY run_id DESC, idx DESC LIMIT ?", count)
        return sorted(found, key=lambda call: call.at)

    def count(self, since: float | None = None) -> int:
        """How many calls are stored; with `since`, those that ended then or later.

        Raises:
            ConfigError: the file cannot be read.
        """
        with self._reading() as connection:
            query = (
                "SELECT count(*) FROM runs JOIN calls ON run_id = id WHERE last_at >= ? AND at >= ?"
            )
            moment = _EVER if since is None else since
            [count] = connection.execute(query, (moment, moment)).fetchone()
            return int(count)

    def state(self, name: str) -> Any:
        """What was put last under `name`, None if nothing was.

        Raises:
            ConfigError: the file cannot be read.
        """
        with self._reading() as connection:
            query = "SELECT json FROM state WHERE name = ?"
            row = connection.execute(query, (name,)).fetchone()
            return None if row is None else json.loads(row[0])

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _calls(self, where: str, value: object) -> list[StoredCall]:
        with self._reading() as connection:
            found = connection.execute(
                f"SELECT source, run, task, {', '.join(COLUMNS)} FROM calls"
                f" JOIN runs ON runs.id = run_id {where}",
                (value,),
            )
            return [call_of(row) for row in found]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One moment of the file, for as many questions as the block asks."""
        try:
            self._connection.execute("BEGIN")
            try:
                yield self._connection
            finally:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise ConfigError(f"cannot read the calls in {self._path} ({error})") from error


def _choose(
    connection: sqlite3.Connection, since: float | None, limit: int | None
) -> Iterator[int]:
    """The newest runs that ended since, of `limit` calls together."""
    left = float("inf") if limit is None else limit
    query = "SELECT id, calls FROM runs WHERE last_at >= ? ORDER BY id DESC"
    for run, calls in connection.execute(query, (_EVER if since is None else since,)):
        if limit is not None and calls > limit:
            continue  # larger than all that is asked for
        left -= calls
        if left < 0:
            return
        yield run


def _run_of(calls: list[Example]) -> RunExamples:
    return closed_up(calls[0].source, calls[0].run, calls)
