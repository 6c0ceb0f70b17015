"""`examples/research_team` as a user runs it: unchanged, with and without Maestro."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sdk.recording_backend import RecordingBackend

from maestro_agents.testing import StubEngine

APP = Path(__file__).parents[3] / "examples" / "research_team" / "app.py"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Any:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(APP), *arguments],
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


def test_on_any_openai_server(run: Any, stub: StubEngine) -> None:
    before = len(stub.requests)
    done = run("What is prefill?", "--json", OPENAI_BASE_URL=stub.base_url, OPENAI_API_KEY="x")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer["question"] == "What is prefill?"
    assert answer["draft"]
    assert 1 <= answer["rounds"] <= 2
    made = stub.requests[before:]
    assert not [name for r in made for name in r.headers if name.startswith("x-maestro")]
    assert not [r for r in made if "maestro" in r.body]


def test_under_maestro(run: Any, stub: StubEngine) -> None:
    with RecordingBackend(stub.base_url) as backend:
        done = run("--json", MAESTRO_BASE_URL=backend.base_url)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    width = len(answer["sub_questions"])
    calls = Counter(head["x-maestro-stage"] for head, _ in backend.chats)
    assert calls == {
        "planner": 1,
        "researcher/ask": width,
        "researcher/summarise": width,
        "writer": answer["rounds"],
        "critic": answer["rounds"],
    }
    models = {head["x-maestro-stage"]: body["model"] for head, body in backend.chats}
    assert (models["critic"], models["writer"]) == ("tiny-llama", "smollm2-135m")
    assert all(body["maestro"]["slo"]["class"] == "interactive" for _, body in backend.chats)
    ((_, content),) = backend.workflows
    assert content["name"] == "research_team"
    (events,) = backend.events.values()
    assert events[0]["type"] == "run_started"
    assert events[-1] == {**events[-1], "type": "run_ended", "failed": False}
    assert [e["tool"] for e in events if e["type"] == "tool_ended"] == ["search_notes"] * width


def test_a_plain_answer(run: Any, stub: StubEngine) -> None:
    done = run(OPENAI_BASE_URL=stub.base_url, RESEARCH_MODEL="stub", CRITIC_MODEL="stub")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "{" not in done.stdout


def test_poor_structured_output_does_not_stop_it(run: Any) -> None:
    """Two tokens are not enough for any JSON: every reply is cut off."""
    with StubEngine(models=("stub",), output_tokens=2) as stub:
        done = run(
            "--json", OPENAI_BASE_URL=stub.base_url, RESEARCH_MODEL="stub", CRITIC_MODEL="stub"
        )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["sub_questions"]) == 2


def test_without_a_server_it_says_what_to_set(run: Any) -> None:
    done = run()
    assert done.returncode != 0
    assert "OPENAI_BASE_URL" in done.stderr and "Traceback" not in done.stderr


def test_one_line_of_it_is_about_maestro() -> None:
    tree = ast.parse(APP.read_text())
    ours = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "workflow"]
    assert len(ours) == 1
