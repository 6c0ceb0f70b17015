"""Agentic Mooncake: what is written is read again, and files of others are understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workloads.making import mix, model

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import SimCall, SimRun, Template
from maestro_backend.workloads import (
    export_mooncake,
    prepare,
    read_arrivals,
    read_mooncake,
    read_workflows,
)

CALLS = (
    SimCall("plan", "big", 256, 64, role="planner"),
    SimCall("work", "small", 130, 30, role="worker", after=(0,), gap_s=2.5),
    SimCall("work", "small", 130, 70, role="worker", after=(0,), gap_s=0.25),
    SimCall("plan", "big", 400, 9, "planner", (1, 2), 7.0, True, prefix_of=0, prefix_tokens=256),
)
RUN = Template("made", "one", CALLS, "desk")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def request(name: str, *wait_for: str, **given: Any) -> dict[str, Any]:
    return {
        "request_id": name,
        "wait_for": list(wait_for),
        "input_length": 100,
        "output_length": 5,
        "hash_ids": [1, 2],
    } | given


def test_runs_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    runs = [SimRun("r0", 3.0, RUN), SimRun("r1", 8.5, RUN)]
    assert export_mooncake(path, runs) == 8
    first, second = read_mooncake(path)
    assert (first.run, first.at, second.run, second.at) == ("r0", 0.0, "r1", 5.5)
    assert first.template == Template("made", "r0", CALLS, "desk")
    assert second.template.calls == CALLS


def test_what_is_written_says_what_dynamo_reads(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    export_mooncake(path, [SimRun("r0", 3.0, RUN)])
    plan, left, right, join = lines(path)
    assert (plan["timestamp"], plan["prefix_reset"], plan["branches"]) == (3000.0, True, ["r0/1"])
    assert "wait_for" not in plan and "timestamp" not in left
    assert (left["wait_for"], left["tool_wait_ms"]) == (["r0/0"], 2500.0)
    assert (join["wait_for"], join["delay"]) == (["r0/1", "r0/2"], 7000.0)
    assert plan["session_id"] == join["session_id"] != left["session_id"] == right["session_id"]
    assert [len(row["hash_ids"]) for row in (plan, left, join)] == [4, 3, 7]
    assert join["hash_ids"][:4] == plan["hash_ids"]
    assert not {*left["hash_ids"]} & {*right["hash_ids"], *plan["hash_ids"]}


def test_prefixes_are_kept_in_whole_blocks(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    export_mooncake(path, [SimRun("r0", 0.0, RUN)], block_tokens=100)
    (run,) = read_mooncake(path)
    assert (run.template.calls[3].prefix_of, run.template.calls[3].prefix_tokens) == (0, 200)


def test_a_file_of_others_is_put_together_by_what_ties_requests(tmp_path: Path) -> None:
    rows = [
        request("a", session_id="main", timestamp=1000.0, branches=["b"]),
        request("c", "a", "b", session_id="main", delay=200.0, tool_wait_ms=300, hash_ids=[1, 9]),
        request("b", session_id="child", timestamp=1500.0, hash_ids=[7, 8]),
        request("z", timestamp=5000.0, tool_events=[{"tool_class": "shell"}], priority=3),
    ]
    both, alone = read_mooncake(written(tmp_path / "theirs.jsonl", rows))
    assert (both.at, alone.at) == (0.0, 4.0)
    assert both.template.key == ("theirs", "main")
    calls = both.template.calls
    assert [c.stage for c in calls] == ["turn", "branch", "turn"]
    assert [c.after for c in calls] == [(), (), (0, 1)]
    assert [c.gap_s for c in calls] == pytest.approx([0.0, 0.5, 0.5])
    assert (calls[2].prefix_of, calls[2].prefix_tokens) == (0, 64)
    assert len(alone.template.calls) == 1


def test_upstream_names_and_missing_lengths_are_understood(tmp_path: Path) -> None:
    rows = [
        {"request_id": "a", "input_tokens": 90, "output_tokens": 5, "hash_ids": [1, 2, 3]},
        {"request_id": "b", "wait_for": ["a"], "delay_ms": 50, "output_length": 5, "hash_ids": [1]},
    ]
    (run,) = read_mooncake(written(tmp_path / "old.jsonl", rows))
    assert [(c.prompt_tokens, c.gap_s) for c in run.template.calls] == [(90, 0.0), (32, 0.05)]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([], "has no request"),
        ([{"timestamp": 1, "output_length": 1}], "plain Mooncake"),
        ([request("a", output_length=-1)], "line 1: output_length"),
        ([request("a"), request("a")], "twice"),
        ([request("a", "b")], "waits for b, which is not there"),
        ([request("a", "b"), request("b", "a")], "in a circle"),
        ([request("a", delay=-5.0)], "line 1: delay"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, rows: list[dict[str, Any]], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        read_mooncake(written(tmp_path / "bad.jsonl", rows))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"request_id": "a", "output_length": 3}\n{"requ')
    with pytest.raises(ConfigError, match="line 2"):
        read_mooncake(tmp_path / "bad.jsonl")


def test_a_jsonl_path_is_a_workload_and_its_times_are_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    export_mooncake(path, [SimRun(f"r{at}", float(at), RUN) for at in range(3)])
    found = read_workflows([path])
    assert [t.name for t in found.templates] == ["r0", "r1", "r2"]
    assert [(r.source, r.run, len(r.calls)) for r in found.runs] == [
        ("made", f"r{at}", 4) for at in range(3)
    ]
    shape = found.runs[0].calls[1]
    assert (shape.shape.stage, shape.shape.prompt_tokens, shape.parents) == ("work", 130, (0,))
    assert next(read_arrivals(path).gaps(4.0, 1)) == pytest.approx(0.25)


def test_models_named_by_the_file_are_kept_or_the_nearest_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    export_mooncake(path, [SimRun("r0", 0.0, RUN)])
    found = read_workflows([path])
    same = {m.name: m for m in (model("small", 6), model("big", 30))}
    other = {m.name: m for m in (model("a", 5), model("b", 25))}
    assert [c.model for c in prepare(found, mix(), same)[0].calls] == [c.model for c in CALLS]
    assert [c.model for c in prepare(found, mix(), other)[0].calls] == ["b", "a", "a", "b"]
