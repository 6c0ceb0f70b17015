"""Recorded agent calls out of parquet files, one row per call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite, nan
from pathlib import Path
from typing import Any

from maestro_agents.protocol import ConfigError

from ._call import CallOutcome, CallShape, Example, RunExamples

COLUMNS = (
    "source", "app", "workflow_id", "task_id", "call_idx", "stage", "role", "parents", "model",
    "out_format", "n_tools", "n_msgs", "prompt_chars", "prompt_lines", "prompt_code_chars",
    "prompt_tokens", "cached_prefix_tokens", "output_tokens", "finish", "t_start_s", "llm_s",
    "gap_s",
)  # fmt: skip
"""What is read; other columns may be there. Prompt text is not read."""

_CHARS_PER_TOKEN = 4
_FORMATS = {"json": "json"}
_CHOICES = {"tool_or_chat": "auto", "tool_call": "required"}


def read_traces(paths: Iterable[Path]) -> list[RunExamples]:
    """All runs of the files, in order of their first row. A folder stands for its parquet files.

    Raises:
        ConfigError: a file is missing, no parquet, or lacks a column; or pyarrow is not installed.
    """
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for path in _files(paths):
        for row in _rows(path):
            rows[row["source"], row["workflow_id"]].append(row)
    return [_checked(source, run, calls) for (source, run), calls in rows.items()]


def _checked(source: str, run: str, rows: list[Mapping[str, Any]]) -> RunExamples:
    try:
        return _run(source, run, rows)
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise ConfigError(
            f"run {run!r} of source {source!r}: a missing or impossible value ({error})"
        ) from error


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.parquet"))
            if not found:
                raise ConfigError(f"there is no .parquet file in {path}")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise ConfigError(f"there is no file or folder {path}")


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(
            "reading traces needs pyarrow: pip install 'maestro-mas[train]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        if missing := sorted({*COLUMNS} - {*file.schema_arrow.names}):
            raise ConfigError(f"{path} has no column {missing[0]!r}: it is no trace of agent calls")
        yield from file.read(columns=list(COLUMNS)).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"cannot read {path} as parquet: {error}") from error


def _run(source: str, run: str, rows: list[Mapping[str, Any]]) -> RunExamples:
    rows = sorted(rows, key=lambda row: row["call_idx"])
    position = {row["call_idx"]: at for at, row in enumerate(rows)}
    calls = []
    for at, row in enumerate(rows):
        known = (position.get(parent, at) for parent in row["parents"])
        parents = tuple(sorted({parent for parent in known if parent < at}))
        gap_s = _gap_s(row, [rows[parent] for parent in parents])
        calls.append(_example(row, run, at, parents, gap_s))
    return RunExamples(source, run, tuple(calls))


def _example(
    row: Mapping[str, Any], run: str, at: int, parents: tuple[int, ...], gap_s: float
) -> Example:
    shape = CallShape(
        model=row["model"] or "",
        workflow=row["app"],
        stage=row["stage"],
        role=row["role"],
        prompt_bytes=row["prompt_tokens"] * _CHARS_PER_TOKEN,
        prompt_tokens=row["prompt_tokens"],
        messages=row["n_msgs"],
        prompt_chars=row["prompt_chars"],
        prompt_lines=row["prompt_lines"],
        code_chars=row["prompt_code_chars"],
        tools=row["n_tools"],
        tool_choice=_CHOICES.get(row["out_format"], ""),
        output_format=_FORMATS.get(row["out_format"], ""),
        gap_s=gap_s,
    )
    if row["output_tokens"] < 0 or row["prompt_tokens"] < 0:
        raise ValueError(f"call {row['call_idx']} has a negative number of tokens")
    outcome = CallOutcome(
        prompt_tokens=row["prompt_tokens"],
        output_tokens=row["output_tokens"],
        cached_tokens=max(0, row["cached_prefix_tokens"]),
        total_s=row["llm_s"] if isfinite(row["llm_s"]) else 0.0,
        finish=row["finish"] or "",
    )
    started_s = row["t_start_s"] if isfinite(row["t_start_s"]) else nan
    return Example(
        source=row["source"],
        run=run,
        index=at,
        shape=shape,
        outcome=outcome,
        parents=parents,
        task=row["task_id"],
        started_s=started_s,
    )


def _gap_s(row: Mapping[str, Any], parents: list[Mapping[str, Any]]) -> float:
    """Seconds between the end of the last parent and the start of the call: known on arrival."""
    if len(parents) == 1 and isfinite(parents[0]["gap_s"]):
        return float(max(0.0, parents[0]["gap_s"]))
    ends = [parent["t_start_s"] + parent["llm_s"] for parent in parents]
    if not ends or not all(map(isfinite, (*ends, row["t_start_s"]))):
        return nan
    return float(max(0.0, row["t_start_s"] - max(ends)))
