"""Workflows from where the user says: parquet traces, Mooncake JSONL, or made up."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor import read_traces

from ._mooncake import read_mooncake
from ._recorded import Kinds, Recorded, from_examples, from_templates
from ._synthetic import PREFIX, synthetic

_KIND_COLUMNS = ("source", "stage", "role", "role_kind")


def read_workflows(paths: Iterable[str | Path]) -> Recorded:
    """All runs of the paths, in order.

    A path is a parquet file or a folder of them, one row per call; a `.jsonl` file in the agentic
    Mooncake form; or `synthetic:NAME`.

    Raises:
        ConfigError: a path cannot be read, or a run is there twice.
    """
    given = [str(path) for path in paths]
    if not given:
        raise ConfigError("there are no workflows: name at least one file or folder of traces")
    made = [_one(path) for path in given if _is_special(path)]
    tables = [Path(path) for path in given if not _is_special(path)]
    if tables:
        made.append(from_examples(read_traces(tables), _kinds(tables)))
    return _joined(made)


def _is_special(path: str) -> bool:
    return path.startswith(PREFIX) or path.endswith(".jsonl")


def _one(path: str) -> Recorded:
    if path.startswith(PREFIX):
        return from_templates(synthetic(path))
    return from_templates(run.template for run in read_mooncake(Path(path)))


def _joined(parts: list[Recorded]) -> Recorded:
    templates = tuple(template for part in parts for template in part.templates)
    seen: set[tuple[str, str]] = set()
    for template in templates:
        if template.key in seen:
            raise ConfigError(
                f"run {template.name!r} of source {template.source!r} is there twice: "
                "name each trace once"
            )
        seen.add(template.key)
    if not templates:
        raise ConfigError("there is no run in the workflows: name a trace that has rows")
    runs = tuple(run for part in parts for run in part.runs)
    return Recorded(templates, runs, {key: kind for p in parts for key, kind in p.kinds.items()})


def _kinds(paths: Iterable[Path]) -> Kinds:
    """Kinds of roles, of files that `read_traces` has read. Without the column none is known."""
    from pyarrow import parquet

    kinds: dict[tuple[str, str, str], str] = {}
    for path in paths:
        for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
            if "role_kind" not in parquet.read_schema(file).names:
                continue
            table = parquet.read_table(file, columns=list(_KIND_COLUMNS))
            for row in table.group_by(list(_KIND_COLUMNS)).aggregate([]).to_pylist():
                kinds[row["source"], row["stage"], row["role"]] = row["role_kind"] or ""
    return kinds
