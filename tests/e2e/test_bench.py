"""`maestro bench` on stub engines: the figures mean nothing, their shape does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MAESTRO = (sys.executable, "-m", "maestro_backend._tied", sys.executable, "-m", "maestro_backend")


def bench(name: str, *arguments: str, folder: Path) -> dict[str, Any]:
    """The JSON object: the last line on stdout, and the only one."""
    command = [*MAESTRO, "bench", name, "--engine", "stub", "--json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert run.returncode == 0, run.stderr
    [line] = run.stdout.splitlines()
    return dict(json.loads(line))


def test_residency(tmp_path: Path) -> None:
    result = bench("residency", "--cycles", "2", "--starts", "1", folder=tmp_path)
    assert result["cold_start_s"]["median"] > 0
    for tier, count in (("host", 2), ("parked", 2), ("disk", 1)):
        assert result["activation_s"][tier]["n"] == count
        assert result["activation_s"][tier]["median"] > 0
    assert result["outputs_identical"] is True
    assert {"freed_bytes", "rss_drift"} <= set(result)


def test_kv(tmp_path: Path) -> None:
    result = bench("kv", "--step-s", "0.1", folder=tmp_path)
    assert result["failed"] == 0
    assert result["served"] > 0
    assert result["outputs_identical"] is True
    assert len({step["limit_bytes"] for step in result["steps"]}) > 3
    assert {"shrink", "grow"} == set(result["time_to_applied_s"])


def test_colocation(tmp_path: Path) -> None:
    result = bench("colocation", "--runs", "1", "--systems", "lru", "maestro", folder=tmp_path)
    assert result["failed"] == 0
    assert set(result["systems"]) == {"lru", "maestro"}
    for system in result["systems"].values():
        assert system["calls"] == 12
        assert system["over_budget"] is False
        assert system["peak_bytes"] > 0
        assert {"switch_time_hidden", "switches", "peak_bytes"} <= set(system)


def test_nonsense_is_refused_by_name(tmp_path: Path) -> None:
    command = [*MAESTRO, "bench", "residency", "--engine", "stub", "--cycles", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert run.returncode == 2
    assert "--cycles must be at least 1" in run.stderr
