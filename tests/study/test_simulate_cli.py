"""`maestro simulate`: what it refuses before it simulates, and a small study from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightgbm")
pytest.importorskip("pyarrow")

from pyarrow import parquet

from maestro_backend.cli import main
from maestro_backend.clusters import load_cluster
from maestro_backend.simulator import SYSTEMS, Cluster, Template, idle_service
from maestro_backend.study import Job, Named, Plan, Scene, make_scene, read, run_job, saturation
from maestro_backend.workloads import backlog, load_mix, prepare, read_workflows

SMALL = (
    "--workflows synthetic:mixed --cluster single --policies fcfs,edf --load 0.8 --seeds 2 "
    "--calls 300 --saturation 0.5 --deadline proportional:2.5 --deadline proportional:4"
)


def simulate(*words: str) -> int:
    return main(["simulate", *words])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("", "name the runs to replay: --workflows PATH"),
        ("--workflows nowhere.parquet", "nowhere.parquet"),
        ("--workflows synthetic:wild", "synthetic:wild"),
        ("--policies edff", "did you mean 'edf'?"),
        ("--policies ,", "--policies names nothing"),
        ("--load 0", "--load takes numbers above 0, such as 0.8,1.2; got '0'"),
        ("--load 1,x", "got 'x'"),
        ("--load inf", "got 'inf'"),
        ("--load nan", "got 'nan'"),
        ("--calls 0", "--calls must be at least 1, got 0"),
        ("--calls 1", "--calls 1 leaves no run to measure (seed 0): take more"),
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--saturation 0", "--saturation must be above 0, got 0"),
        ("--jobs 0", "--jobs must be at least 1, got 0"),
        ("--deadline never", "never"),
        ("--deadline proportional:-1", "proportional:-1"),
        ("--arrivals nowhere.parquet", "nowhere.parquet"),
        ("--cluster papr", "papr"),
        ("--mix papr", "papr"),
        ("--model nowhere", "nowhere"),
        ("--json no/where.json", "there is no folder no to write no/where.json in"),
        ("--dump no/where.parquet", "there is no folder no to write"),
        ("--table no/where.md", "there is no folder no to write"),
        ("--plots no/where", "there is no folder no to write"),
        ("--export-mooncake no/where.jsonl", "there is no folder no to write"),
        ("--json .", ". is a folder: name a file to write"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_simulated(
    words: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("maestro_backend.study._setting.saturation", refuse)
    monkeypatch.setattr("maestro_backend.study._study.simulate", refuse)
    given = [] if not words or "--workflows" in words else ["--workflows", "synthetic:mixed"]
    assert simulate(*given, *words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("maestro: error: ")
    assert why in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("this simulates")


def test_what_is_replayed_is_not_learned_from(capsys: pytest.CaptureFixture[str]) -> None:
    learned = ("--policies", "maestro", "--history", "synthetic:mixed")
    assert simulate(*SMALL.split(), *learned) == 2
    assert "is in --history and in --workflows" in capsys.readouterr().err


@pytest.fixture(scope="module")
def crowd() -> tuple[Plan, Scene]:
    """A load at which order matters, and two deadlines that order runs differently."""
    systems = (*(one for one in SYSTEMS.values() if not one.uses_deadlines), SYSTEMS["edf"])
    asked = Plan(systems, (3.0,), ("proportional:1.2", "fixed:interactive"), 1, 400)
    named = Named(("synthetic:mixed",), cluster="paper", saturation=0.3)
    return asked, make_scene(named, read(named), asked)


def finishes(job: Job, crowd: tuple[Plan, Scene]) -> list[list[float]]:
    """Of the job's runs, with each deadline."""
    found = (run_job(replace(job, deadlines=(kind,)), *crowd) for kind in crowd[0].deadlines)
    return [[row.finish for row in result.cells[0].rows] for result in found]


def test_who_says_so_reads_no_deadline(crowd: tuple[Plan, Scene]) -> None:
    for job in crowd[0].jobs():
        first, second = finishes(job, crowd)
        assert (first != second) == job.system.uses_deadlines, job


def test_policies_say_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--list-policies") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SYSTEMS)
    assert "[a bound: not ranked]" in next(line for line in lines if line.startswith("oracle"))


def with_nodes(*names: str) -> Cluster:
    """Each with one device that holds one model."""
    single = load_cluster("single")
    (device,) = single.nodes[0].devices
    alone = replace(single.nodes[0], devices=(replace(device, models=(device.static,)),))
    models = {device.static: single.models[device.static]}
    return replace(single, nodes=tuple(replace(alone, name=n) for n in names), models=models)


def test_load_one_is_what_a_device_can_serve() -> None:
    one, two = with_nodes("a"), with_nodes("a", "b")
    mix, service = load_mix("paper"), idle_service(one)
    templates = prepare(read_workflows(["synthetic:mixed"]), mix, one.models)

    def waiting(calls: int, seed: int) -> Iterator[Template]:
        return backlog(templates, mix, calls, seed)

    alone = saturation(one, service, waiting, 60, 240)
    # Not quite twice: a call on the other device finds no prefix there.
    assert 1.5 < saturation(two, service, waiting, 60, 240) / alone < 2.1
    # Batches of at most 64: never more than so many runs' work at once.
    calls = [call for template in templates for call in template.calls]
    work_s = sum(service(c.model, c.prompt_tokens, c.output_tokens, 0) for c in calls)
    assert 1.0 < alone * work_s / len(templates) < 64.0


def test_a_small_study_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    outputs = "--json a.json --dump a.parquet --table a.md --plots p --export-mooncake a.jsonl"
    assert simulate(*SMALL.split(), "--jobs", "2", *outputs.split()) == 0
    assert capsys.readouterr().out == (tmp_path / "a.md").read_text()
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["cells"]) == 2 * 2 * 2
    assert found["saturation_runs_per_s"] == 0.5
    assert all(0 < cell["runs"] < 300 for cell in found["cells"])
    assert len(list((tmp_path / "p").iterdir())) == 5
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for cell in found["cells"]:
        mine = [row for row in rows if is_of(row, cell)]
        attained = sum(row["finish"] <= row["deadline"] for row in mine) / len(mine)
        assert attained == cell["slo_attainment"]
    assert all(math.isnan(row["finish"]) or row["finish"] > row["arrival"] for row in rows)

    assert simulate(*SMALL.split(), "--jobs", "1", "--json", "-") == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "a.json").read_text()


def is_of(row: dict[str, object], cell: dict[str, object]) -> bool:
    names = {"policy": "policy", "load": "load", "deadline_kind": "deadline", "seed": "seed"}
    return all(row[mine] == cell[theirs] for mine, theirs in names.items())
