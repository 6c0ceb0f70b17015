"""Lifetimes: what happens to workers whose agent, or whose agent's starter, is gone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from node.leases import ask, check_the_books, kill_agent, leased, records
from node.nodes import MakeConfig, family, survivors, wait_for, worker_of

from maestro_agents.protocol import BackendError, ConfigError
from maestro_backend.config import Config
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency, WorkerState
from maestro_backend.workers import WorkerRecord

DEVICE, HOST, PARKED, DISK = Residency.DEVICE, Residency.HOST, Residency.PARKED, Residency.DISK
READY, STOPPED, SUSPENDED = WorkerState.READY, WorkerState.STOPPED, WorkerState.SUSPENDED
MIB = 1024**2
WEIGHTS = {"weights_bytes": 50 * MIB}

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# --- adoption -----------------------------------------------------------------------------------


async def test_a_killed_agent_is_replaced_by_one_that_adopts(stub_config: MakeConfig) -> None:
    async with leased(stub_config(a={"engine_args": WEIGHTS}, b={}, c={})) as node:
        for model in "ab":
            await node.set_residency(model, DEVICE)
        before = {w.model: w for w in (await node.info()).workers}
        first = node.pid
        kill_agent(node)
        joined = {w.model: w for w in (await node.join()).workers}
        assert node.pid != first
        for model in "ab":
            assert joined[model].state is READY
            assert joined[model].pid == before[model].pid
            assert joined[model].address == before[model].address
            assert joined[model].kv_limit_bytes == before[model].kv_limit_bytes
        assert joined["c"].state is STOPPED
        await check_the_books(node)
        await node.set_residency("a", DISK)
        assert (await worker_of(node, "a")).state is STOPPED


async def test_calls_that_run_go_on_without_an_agent(stub_config: MakeConfig) -> None:
    slow = {"engine_args": {"decode_tokens_s": 20, "output_tokens": 40}}
    async with leased(stub_config(a=slow)) as node:
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        transport = httpx.AsyncHTTPTransport(uds=worker.address)
        body = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://worker") as http,
            http.stream("POST", "/v1/chat/completions", json=body) as reply,
        ):
            lines = reply.aiter_lines()
            await anext(lines)
            kill_agent(node)
            joined = asyncio.create_task(node.join())
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert [w.state for w in (await joined).workers] == [READY]


@pytest.mark.parametrize("residency", [HOST, PARKED])
async def test_suspended_workers_are_adopted(stub_config: MakeConfig, residency: Residency) -> None:
    async with leased(stub_config(a={"engine_args": WEIGHTS})) as node:
        floor = (await worker_of(node, "a")).kv_floor_bytes
        await node.set_residency("a", residency, 2 * floor)
        before = await worker_of(node, "a")
        kill_agent(node)
        await node.join()
        after = await worker_of(node, "a")
        assert (after.state, after.residency, after.pid) == (SUSPENDED, residency, before.pid)
        assert before.kv_limit_bytes == after.kv_limit_bytes == 0
        await check_the_books(node)
        await node.set_residency("a", DEVICE)
        back = await worker_of(node, "a")
        assert (back.state, back.kv_limit_bytes) == (READY, 2 * floor)
        await check_the_books(node)


async def test_a_suspended_worker_is_adopted_with_what_is_held_in_it(
    stub_config: MakeConfig,
) -> None:
    slow = {**WEIGHTS, "decode_tokens_s": 20, "output_tokens": 40}
    async with leased(stub_config(a={"engine_args": slow})) as node:
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        transport = httpx.AsyncHTTPTransport(uds=worker.address)
        async with httpx.AsyncClient(transport=transport, base_url="http://w", timeout=60) as http:
            body = {"messages": [{"role": "user", "content": "x" * 3000}]}
            call = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            while not (await ask(worker))["kv"]["used_bytes"]:
                assert not call.done()
            await node.set_residency("a", HOST)
            before = await worker_of(node, "a")
            kill_agent(node)
            await node.join()
            after = await worker_of(node, "a")
            assert 0 < after.kv_limit_bytes == before.kv_limit_bytes < worker.kv_limit_bytes
            await check_the_books(node)
            await node.set_residency("a", DEVICE)
            assert (await worker_of(node, "a")).kv_limit_bytes == worker.kv_limit_bytes
            assert (await call).json()["usage"]["completion_tokens"] == 40


async def test_workers_that_are_slow_to_answer_take_no_room_from_others(
    stub_config: MakeConfig,
) -> None:
    """The room is for one of three, and the residuals of them all."""
    config = stub_config(memory="320MiB", **{name: {"engine_args": WEIGHTS} for name in "abc"})
    async with leased(config) as node:
        for model in config.models:
            await node.set_residency(model, DEVICE)
            await node.set_residency(model, HOST)
        before = {w.model: w.pid for w in (await node.info()).workers}
        slow = [psutil.Process(before[model]) for model in "ab"]
        for process in slow:
            process.suspend()
        try:
            kill_agent(node)
            await node.join()
            quick = await worker_of(node, "c")
        finally:
            for process in slow:
                process.resume()
        assert (quick.pid, quick.state) == (before["c"], SUSPENDED)
        for model in "ab":
            await wait_for(node, lambda w, m=model: w.model == m and w.state is SUSPENDED)
        assert {w.model: w.pid for w in (await node.info()).workers} == before
        await check_the_books(node)


async def test_a_worker_that_hangs_keeps_nobody_waiting(stub_config: MakeConfig) -> None:
    """The others are there at once. It keeps its claim until it has been ended."""
    async with leased(stub_config(a={"engine_args": WEIGHTS}, b={})) as node:
        for model in "ab":
            await node.set_residency(model, DEVICE)
        pid = (await worker_of(node, "a")).pid
        assert pid is not None
        hung = psutil.Process(pid)
        kill_agent(node)
        hung.suspend()
        joined = {w.model: w for w in (await node.join()).workers}
        assert (joined["a"].state, joined["b"].state) == (STOPPED, READY)
        [expected] = (await node.memory())["expected"].values()
        assert expected["device_bytes"] >= 50 * MIB
        await node.set_residency("a", DEVICE)
        again = await worker_of(node, "a")
        assert (again.state, again.pid == pid) == (READY, False)
        assert survivors([hung], timeout=0) == []
        await check_the_books(node)


async def test_a_stray_counts_until_it_is_gone(stub_config: MakeConfig) -> None:
    """Its model is in no configuration any more; it is slow to end."""
    async with leased(stub_config(memory="300MiB", a={"engine_args": WEIGHTS})) as before:
        await before.set_residency("a", DEVICE)
        stray = psutil.Process((await worker_of(before, "a")).pid)
        kill_agent(before)
        stray.suspend()
        async with leased(stub_config(memory="300MiB", b={"engine_args": WEIGHTS})) as node:
            assert list((await node.memory())["expected"]) == ["a"]
            await node.set_residency("b", DEVICE)
            assert survivors([stray], timeout=0) == []


async def test_a_worker_that_died_while_no_agent_lived(stub_config: MakeConfig) -> None:
    config = stub_config(a={})
    async with leased(config) as node:
        await node.set_residency("a", DEVICE)
        kill_agent(node)
        [record] = records(config)
        worker = psutil.Process(record.pid)
        worker.kill()
        psutil.wait_procs([worker])
        await node.join()
        assert (await worker_of(node, "a")).state is STOPPED
        assert records(config) == []
        await check_the_books(node)
        await node.set_residency("a", DEVICE)


async def test_a_pid_that_was_given_again_is_left_alone(stub_config: MakeConfig) -> None:
    config = stub_config(a={})
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as innocent:
        created = psutil.Process(innocent.pid).create_time()
        old = WorkerRecord(
            model="a",
            device="cpu",
            most_bytes=MIB,
            pid=innocent.pid,
            create_time=created - 3600,
            address="/x",
            fingerprint="f",
            log="/x.log",
            started=created - 3600,
        )
        old.write(config.state_dir / "workers" / "a.json")
        async with leased(config) as node:
            assert (await worker_of(node, "a")).state is STOPPED
            assert records(config) == []
            assert innocent.poll() is None
        assert innocent.poll() is None
        innocent.kill()


async def test_budgets_stay_what_they_were_while_workers_live(stub_config: MakeConfig) -> None:
    """What is free now lacks what they take."""
    found = {"memory": None}
    heavy = {"engine_args": {"weights_bytes": 300 * MIB}}
    async with leased(stub_config(node=found, a=heavy)) as node:
        await node.set_residency("a", DEVICE)
        before = await node.info()
        assert before.host_capacity_bytes > 0
        kill_agent(node)
        after = await node.join()
        assert after.devices == before.devices
        assert after.host_capacity_bytes == before.host_capacity_bytes


# --- lifetimes ----------------------------------------------------------------------------------

STARTER = """
import asyncio, sys
from maestro_backend.config import Config
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency
async def main():
    config = Config.load(sys.argv[1])
    async with LocalNode(config, tied=sys.argv[2] == "tied") as node:
        for model in config.models:
            await node.set_residency(model, Residency.DEVICE)
        print(node.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


async def start_and_kill(config: Config, lifetime: str) -> list[psutil.Process]:
    """The agent of a starter that was killed, and the workers of all models."""
    file = config.state_dir.parent / "config.json"
    file.write_text(config.model_dump_json())
    command = [sys.executable, "-c", STARTER, str(file), lifetime]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        processes = family(int(await asyncio.to_thread(starter.stdout.readline)))
        starter.kill()
    assert len(processes) == 1 + len(config.models)
    return processes


async def test_a_leased_worker_outlives_the_death_of_everybody(stub_config: MakeConfig) -> None:
    config = stub_config(a={})
    agent, worker = await start_and_kill(config, "leased")
    assert survivors([agent]) == []
    assert worker.is_running()
    async with leased(config) as node:
        adopted = await worker_of(node, "a")
        assert (adopted.state, adopted.pid) == (READY, worker.pid)
    assert survivors([worker], timeout=0) == []


async def test_a_tied_worker_dies_with_the_starter(stub_config: MakeConfig) -> None:
    assert survivors(await start_and_kill(stub_config(a={}), "tied")) == []


async def test_a_lease_that_nobody_renews_ends(stub_config: MakeConfig) -> None:
    config = stub_config(node={"lease": "1s"}, a={})
    _, worker = await start_and_kill(config, "leased")
    assert survivors([worker], timeout=30) == []


async def test_a_tied_agent_ends_what_it_cannot_tie(stub_config: MakeConfig) -> None:
    config = stub_config(a={})
    _, worker = await start_and_kill(config, "leased")
    async with LocalNode(config) as node:
        assert (await worker_of(node, "a")).state is STOPPED
        assert survivors([worker], timeout=0) == []


async def test_workers_can_be_left_to_the_next_agent(stub_config: MakeConfig) -> None:
    first = await LocalNode(stub_config(a={}, b={}), tied=False).start()
    await first.set_residency("a", DEVICE)
    await first.set_residency("b", PARKED)
    left = {w.model: w for w in (await first.info()).workers}
    await first.leave()
    async with leased(stub_config(memory="2GiB", a={}, b={})) as node:
        found = {w.model: w for w in (await node.info()).workers}
        for model in "ab":
            assert (found[model].pid, found[model].state) == (left[model].pid, left[model].state)
        await check_the_books(node)


async def test_tied_workers_cannot_be_left(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a={})) as node:
        with pytest.raises(BackendError, match="tied"):
            await node.leave()
        assert (await worker_of(node, "a")).state is STOPPED


@pytest.mark.parametrize("agent", ["well", "killed"])
async def test_closing_ends_leased_workers_too(stub_config: MakeConfig, agent: str) -> None:
    config = stub_config(a={}, b={})
    node = await LocalNode(config, tied=False).start()
    await node.set_residency("a", DEVICE)
    await node.set_residency("b", PARKED)
    processes = [psutil.Process(w.pid) for w in (await node.info()).workers if w.pid]
    folder = Path((await worker_of(node, "a")).address).parent
    if agent == "killed":
        kill_agent(node)
    await node.close()
    assert len(processes) == 2 and survivors(processes, timeout=0) == []
    assert records(config) == []
    assert not folder.exists()


@pytest.mark.parametrize("change", ["other settings", "no such model"])
async def test_workers_of_another_configuration_are_ended(
    stub_config: MakeConfig, change: str
) -> None:
    _, *workers = await start_and_kill(stub_config(a={}, b={}), "leased")
    assert len(workers) == 2
    other = {"a": {"max_num_seqs": 7}} if change == "other settings" else {}
    config = stub_config(b={}, **other)
    async with leased(config) as node:
        infos = {w.model: w for w in (await node.info()).workers}
        adopted = infos.pop("b")
        assert (adopted.state, adopted.pid in [w.pid for w in workers]) == (READY, True)
        assert survivors([w for w in workers if w.pid != adopted.pid], timeout=0) == []
        assert [record.model for record in records(config)] == ["b"]
        assert all(w.state is STOPPED for w in infos.values())
        await check_the_books(node)


# --- one agent per state folder -----------------------------------------------------------------


async def test_a_second_agent_is_refused_and_names_the_first(stub_config: MakeConfig) -> None:
    config = stub_config(a={})
    async with leased(config) as node:
        await node.set_residency("a", DEVICE)
        with pytest.raises(ConfigError, match=f"another node agent .pid {node.pid}.*state_dir"):
            await LocalNode(config, tied=False).start()
        assert (await worker_of(node, "a")).state is READY
        await check_the_books(node)
