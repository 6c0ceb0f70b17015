"""One row per predicted call, as a parquet file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from maestro_agents.protocol import ConfigError

from ._predictions import Predicted

COLUMNS = (
    "source",
    "workflow_id",
    "call_idx",
    "actual",
    "point",
    "p50",
    "p90",
    "p95",
    "p99",
    "t_rem_predicted",
    "t_rem_actual",
)
"""Output tokens; `t_rem`: from the call, itself included, to the end of its run."""


def write_calls(predicted: Predicted, path: Path, traces: Iterable[Path]) -> None:
    """The calls as `maestro evaluate --dump` writes them, numbered as the traces number them:
    `traces` are the files that they were read from.

    Raises:
        ConfigError: the file cannot be written, or pyarrow is not installed.
    """
    numbers = _numbers(traces)
    where = zip(
        predicted.sources.tolist(), predicted.runs.tolist(), predicted.index.tolist(), strict=True
    )
    columns = {
        "source": predicted.sources.tolist(),
        "workflow_id": predicted.runs.tolist(),
        "call_idx": [numbers[source, run][at] for source, run, at in where],
        "actual": predicted.actual,
        "point": predicted.point,
        "p50": predicted.p50,
        "p90": predicted.p90,
        "p95": predicted.p95,
        "p99": predicted.p99,
        "t_rem_predicted": predicted.rest_p50,
        "t_rem_actual": predicted.rest,
    }
    from pyarrow import ArrowException, parquet, table

    try:
        parquet.write_table(table(columns), path)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _numbers(traces: Iterable[Path]) -> dict[tuple[str, str], list[int]]:
    """The `call_idx` of each run's calls in order: they may have gaps, our index has none."""
    from pyarrow import parquet

    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path in traces:
        rows = parquet.read_table(path, columns=["source", "workflow_id", "call_idx"])
        for row in rows.to_pylist():
            found[row["source"], row["workflow_id"]].append(row["call_idx"])
    return {run: sorted(numbers) for run, numbers in found.items()}
