"""The files of a state folder: one agent at a time, sockets that stay, JSON for people to read."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from node.nodes import MakeConfig

from maestro_agents.protocol import ConfigError
from maestro_backend.node import LocalNode
from maestro_backend.node._lock import StateLock, runtime_folder
from maestro_backend.scheduler import Residency


async def test_the_refusal_is_exit_status_2(stub_config: MakeConfig, tmp_path: Path) -> None:
    config = stub_config(a={})
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "maestro_backend.node", "--config", str(file)]
    with StateLock.take(config.state_dir):
        run = subprocess.run(
            [*command, "--socket", str(tmp_path / "s")], capture_output=True, text=True, timeout=60
        )
    assert run.returncode == 2
    assert f"pid {os.getpid()}" in run.stderr and "Traceback" not in run.stderr


def test_a_lock_is_free_again_after_its_holder(tmp_path: Path) -> None:
    with StateLock.take(tmp_path, patience_s=0), pytest.raises(ConfigError, match="state_dir"):
        StateLock.take(tmp_path, patience_s=0)
    StateLock.take(tmp_path, patience_s=0).release()


def test_a_lock_waits_for_one_that_is_leaving(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from maestro_backend.node._lock import StateLock\n"
        "StateLock.take(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ConfigError, match=f"pid {holder.pid}"):
            StateLock.take(tmp_path, patience_s=0)
        holder.kill()
        StateLock.take(tmp_path, patience_s=30).release()


def test_the_folder_of_the_sockets_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runtime_folder(tmp_path / "state")
    assert folder == runtime_folder(tmp_path / "state") != runtime_folder(tmp_path / "other")
    assert folder.stat().st_mode & 0o077 == 0
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(elsewhere))
    assert runtime_folder(tmp_path / "state") == folder
    for made in (folder, runtime_folder(tmp_path / "other")):
        made.rmdir()


def test_a_folder_that_others_can_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    taken = runtime_folder(tmp_path)
    assert taken.parent == Path("/dev/shm")
    taken.chmod(0o777)
    moved = runtime_folder(tmp_path)
    assert moved.parent != taken.parent
    for made in (taken, moved):
        made.rmdir()


def test_stale_sockets_are_removed(stub_config: MakeConfig) -> None:
    config = stub_config(a={})
    stale = runtime_folder(config.state_dir) / "agent-of-old.sock"
    stale.touch()

    async def start() -> None:
        async with LocalNode(config):
            assert not stale.exists()

    asyncio.run(start())


def test_what_is_written_is_json(tmp_path: Path, stub_config: MakeConfig) -> None:
    """A person can read every file of the state folder."""
    config = stub_config(a={})

    async def start() -> None:
        async with LocalNode(config, tied=False) as node:
            await node.set_residency("a", Residency.DEVICE)
            files = list(config.state_dir.rglob("*.json"))
            assert {file.name for file in files} == {"a.json", "budgets.json", "learned.json"}
            for file in files:
                json.loads(file.read_text())

    asyncio.run(start())
