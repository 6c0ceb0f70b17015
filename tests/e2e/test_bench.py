"""`maestro bench` on stub engines: the figures mean nothing, their shape does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from maestro_backend.bench._switches import Watch, hidden
from maestro_backend.scheduler import WorkerState

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
        assert system["failed_activations"] == 0
        assert system["peak_bytes"] > 0
        assert {"switch_time_hidden", "switches", "peak_bytes"} <= set(system)


def test_which_activations_count() -> None:
    """One that came to nothing is told apart; a start that is tried again is one activation."""
    watch = Watch()
    told = [
        ("a", WorkerState.SUSPENDED, 0.0),
        ("a", WorkerState.RESUMING, 1.0),
        ("a", WorkerState.SUSPENDED, 2.0),
        ("a", WorkerState.RESUMING, 3.0),
        ("a", WorkerState.READY, 5.0),
        ("b", WorkerState.STARTING, 5.0),
        ("b", WorkerState.RESTARTING, 6.0),
        ("b", WorkerState.READY, 9.0),
        ("a", WorkerState.SUSPENDING, 9.0),
        ("a", WorkerState.SUSPENDED, 10.0),
    ]
    for model, state, now in told:
        watch.worker(model, state, now)
    assert [(s.model, s.seconds) for s in watch.switches] == [("a", 2.0), ("b", 4.0)]
    assert (watch.failed, watch.put_aside) == (1, 1)


def test_what_calls_wait_for_an_activation() -> None:
    """Two calls wait three of its four seconds; the third comes later, to a model announced."""
    watch = Watch()
    watch.worker("a", WorkerState.RESUMING, 10.0)
    watch.worker("a", WorkerState.READY, 14.0)
    call = {"model": "a", "arrived": 11.0, "dispatched": 14.0, "lead_s": 1.0}
    watch.account([call, call, {**call, "arrived": 20.0, "dispatched": 20.0, "lead_s": 9.0}])
    [switch] = watch.switches
    assert (switch.blocked_s, switch.longest_s, switch.calls) == (6.0, 3.0, 3)
    assert not switch.hideable
    assert hidden(watch.switches) == -0.5
    assert hidden(watch.switches, longest=True) == 0.25


def test_nonsense_is_refused_by_name(tmp_path: Path) -> None:
    command = [*MAESTRO, "bench", "residency", "--engine", "stub", "--cycles", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert run.returncode == 2
    assert "--cycles must be at least 1" in run.stderr
