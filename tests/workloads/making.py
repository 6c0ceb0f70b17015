"""What the tests of workloads share: rows of a trace, models, a small mix."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import pytest

from maestro_backend.simulator import ModelGeometry, SimCall, Template
from maestro_backend.workloads import Mix


def row(run: str, index: int, parents: Sequence[int] = (), **given: Any) -> dict[str, Any]:
    """One call as the recorded traces have it."""
    return {
        "source": "made",
        "app": "desk",
        "workflow_id": run,
        "task_id": run,
        "call_idx": index,
        "stage": "turn",
        "role": "agent",
        "role_kind": "tool_agent",
        "parents": list(parents),
        "model": "some-api",
        "out_format": "chat",
        "n_tools": 0,
        "n_msgs": 2,
        "prompt_chars": 400,
        "prompt_lines": 4,
        "prompt_code_chars": 0,
        "prompt_tokens": 100,
        "cached_prefix_tokens": -1,
        "output_tokens": 10,
        "finish": "",
        "t_start_s": nan,
        "llm_s": nan,
        "gap_s": nan,
    } | given


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="traces are parquet files")
    from pyarrow import parquet as files

    files.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def model(name: str, gigabytes: float = 6.0, context: int = 4096) -> ModelGeometry:
    size = int(gigabytes * 1e9)
    return ModelGeometry(name, size // 2, size, 28, 8, 128, max_model_len=context)


def mix(**given: Any) -> Mix:
    """Two models; `made` is interactive, its agents on `big` and its users on `small`."""
    source = {
        "slo": "interactive",
        "weight": 0.5,
        "tenant": "desk",
        "models": {"tool_agent": "big", "user_sim": "small"},
    }
    return Mix.model_validate(
        {
            "models": {"small": "6GB", "big": "30GB"},
            "kinds": {"judge": "big"},
            "sources": {"made": source},
            "deadlines": {"fixed": {"interactive": 60, "standard": "5m"}},
        }
        | given
    )


def template(name: str, calls: int, source: str = "made", slo: str = "interactive") -> Template:
    chain = tuple(
        SimCall("turn", "small", 100, 10, after=(at - 1,) if at else ()) for at in range(calls)
    )
    return Template(source, name, chain, "desk", slo)
