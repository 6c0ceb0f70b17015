"""The check of a GPU: its order and bounds on steps of a few lines, its steps on stub engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_kit import check, report, steps
from gpu_kit.steps import STEPS, StepInfo
from gpu_kit.steps._models import ON_CPU, ON_GPU, Models

ROOT = Path(__file__).parents[2]

FINE = """
from gpu_kit.steps._step import run
async def body(step):
    step.figure("size", 3)
    step.check("it holds", True, "yes")
    step.note("for a test")
run(body)
"""
BROKEN = FINE.replace('step.note("for a test")', "raise OSError('the disk is gone')")
UNTRUE = FINE.replace("True", "False")
ENDLESS = """
import asyncio, subprocess, sys
from gpu_kit.steps._step import run
async def body(step):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    step.figure("child", child.pid)
    await asyncio.sleep(600)
run(body)
"""
ENGINES = """
import asyncio
from gpu_kit.steps._step import run
from maestro_backend.bench import worker_of
from maestro_backend.scheduler import Residency
async def body(step):
    async with step.node({"a": step.models.random("small")}) as node:
        await node.set_residency("a", Residency.DEVICE)
        step.figure("child", (await worker_of(node, "a")).pid)
        HANG
run(body)
"""
HANGING = "import time\n" + ENDLESS.replace("await asyncio.sleep(600)", "time.sleep(600)")


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps of their own are found in `tmp_path`."""
    monkeypatch.setattr(steps, "__path__", [*steps.__path__, str(tmp_path)])
    (tmp_path / "sitecustomize.py").write_text(
        f"import gpu_kit.steps\ngpu_kit.steps.__path__.append({str(tmp_path)!r})\n"
    )
    paths = [str(tmp_path), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setattr(check, "_GRACE_S", 1.0)
    return tmp_path


def checked(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str, limit_s: float = 30, **code: str
) -> tuple[int, dict[str, Any]]:
    """The exit status, and what each step found."""
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text)
    infos = tuple(StepInfo(name, limit_s, 1, ("stub",), "a test") for name in code)
    monkeypatch.setattr(check, "STEPS", infos)
    status = check.main(["--engine", "stub", "--into", str(folder / "results"), *options])
    return status, load(folder / "results" / "results.json")["steps"]


def test_what_a_step_finds_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = checked(monkeypatch, folder, fine=FINE)
    assert status == 0
    assert told["fine"]["status"] == "done"
    assert told["fine"]["figures"] == {"size": 3}
    assert told["fine"]["checks"] == [{"check": "it holds", "holds": True, "told": "yes"}]
    assert told["fine"]["notes"] == ["for a test"]
    out = capsys.readouterr().out
    assert "ok  it holds: yes" in out and "1 of 1" in out


def test_a_step_that_breaks_off_keeps_none_of_the_others_from_running(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, told = checked(monkeypatch, folder, broken=BROKEN, fine=FINE)
    assert status == 1
    assert [told[name]["status"] for name in told] == ["failed", "done"]
    assert told["broken"]["figures"] == {"size": 3}, "found before it broke"
    assert "the disk is gone" in told["broken"]["log"]


def test_a_check_that_does_not_hold_is_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = checked(monkeypatch, folder, untrue=UNTRUE)
    assert (status, told["untrue"]["status"]) == (1, "done")
    assert "NOT: it holds: yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code",
    [
        ENDLESS,
        HANGING,
        ENGINES.replace("HANG", "await asyncio.sleep(600)"),
        ENGINES.replace("HANG", "import time; time.sleep(600)"),
    ],
)
def test_a_step_is_cut_off_and_all_its_processes_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    status, told = checked(monkeypatch, folder, limit_s=6, endless=code, fine=FINE)
    assert status == 1
    assert told["endless"]["status"] == "cut off"
    assert told["fine"]["status"] == "done"
    pid, until = told["endless"]["figures"]["child"], time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.05)


def test_findings_are_on_the_disk_while_a_step_goes_on(folder: Path) -> None:
    """A run that is killed from outside still tells."""
    (folder / "environment.py").unlink(missing_ok=True)
    (folder / "endless.py").write_text(ENDLESS)
    script = (
        "from gpu_kit import check; from gpu_kit.steps import StepInfo\n"
        "check.STEPS = (StepInfo('endless', 60, 1, ('stub',), 'a test'),)\n"
        f"check.main(['--engine', 'stub', '--into', {str(folder / 'results')!r}])\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    results = folder / "results" / "results.json"
    try:
        until = time.monotonic() + 30
        while not (results.exists() and load(results)["steps"]["endless"]["figures"]):
            assert time.monotonic() < until and run.poll() is None
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()
    told = load(results)["steps"]["endless"]
    assert told["status"] == "running"
    child = psutil.Process(told["figures"]["child"])
    step = child.parent()
    gone = [child, *([step] if step is not None else [])]
    for process in gone:
        process.kill()


def test_ctrl_c_ends_the_step_and_says_where_its_findings_are(folder: Path) -> None:
    (folder / "endless.py").write_text(ENDLESS)
    script = (
        "import sys; from gpu_kit import check; from gpu_kit.steps import StepInfo\n"
        "check.STEPS = (StepInfo('endless', 60, 1, ('stub',), 'a test'),)\n"
        f"sys.exit(check.main(['--engine', 'stub', '--into', {str(folder / 'results')!r}]))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    figures = folder / "results" / "steps" / "endless" / "figures.jsonl"
    try:
        until = time.monotonic() + 30
        while not report.read(figures):
            assert time.monotonic() < until and run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 130
    assert said.strip() == f"check: interrupted; what was found so far is in {folder / 'results'}"
    pid = report.read(figures)[0]["value"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_folder_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert check.main(["--engine", "stub", "--into", str(tmp_path / "file" / "below")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("check: ") and "file" in line


def test_no_step_begins_without_the_time_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, told = checked(monkeypatch, folder, "--budget", "0.5", fine=FINE)
    assert status == 0
    assert told["fine"] == {"status": "skipped", "reason": "0 s are left and it needs 1"}


def test_a_later_run_keeps_what_an_earlier_one_has_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked(monkeypatch, folder, one=FINE)
    _, told = checked(monkeypatch, folder, two=BROKEN)
    assert {name: step["status"] for name, step in told.items()} == {"one": "done", "two": "failed"}
    results = report.Results(folder / "results" / "results.json", "vllm", {})
    results.skipped("three", "a test")
    assert list(load(results.path)["steps"]) == ["three"], "figures of another engine"


def test_where_engines_do_not_start_the_other_steps_still_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in (("serve", BROKEN), ("sleep", FINE), ("contract", FINE)):
        (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(steps, "__path__", [str(folder)])
    site = (folder / "sitecustomize.py").read_text()
    (folder / "sitecustomize.py").write_text(
        "import gpu_kit.steps._step\n" + site.replace("append(", "insert(0, ")
    )
    infos = [
        StepInfo(name, 30, 1, ("stub",), "a test", name != "contract")
        for name in ("serve", "sleep", "contract")
    ]
    monkeypatch.setattr(check, "STEPS", tuple(infos))
    assert check.main(["--engine", "stub", "--into", str(folder / "results")]) == 1
    told = load(folder / "results" / "results.json")["steps"]
    assert [told[info.name]["status"] for info in infos] == ["failed", "skipped", "done"]
    assert "serve did not end well" in told["sleep"]["reason"]


def test_logs_and_raw_figures_come_in_one_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ENGINES.replace("HANG", "pass")
    status, _ = checked(monkeypatch, folder, engines=code)
    assert status == 0
    with tarfile.open(folder / "results" / "steps.tar.gz") as packed:
        names = set(packed.getnames())
    assert {"figures.jsonl", "log.txt"} <= {Path(name).name for name in names}
    assert any(name.endswith("logs/a.log") for name in names), "of the engine itself"


def test_steps_can_be_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, told = checked(monkeypatch, folder, "--skip", "one", one=FINE, two=FINE)
    assert list(told) == ["two"]


def test_a_step_for_a_gpu_says_so_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "STEPS", (StepInfo("gpu", 9, 1, ("vllm",), "a test"),))
    assert check.main(["--engine", "stub", "--into", str(folder)]) == 0
    told = load(folder / "results.json")["steps"]
    assert told["gpu"] == {"status": "skipped", "reason": "it needs vllm"}


def test_a_half_written_line_is_left_for_later(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    assert report.read(lines) == []
    lines.write_text('{"figure": "a", "value": 1}\n{"fig')
    assert report.read(lines) == [{"figure": "a", "value": 1}]


def test_every_step_is_there_and_has_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    there = {p.stem for p in Path(steps.__file__).parent.glob("*.py") if p.stem[0] != "_"}
    assert {info.name for info in STEPS} == there
    assert all(0 < info.least_s < info.limit_s for info in STEPS)
    with pytest.raises(SystemExit) as left:
        check.main(["--list"])
    assert left.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == len(STEPS)


def test_made_up_checkpoints_take_no_room_and_have_the_sizes_they_say(tmp_path: Path) -> None:
    """Only their headers are there: vLLM makes up the weights."""
    pytest.importorskip("transformers", reason="the tokenizer is made with it (make setup)")
    from safetensors import safe_open

    folder = Models("vllm", tmp_path).folder("small", "made-up")
    weights = folder / "model.safetensors"
    assert weights.stat().st_size > 2.4e9
    assert weights.stat().st_blocks * 512 < 2**20
    config = json.loads((folder / "config.json").read_text())
    with safe_open(str(weights), framework="pt") as file:
        names = set(file.keys())
        shape = file.get_slice("model.embed_tokens.weight").get_shape()
    assert shape == [config["vocab_size"], config["hidden_size"]] == [128256, 2048]
    assert names == {name for name, _ in ON_GPU["small"].tensors()}


@pytest.mark.parametrize("size", ON_CPU)
def test_the_tensors_are_those_of_a_llama(size: str) -> None:
    torch = pytest.importorskip("torch", reason="torch comes with the engine (make setup)")
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**ON_CPU[size].config()))
    named = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert named == dict(ON_CPU[size].tensors())


@pytest.mark.parametrize(
    "names",
    [
        ("environment", "serve", "shortage"),
        ("sleep", "tiers"),
        ("kv", "profile"),
        ("faults",),
    ],
)
def test_the_steps_hold_on_stub_engines(tmp_path: Path, names: tuple[str, ...]) -> None:
    environment = {**os.environ, "MAESTRO_GPU_PYTHON": sys.executable}
    command = [ROOT / "scripts" / "gpu" / "check", "--engine", "stub", "--into", tmp_path / "r"]
    done = subprocess.run(
        [*map(str, command), "--only", *names], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = load(tmp_path / "r" / "results.json")["steps"]
    assert {name: step["status"] for name, step in told.items()} == dict.fromkeys(names, "done")
