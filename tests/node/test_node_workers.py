"""The agent and its workers, as real processes around the stub engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from node.nodes import MakeConfig, family, survivors, wait_for, worker_of

from maestro_agents.protocol import BackendError, ConfigError
from maestro_backend.config import Config
from maestro_backend.node import LocalNode
from maestro_backend.node._learned import LearnedState
from maestro_backend.node._ledger import Ledger
from maestro_backend.scheduler import DeviceInfo, Residency, WorkerInfo, WorkerState
from maestro_backend.workers import ENGINES, Checkpoint, Launch, Memory, ServedModel, Worker

DEVICE, DISK = Residency.DEVICE, Residency.DISK
MIB = 1024**2


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every process that a test starts ends with it; what does not is killed and told."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p not in before]
    alive = survivors(left, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert alive == []


async def chat(address: str, model: str) -> httpx.Response:
    transport = httpx.AsyncHTTPTransport(uds=address)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as http:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
        return await http.post("/v1/chat/completions", json=body)


async def worker_changes(node: LocalNode) -> AsyncIterator[WorkerInfo]:
    """What is told of workers, without the measurements in between."""
    async for change in node.changes():
        if isinstance(change, WorkerInfo):
            yield change


async def test_a_started_worker_takes_calls(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={"served_names": ["alias"]}, b={})) as node:
        assert [w.state for w in (await node.info()).workers] == [WorkerState.STOPPED] * 2
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        assert (worker.state, worker.residency) == (WorkerState.READY, DEVICE)
        assert worker.device == "cpu"
        assert worker.kv_limit_bytes == 64 * 1024**2
        assert worker.max_model_len > 0
        assert (await chat(worker.address, "alias")).status_code == 200
        assert (await worker_of(node, "b")).state is WorkerState.STOPPED


async def test_sizes_are_told_before_the_first_start(stub_config: MakeConfig) -> None:
    """What is told of a stopped worker is what it takes: who plans with it is not refused."""
    given = {"kv_memory": "100MiB", "max_num_seqs": 3, "max_model_len": 777}
    async with LocalNode(stub_config(a=given)) as node:
        stopped = await worker_of(node, "a")
        await node.set_residency("a", DEVICE)
        ready = await worker_of(node, "a")
        for worker in (stopped, ready):
            assert (worker.device, worker.weights_bytes) == ("cpu", 0)
            assert (worker.kv_limit_bytes, worker.residual_bytes) == (100 * MIB, 64 * MIB)
            assert (worker.kv_bytes_per_token, worker.max_inflight) == (1024, 3)
            assert worker.max_model_len == 777


async def test_what_the_kv_cache_lacks_to_a_block_stays_promised(stub_config: MakeConfig) -> None:
    odd = 64 * MIB + 1000
    async with LocalNode(stub_config(a={"kv_memory": odd})) as node:
        await node.set_residency("a", DEVICE)
        ready = await worker_of(node, "a")
        assert ready.kv_limit_bytes == 64 * MIB
        assert ready.kv_limit_bytes + ready.residual_bytes == odd + 64 * MIB


def write_checkpoint(folder: Path, weights_bytes: int) -> None:
    """A checkpoint as far as its sizes go; the weights are a hole in a file."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({**shape, "max_position_embeddings": 2048, "dtype": "float32"})
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weights_bytes)


def real_model(source: Path) -> dict[str, str]:
    """A model on vLLM for CPUs; it is never started here, so vLLM need not be installed."""
    return {"source": str(source), "engine": "vllm-cpu", "python": sys.executable}


async def test_a_checkpoint_on_disk_is_sized_before_the_first_start(
    stub_config: MakeConfig, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "m", 300 * MIB)
    async with LocalNode(stub_config(a=real_model(tmp_path / "m"))) as node:
        worker = await worker_of(node, "a")
        assert (worker.device, worker.state) == ("cpu", WorkerState.STOPPED)
        assert (worker.weights_bytes, worker.kv_limit_bytes) == (300 * MIB, 1024 * MIB)
        assert (worker.kv_bytes_per_token, worker.max_model_len) == (2 * 2 * 64 * 4, 2048)
        assert worker.residual_bytes > 0


async def test_sizes_learned_on_the_way_are_told_before_the_refusal(
    stub_config: MakeConfig, tmp_path: Path
) -> None:
    """The model comes to the disk after the agent has looked, and turns out to be too big."""
    async with LocalNode(stub_config(a=real_model(tmp_path / "m"), memory="4GiB")) as node:
        before = await worker_of(node, "a")
        assert (before.weights_bytes, before.kv_bytes_per_token) == (0, 1)
        assert before.kv_limit_bytes + before.residual_bytes < 4096 * MIB
        write_checkpoint(tmp_path / "m", 2000 * MIB)
        changes = worker_changes(node)
        seen = [await anext(changes)]
        with pytest.raises(BackendError, match="does not fit yet: a needs"):
            await node.set_residency("a", DEVICE)
        while len(seen) == 1 or seen[-1].state is WorkerState.STARTING:
            seen.append(await anext(changes))
        assert {w.state for w in seen[1:-1]} == {WorkerState.STARTING}
        assert seen[-2].weights_bytes == 2000 * MIB
        refused = seen[-1]
        assert refused == await worker_of(node, "a")
        assert refused.state is WorkerState.STOPPED
        assert refused.detail.startswith("does not fit yet: ")
        assert (refused.weights_bytes, refused.max_model_len) == (2000 * MIB, 2048)


StubEngine: Any = type(ENGINES["stub"])


async def test_a_model_that_its_engine_fetches_is_sized_when_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")  # another hub, which we do not ask ourselves
    snapshot = tmp_path / "hf/hub/models--org--m/snapshots/1234"

    class FromHub(StubEngine):
        """Its start brings the checkpoint, as vLLM's does for a model on a hub."""

        needs_checkpoint = True

        def memory(self, model: ServedModel) -> Memory:
            weights = model.checkpoint.weights_bytes("float32")
            return Memory(weights, 64 * MIB, 64 * MIB)

        def launch(self, *asked: Any) -> Launch:
            write_checkpoint(snapshot, 5 * MIB)
            started: Launch = super().launch(*asked)
            return started

    config = Config.parse({"models": {"m": {"source": "hub:org/m"}}})
    told: list[WorkerInfo] = []
    worker = Worker(
        ServedModel("m", config.models["m"], Checkpoint("org/m", local=False)),
        FromHub(),
        node="here",
        device="cpu",
        address=tmp_path / "m.sock",
        log=tmp_path / "m.log",
        cache=tmp_path,
        record=tmp_path / "m.json",
        account=Ledger([DeviceInfo("cpu", 1024 * MIB)]),
        learned=LearnedState(tmp_path / "learned", {"m": "1"}, {"m": 64 * MIB}),
        publish=told.append,
    )
    try:
        await worker.bring(DEVICE)
        assert {w.weights_bytes for w in told if w.state is WorkerState.STARTING} == {0}
        assert (told[-1].state, told[-1].weights_bytes) == (WorkerState.READY, 5 * MIB)
    finally:
        await worker.stop()


async def test_settings_reach_the_engine(stub_config: MakeConfig) -> None:
    settings = {"max_num_seqs": 3, "engine_args": {"block_size": 32}, "max_model_len": 777}
    async with LocalNode(stub_config(a=settings)) as node:
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        assert worker.max_inflight == 3
        assert worker.max_model_len == 777
        assert worker.pid is not None
        command = psutil.Process(worker.pid).cmdline()
        assert command[command.index("--max-num-seqs") + 1] == "3"
        assert command[command.index("--block-size") + 1] == "32"


async def test_changes_tell_the_whole_start(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={})) as node:
        start = asyncio.create_task(node.set_residency("a", DEVICE))
        seen = []
        async for worker in worker_changes(node):
            seen.append((worker.state, worker.detail))
            if worker.state is WorkerState.READY:
                break
        await start
    states = [state for state, _ in seen]
    assert states[0] is WorkerState.STOPPED
    assert set(states[1:-1]) == {WorkerState.STARTING}
    details = [detail for _, detail in seen]
    assert details.index("starting stub") < details.index("warming up")


async def test_a_quiet_agent_is_told_from_a_dead_one(stub_config: MakeConfig) -> None:
    """Heartbeats come more often than the client's patience ends; without them it gives up."""
    async with LocalNode(stub_config(a={}), patience_s=3.0) as node:
        changes = worker_changes(node)
        await anext(changes)
        following = asyncio.ensure_future(anext(changes))
        done, _ = await asyncio.wait([following], timeout=4.0)
        assert not done
        assert node.pid is not None
        os.kill(node.pid, signal.SIGSTOP)
        try:
            with pytest.raises(BackendError, match="agent is gone"):
                await following
        finally:
            os.kill(node.pid, signal.SIGCONT)


async def test_a_wedged_agent_is_replaced(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={}), patience_s=3.0) as node:
        await node.set_residency("a", DEVICE)
        assert node.pid is not None
        processes, wedged = family(node.pid), node.pid
        os.kill(wedged, signal.SIGSTOP)
        async with asyncio.timeout(30):
            with pytest.raises(BackendError, match="agent is gone"):
                await node.info()
            joined = await node.join()
        assert [w.state for w in joined.workers] == [WorkerState.STOPPED]
        assert node.pid not in (None, wedged)
        assert survivors(processes) == []
        await node.set_residency("a", DEVICE)


async def test_joining_leaves_an_agent_that_answers_alone(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={})) as node:
        await node.set_residency("a", DEVICE)
        pid = node.pid
        joined = await node.join()
        assert [w.state for w in joined.workers] == [WorkerState.READY]
        assert node.pid == pid


async def test_closing_a_wedged_agent_stops_everything(stub_config: MakeConfig) -> None:
    node = await LocalNode(stub_config(a={})).start()
    await node.set_residency("a", DEVICE)
    assert node.pid is not None
    processes = family(node.pid)
    os.kill(node.pid, signal.SIGSTOP)
    async with asyncio.timeout(20):
        await node.close()
    assert survivors(processes) == []


@pytest.mark.parametrize("trouble", ["its log cannot be written", "its config is refused"])
async def test_joining_fails_with_a_backend_error_only(
    stub_config: MakeConfig, tmp_path: Path, trouble: str
) -> None:
    """An agent that died cannot be started again: whatever the reason, the text tells it."""
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    config = stub_config(a={**real_model(tmp_path / "m"), "python": str(interpreter)})
    async with LocalNode(config) as node:
        assert node.pid is not None
        os.kill(node.pid, signal.SIGKILL)
        if trouble == "its config is refused":
            interpreter.unlink()
            words = f"there is no interpreter {interpreter}"
        else:
            logs = config.state_dir / "logs"
            shutil.rmtree(logs)
            logs.write_text("a file where the folder was")
            words = str(logs)
        with pytest.raises(BackendError, match=words):
            await node.join()


async def test_a_stopped_worker_leaves_no_process(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={})) as node:
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        assert worker.pid is not None
        processes = family(worker.pid)
        await node.set_residency("a", DISK)
        assert survivors(processes, timeout=0) == []
        worker = await worker_of(node, "a")
        assert (worker.state, worker.residency) == (WorkerState.STOPPED, DISK)
        assert (worker.pid, worker.address) == (None, "")
        await node.set_residency("a", DISK)


async def test_a_round_trip_of_residency_frees_the_memory(stub_config: MakeConfig) -> None:
    big = {"kv_memory": "600MiB"}
    async with LocalNode(stub_config(a=big, b=big)) as node:
        for model in ("a", "b", "a"):
            await node.set_residency(model, DEVICE)
            with pytest.raises(BackendError, match="does not fit"):
                await node.set_residency("b" if model == "a" else "a", DEVICE)
            await node.set_residency(model, DISK)


async def test_a_refusal_names_the_numbers(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={"kv_memory": "700MiB"}, b={"kv_memory": "512MiB"})) as node:
        await node.set_residency("a", DEVICE)
        with pytest.raises(BackendError) as raised:
            await node.set_residency("b", DEVICE)
        for words in ("KV 0.50 GiB", "0.25 GiB free of 1.00 GiB", "a 0.75 GiB", "kv_memory"):
            assert words in str(raised.value)
        refused = await worker_of(node, "b")
        assert refused.state is WorkerState.STOPPED
        assert refused.detail.startswith("does not fit yet: ")
        assert (await worker_of(node, "a")).state is WorkerState.READY


async def test_a_killed_worker_comes_back(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={})) as node:
        await node.set_residency("a", DEVICE)
        first = await worker_of(node, "a")
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        down = await wait_for(node, lambda w: w.state is WorkerState.RESTARTING)
        assert "signal 9" in down.detail
        assert down.residency is DISK
        await node.set_residency("a", DEVICE)
        second = await worker_of(node, "a")
        assert (second.state, second.restarts) == (WorkerState.READY, 1)
        assert second.pid != first.pid
        assert (await chat(second.address, "a")).status_code == 200


async def test_a_frozen_worker_is_not_stopped_by_grace_alone(stub_config: MakeConfig) -> None:
    """SIGTERM does not reach a stopped process: SIGKILL has to follow."""
    async with LocalNode(stub_config(a={})) as node:
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        assert worker.pid is not None
        processes = family(worker.pid)
        os.kill(worker.pid, signal.SIGSTOP)
        await node.set_residency("a", DISK)
        assert survivors(processes, timeout=0) == []


async def test_a_worker_that_keeps_failing_is_given_up(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={"max_model_len": 100})) as node:
        await node.set_residency("a", DEVICE)
        while worker := await wait_for(node, lambda w: w.pid is not None or w.state == "failed"):
            if worker.state is WorkerState.FAILED:
                break
            assert worker.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            await wait_for(node, lambda w, old=worker.pid: w.pid != old)
        assert worker.restarts == 2
        assert "signal 9" in worker.detail
        await node.set_residency("a", DEVICE)
        assert (await worker_of(node, "a")).state is WorkerState.READY


async def test_a_bad_command_line_fails_at_once_with_its_words(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={"engine_args": {"no_such_flag": 1}})) as node:
        with pytest.raises(BackendError, match="no-such-flag"):
            await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        assert (worker.state, worker.restarts) == (WorkerState.FAILED, 0)
        assert "no-such-flag" in worker.detail


async def test_stopping_a_start(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={"engine_args": {"startup_delay_s": 60}})) as node:
        start = asyncio.create_task(node.set_residency("a", DEVICE))
        await wait_for(node, lambda w: w.detail == "starting stub")
        await node.set_residency("a", DISK)
        with pytest.raises(BackendError, match="stopped before it was ready"):
            await start
        assert (await worker_of(node, "a")).state is WorkerState.STOPPED


async def test_unknown_models_and_tiers(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={"engine_args": {"control": False}})) as node:
        with pytest.raises(BackendError, match="no model 'b'"):
            await node.set_residency("b", DEVICE)
        with pytest.raises(BackendError, match=r"cannot be brought to 'host' \(its tiers: device"):
            await node.set_residency("a", Residency.HOST)


async def test_closing_stops_everything(stub_config: MakeConfig) -> None:
    node = await LocalNode(stub_config(a={}, b={})).start()
    await asyncio.gather(*(node.set_residency(model, DEVICE) for model in "ab"))
    assert node.pid is not None
    address = Path((await worker_of(node, "a")).address)
    processes = family(node.pid)
    assert len(processes) == 3
    await node.close()
    assert survivors(processes, timeout=0) == []
    assert not address.parent.exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_workers_go_with_their_agent(stub_config: MakeConfig, signum: signal.Signals) -> None:
    async with LocalNode(stub_config(a={}, b={})) as node:
        await asyncio.gather(*(node.set_residency(model, DEVICE) for model in "ab"))
        assert node.pid is not None
        processes = family(node.pid)
        changes = node.changes()
        await anext(changes)
        os.kill(node.pid, signum)
        assert survivors(processes) == []
        with pytest.raises(BackendError, match="agent is gone"):
            async for _ in changes:
                pass
        with pytest.raises(BackendError, match="agent is gone"):
            await node.info()


async def test_an_agent_goes_with_its_starter(stub_config: MakeConfig, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(stub_config(a={}).model_dump_json())
    code = (
        "import asyncio, sys\n"
        "from maestro_backend.config import Config\n"
        "from maestro_backend.node import LocalNode\n"
        "from maestro_backend.scheduler import Residency\n"
        "async def main():\n"
        "    async with LocalNode(Config.load(sys.argv[1])) as node:\n"
        "        await node.set_residency('a', Residency.DEVICE)\n"
        "        print(node.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, config], stdout=subprocess.PIPE)
    with starter:
        assert starter.stdout is not None
        processes = family(int(await asyncio.to_thread(starter.stdout.readline)))
        assert len(processes) == 2
        starter.kill()
    assert survivors(processes) == []


async def test_long_paths(stub_config: MakeConfig) -> None:
    """Neither a deep state folder nor a long model name breaks the 107 bytes of a socket path."""
    name = "an-organisation/a-model-with-" + "very-" * 20 + "long-name"
    deep = "/".join(["a-deep-state-folder"] * 8)
    async with LocalNode(stub_config(state=deep, **{name: {}})) as node:
        await node.set_residency(name, DEVICE)
        worker = await worker_of(node, name)
        assert len(worker.address.encode()) <= 107
        assert (await chat(worker.address, name)).status_code == 200


def test_an_agents_own_socket_may_be_too_long(stub_config: MakeConfig, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(stub_config(a={}).model_dump_json())
    command = [sys.executable, "-m", "maestro_backend.node", "--config", str(config)]
    command += ["--socket", str(tmp_path / ("long" * 30))]
    agent = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert agent.returncode == 2
    assert "107 bytes" in agent.stderr
    assert "Traceback" not in agent.stderr


async def test_a_config_that_the_node_cannot_serve(stub_config: MakeConfig) -> None:
    for settings, words in (
        ({"engine": "vllm"}, "needs a GPU"),
        ({"engine_args": {"uds": "/x"}}, "Maestro sets this itself"),
        ({"engine_args": {"max-model-len": 1}}, "set max_model_len"),
        ({"engine": "vllm-cpu", "python": "/nowhere/python"}, "no interpreter /nowhere/python"),
    ):
        with pytest.raises(ConfigError, match=words):
            await LocalNode(stub_config(a=settings)).start()


async def test_a_gpu_that_is_not_there(stub_config: MakeConfig) -> None:
    raw = stub_config(a={}).model_dump(mode="json")
    raw["nodes"][0]["devices"] = ["cuda:99"]
    with pytest.raises(ConfigError, match="no device cuda:99"):
        await LocalNode(Config.parse(raw)).start()
