"""One row per measured run and cell, as parquet, written cell by cell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maestro_agents.protocol import ConfigError

from ._figures import CellResult

TEXTS = ("policy", "deadline_kind", "class", "source", "workflow_id")
COLUMNS = (
    "policy",
    "load",
    "deadline_kind",
    "seed",
    "class",
    "source",
    "workflow_id",
    "arrival",
    "deadline",
    "finish",
)
"""Times in seconds on the simulation's clock; `finish` is NaN where a run did not."""


class Dump:
    """An open file of runs. Each cell is a group of rows: nothing is held back."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        kinds = {"seed": pa.int64(), **dict.fromkeys(TEXTS, pa.string())}
        self._schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in COLUMNS])
        self._writer = parquet.ParquetWriter(path, self._schema)

    def add(self, result: CellResult) -> None:
        from pyarrow import ArrowException, table

        try:
            self._writer.write_table(table(_columns(result), schema=self._schema))
        except (ArrowException, OSError) as error:
            raise ConfigError(f"cannot write the dump: {error}") from error

    def close(self) -> None:
        self._writer.close()


@contextmanager
def dumping(path: Path | None) -> Iterator[Dump | None]:
    """The file takes its name when it is whole.

    Raises:
        ConfigError: it cannot be written, or pyarrow is not installed.
    """
    if path is None:
        yield None
        return
    part = path.with_name(f"{path.name}.part")
    try:
        dump = Dump(part)
    except ImportError as error:
        raise ConfigError("--dump needs pyarrow: pip install 'maestro-mas[train]'") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    try:
        yield dump
        dump.close()
        part.replace(path)
    finally:
        dump.close()
        part.unlink(missing_ok=True)


def _columns(result: CellResult) -> dict[str, list[Any]]:
    cell, rows = result.cell, result.rows
    many = len(rows)
    return {
        "policy": [cell.policy] * many,
        "load": [cell.load] * many,
        "deadline_kind": [cell.deadline] * many,
        "seed": [cell.seed] * many,
        "class": [row.slo for row in rows],
        "source": [row.source for row in rows],
        "workflow_id": [row.workflow_id for row in rows],
        "arrival": [row.arrival for row in rows],
        "deadline": [row.deadline for row in rows],
        "finish": [row.finish for row in rows],
    }
