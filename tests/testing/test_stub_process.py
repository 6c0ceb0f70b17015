"""The stub as its own process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]
BODY = {"messages": [{"role": "user", "content": "x"}]}


@contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A stub process and the line that it prints when it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "maestro_agents.testing", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline()
        finally:
            process.kill()


def origin(line: str) -> str:
    return line.rsplit(" ", 1)[1].strip()


def test_it_serves_its_models_on_a_free_port_and_ends_cleanly_on_sigterm() -> None:
    with started("--port", "0", "--model", "a", "--model", "b") as (process, line):
        models = httpx.get(f"{origin(line)}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["a", "b"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_it_ends_cleanly_while_a_request_hangs_and_removes_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "stub.sock"
    with started("--uds", str(path)) as (process, line):
        assert origin(line) == str(path)
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://stub", timeout=0.2) as http:
            http.post("/stub/fault", json={"kind": "hang"}).raise_for_status()
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=BODY)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not path.exists()


def test_a_planned_death_comes_after_the_planned_tokens() -> None:
    with started("--port", "0", "--output-tokens", "9") as (process, line):
        fault = {"kind": "die", "after_tokens": 4}
        httpx.post(f"{origin(line)}/stub/fault", json=fault).raise_for_status()
        got: list[str] = []
        with (
            pytest.raises(httpx.TransportError),
            httpx.stream(
                "POST", f"{origin(line)}/v1/completions", json={"prompt": "x", "stream": True}
            ) as reply,
        ):
            got.extend(part for part in reply.iter_lines() if part)
        assert len(got) == 4
        assert process.wait(10) == 1


def test_its_options_reach_the_engine() -> None:
    with started("--port", "0", "--output-tokens", "9", "--reasoning-tokens", "5") as (_, line):
        usage = httpx.post(f"{origin(line)}/v1/chat/completions", json=BODY).json()["usage"]
    assert usage["completion_tokens"] == 14
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 5}


def test_a_taken_port_is_one_clear_line() -> None:
    with started("--port", "0") as (_, line):
        port = origin(line).rsplit(":", 1)[1]
        second = subprocess.run(
            [sys.executable, "-m", "maestro_agents.testing", "--port", port],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert second.returncode == 2
    assert second.stderr.startswith("stub: cannot listen on")
    assert second.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_tied_stub_dies_with_its_parent() -> None:
    parent = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-m', 'maestro_agents.testing', '--port', '0'], "
        "stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=ROOT,
        env={**os.environ, "MAESTRO_TIED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
        gone, alive = psutil.wait_procs([child], timeout=10)
    assert (len(gone), alive) == (1, [])
