"""Each shape as a user runs it: an app of its own against `maestro serve` on stub engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e.served import maestro

from benchmarks.announcement_quality import EXAMPLES, TRUTHS, app, truth
from maestro_agents.testing import StubEngine

OURS = "graph = workflow("


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    state = tmp_path_factory.mktemp("served")
    with maestro("serve", "--engine", "stub", "--port", "0", state=state) as served:
        yield served.url


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Any:
    def run(shape: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(EXAMPLES / f"{shape}.py"), *arguments],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join([*sys.path, str(installed)]),
                **environment,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def followed(url: str, shape: str) -> dict[str, Any]:
    """The one run of a shape, once the gateway has heard of its end."""
    deadline = time.monotonic() + 30
    while True:
        runs = httpx.get(f"{url}/maestro/state").json()["runs"]
        (found,) = [run for run in runs if run["workflow"].startswith(f"{shape}@")]
        if found["ended"] is not None or time.monotonic() > deadline:
            view: dict[str, Any] = httpx.get(f"{url}/maestro/runs/{found['run']}").json()
            return view
        time.sleep(0.05)


@pytest.mark.parametrize("shape", TRUTHS)
def test_a_shape_runs_on_maestro_and_is_followed(run: Any, url: str, shape: str) -> None:
    done = run(shape, "Is it so?", "--json", MAESTRO_BASE_URL=url)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["question"] == "Is it so?" and result["answer"]

    view = followed(url, shape)
    assert view["ended"] is not None and view["failed"] is False
    graph = truth(shape)
    stages = [call["stage"] for call in view["calls"]]
    assert {*stages} <= {stage.path for stage in graph.stages}
    assert {call["status"] for call in view["calls"]} == {"done"}
    assert len({(call["stage"], call["instance"]) for call in view["calls"]}) == len(stages) >= 2
    assert view["lead_time_s"]["foreseen"] > 0
    assert view["forecast"] == []


@pytest.mark.parametrize("shape", TRUTHS)
def test_a_shape_runs_on_any_openai_server(run: Any, shape: str) -> None:
    with StubEngine(models=("other",)) as stub:
        done = run(shape, OPENAI_BASE_URL=stub.base_url, OPENAI_API_KEY="x", MODEL="other")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() and not done.stdout.startswith("{")
    assert not [name for r in stub.requests for name in r.headers if name.startswith("x-maestro")]


@pytest.mark.parametrize("shape", TRUTHS)
def test_poor_replies_do_not_stop_a_shape(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token is not enough for any JSON: every structured reply is cut off."""
    with StubEngine(models=("other",)) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.base_url)
        with app(shape, "", "other") as module:
            module.model.max_tokens = 1
            result = module.graph.invoke({"question": "Is it so?"})
    assert result["answer"]
    assert 2 <= len(stub.requests) < 30, "every loop has its bound"


@pytest.mark.parametrize("shape", TRUTHS)
def test_a_shape_is_short_and_one_line_of_it_is_about_maestro(shape: str) -> None:
    lines = (EXAMPLES / f"{shape}.py").read_text().splitlines()
    assert len(lines) <= 120
    assert sum(line.startswith(OURS) for line in lines) == 1


def test_without_a_server_a_shape_says_what_to_set(run: Any) -> None:
    done = run("reflection")
    assert done.returncode != 0
    assert "OPENAI_BASE_URL" in done.stderr and "Traceback" not in done.stderr
