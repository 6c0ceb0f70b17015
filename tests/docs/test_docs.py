"""What README and docs say is run, parsed or looked up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from e2e.served import maestro

from maestro_agents.testing import StubEngine
from maestro_backend.cli import main
from maestro_backend.config import Config, ModelConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "adapters/**/README.md", "examples/*/README.md")
    for page in ROOT.glob(pattern)
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_readme_runs_annotated(code: str) -> None:
    with StubEngine(("smollm2-135m",)) as stub:
        done = subprocess.run(
            (sys.executable, "-W", "error", "-c", code),
            env={**os.environ, "MAESTRO_BASE_URL": stub.base_url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        [request] = stub.requests
    assert request.headers["x-maestro-stage"] == "plan"
    assert request.body["maestro"]["role"] == "planner"


def test_the_adapter_that_the_page_writes_works() -> None:
    page = (ROOT / "adapters" / "README.md").read_text(encoding="utf-8")
    [code] = blocks("python", page)
    with StubEngine(("m",)) as stub:
        done = subprocess.run(
            (sys.executable, "-W", "error", "-c", code + USE_THE_ADAPTER),
            env={**os.environ, "MAESTRO_BASE_URL": stub.base_url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        first, second = stub.requests
    assert [r.headers["x-maestro-stage"] for r in (first, second)] == ["plan", "write"]
    assert first.headers["x-maestro-workflow"].startswith("essay@")
    assert first.body["maestro"]["role"] == "planner"
    [following] = first.body["maestro"]["announcement"]["successors"]
    assert following == {"stage": "write", "certain": True}


USE_THE_ADAPTER = """
import os
from openai import OpenAI
from maestro_agents import _adapters

_adapters.adapters = lambda: (adapter,)

def ask(text):
    with OpenAI(base_url=os.environ["MAESTRO_BASE_URL"], api_key="x") as client:
        messages = [{"role": "user", "content": text}]
        reply = client.chat.completions.create(model="m", messages=messages)
    return reply.choices[0].message.content

@agent(role="planner")
def plan(text):
    return ask(text)

def write(text):
    return ask(text)

line = Line(plan, write)
assert type(workflow(line, name="essay")) is Line and line.watcher is None
assert workflow(line, name="essay").run("hi")
"""


CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [*blocks("yaml"), *blocks("yaml", CONFIGURATION)])
def test_yaml_on_the_pages_is_a_valid_config(text: str) -> None:
    assert Config.parse(yaml.safe_load(text)).models


def test_every_key_of_a_model_is_explained() -> None:
    assert all(f"`{key}`" in CONFIGURATION for key in ModelConfig.model_fields)


def test_the_curl_of_the_readme_works(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    [command] = [block for block in blocks("bash") if block.startswith("curl ")]
    with maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as served:
        command = command.replace("http://127.0.0.1:8000", served.url.removesuffix("/v1"))
        done = subprocess.run(
            ("bash", "-c", command), capture_output=True, text=True, timeout=60, check=False
        )
    for part in ('"chat.completion"', '"workers"', "run_not_found", "maestro_calls_total"):
        assert part in done.stdout, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_link_on_a_page_exists(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for command in set(re.findall(r"(?:`|^|bin/)maestro ([a-z]+)", text, re.MULTILINE)):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, f"maestro {command}"
        capsys.readouterr()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
