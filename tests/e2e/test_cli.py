"""The command line with real processes on the stub engine: what a user sees and is left with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from e2e.served import Command, all_gone, chat, end_workers, maestro
from node.nodes import survivors

from maestro_backend.defaults import BIG, SMALL


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "maestro_backend", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_serve_answers_both_models_and_stops_clean_on_either_signal(tmp_path: Path) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        with maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as served:
            for model in (BIG, SMALL):
                assert chat(served.url, model).status_code == 200
            family = served.family()
            assert len(family) >= 3, "the agent and two workers"
            assert served.stop(signum) == 0
            assert all_gone(family)
            assert served.lines[-1] == "maestro: stopped"


def pids(url: str) -> dict[str, int]:
    """The process of each worker, as the server tells it."""
    workers = httpx.get(f"{url}/maestro/state").json()["workers"]
    return {worker["model"]: worker["pid"] for worker in workers}


def agent_of(served: Command) -> psutil.Process:
    return next(p for p in served.family() if "maestro_backend.node" in p.cmdline())


def test_the_workers_of_a_killed_gateway_are_adopted_by_the_next(tmp_path: Path) -> None:
    with end_workers(tmp_path):
        with maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as served:
            for model in (BIG, SMALL):
                assert chat(served.url, model).status_code == 200
            agent, workers = agent_of(served), pids(served.url)
            served.process.kill()
            assert all_gone([agent]), "it leaves, but does not stop them"
        alive = [psutil.Process(pid) for pid in workers.values()]
        with maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as again:
            for model in (BIG, SMALL):
                assert chat(again.url, model).status_code == 200
            assert pids(again.url) == workers
            assert set(survivors(alive, timeout=0)) == set(alive)
            assert again.stop(signal.SIGTERM) == 0
        assert survivors(alive, timeout=0) == []


def test_a_second_server_on_the_same_state_is_refused(tmp_path: Path) -> None:
    arguments = ("serve", "--engine", "stub", "--port", "0")
    with maestro(*arguments, state=tmp_path) as served:
        assert chat(served.url, BIG).status_code == 200
        with maestro(*arguments, state=tmp_path) as second:
            assert second.process.wait(30) == 2
            line = second.wait_for("another node agent")
        assert f"pid {agent_of(served).pid}" in line and line.startswith("maestro: error: ")
        assert chat(served.url, BIG).status_code == 200


def test_a_demo_runs_beside_a_server(tmp_path: Path) -> None:
    with maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as served:
        for model in (BIG, SMALL):
            assert chat(served.url, model).status_code == 200
        workers = pids(served.url)
        with maestro("demo", "--engine", "stub", "--json", state=tmp_path) as demo:
            demo.wait_for("Stopped.", timeout_s=120)
            assert demo.process.wait(30) == 0
        assert chat(served.url, BIG).status_code == 200
        assert pids(served.url) == workers


def test_a_killed_worker_comes_back_and_calls_wait_for_it(tmp_path: Path) -> None:
    with maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as served:
        assert chat(served.url, BIG).status_code == 200
        state = httpx.get(f"{served.url}/maestro/state").json()
        worker = next(w for w in state["workers"] if w["model"] == BIG)
        psutil.Process(worker["pid"]).kill()
        assert chat(served.url, BIG).status_code == 200
        again = httpx.get(f"{served.url}/maestro/state").json()
        assert next(w for w in again["workers"] if w["model"] == BIG)["pid"] != worker["pid"]


def test_a_killed_node_agent_is_started_again_and_adopts(tmp_path: Path) -> None:
    with (
        end_workers(tmp_path),
        maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as served,
    ):
        assert chat(served.url, BIG).status_code == 200
        worker = psutil.Process(pids(served.url)[BIG])
        agent_of(served).kill()
        assert chat(served.url, BIG).status_code == 200
        assert pids(served.url)[BIG] == worker.pid
        assert served.stop() == 0
        assert survivors([worker], timeout=0) == []


def test_killing_the_demo_takes_everything_with_it(tmp_path: Path) -> None:
    with maestro("demo", "--engine", "stub", "--json", state=tmp_path) as demo:
        demo.wait_for("planner")
        family = demo.family()
        assert len(family) >= 3
        demo.process.kill()
        assert all_gone(family)


def test_status_shows_workers_and_says_when_nobody_is_there(tmp_path: Path) -> None:
    with maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as served:
        chat(served.url, BIG)
        shown = run("status", "--url", served.url)
        assert shown.returncode == 0
        assert BIG in shown.stdout and "ready" in shown.stdout
        url = served.url
    gone = run("status", "--url", url)
    assert gone.returncode == 2
    assert "is `maestro serve` on?" in gone.stderr and "Traceback" not in gone.stderr


def test_demo_on_the_stub_ends_with_json_and_leaves_nothing(tmp_path: Path) -> None:
    arguments = ("demo", "--engine", "stub", "--json")
    with maestro(*arguments, state=tmp_path, stdout=subprocess.PIPE) as demo:
        demo.wait_for("first token after")
        family = demo.family()
        output, _ = demo.process.stdout.read(), demo.process.wait(30)  # type: ignore[union-attr]
        result = json.loads(output.splitlines()[-1])
        assert demo.process.returncode == 0
        assert all_gone(family)
    assert result["failed"] == 0 and result["calls"] >= 6
    assert result["models"] == sorted([BIG, SMALL])
    lead = result["lead_time_s"]
    assert lead["foreseen"] >= result["calls"] - 1 and lead["median"] > 0
    assert result["makespan_s"] > 0 and result["announced_never_made"] >= 0
    assert result["answer"]
    replayed = run("replay", str(tmp_path / "maestro" / "demo.jsonl"))
    assert replayed.returncode == 0 and "every decision the same" in replayed.stdout


@pytest.mark.parametrize("moment", ["Starting", "warming up", "planner", "writer"])
def test_ctrl_c_at_any_moment_of_the_demo_leaves_nothing(tmp_path: Path, moment: str) -> None:
    with maestro("demo", "--engine", "stub", "--json", state=tmp_path) as demo:
        demo.wait_for(moment)
        family = demo.family()
        assert demo.stop(signal.SIGINT) == 130
        assert all_gone(family)
        assert not any("Traceback" in line for line in demo.lines), demo.lines


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("serve", "--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("serve", "--engine", "stub", "--host", "0.0.0.0", "--port", "0"), "MAESTRO_API_KEY"),
        (("serve", "--engine", "stub", "--port", "99999"), "0 to 65535"),
        (("replay", "/nowhere.jsonl"), "/nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: tuple[str, ...], text: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("maestro: error: ") and text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with maestro("serve", "--engine", "stub", "--port", "0", state=tmp_path) as served:
        port = served.url.split(":")[2].split("/")[0]
        done = run("serve", "--engine", "stub", "--port", port)
        assert done.returncode == 2 and "--port" in done.stderr


def test_a_model_that_can_never_fit_is_said_at_the_start(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "models: {huge: {source: 'random:tiny-llama', engine: stub, kv_memory: 900GiB,"
        " engine_args: {elastic: false}}}\n"
        "nodes: [{devices: [cpu], memory: 1GiB}]\n"
    )
    with maestro("serve", "--config", str(config), "--port", "0", state=tmp_path) as served:
        line = served.wait_for("huge cannot run here")
    assert "900.1 GiB" in line and "less kv_memory" in line


def test_help_lists_every_command() -> None:
    shown = run("--help")
    for command in ("serve", "demo", "status", "replay"):
        assert command in shown.stdout
