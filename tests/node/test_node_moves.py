"""Moves through the agent: tiers, KV limits, kept prefixes, the host budget, and their refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from node.nodes import MakeConfig, wait_for, worker_of

from maestro_agents.protocol import BackendError
from maestro_backend.config import NodeConfig
from maestro_backend.node import LocalNode, NodeLostError
from maestro_backend.node._devices import Budgets, find_budgets, read_budgets, write_budgets
from maestro_backend.scheduler import DeviceInfo, Residency, WorkerInfo, WorkerState

DEVICE, HOST, PARKED, DISK = Residency.DEVICE, Residency.HOST, Residency.PARKED, Residency.DISK
MIB = 1024**2
GIB = 1024**3
RESIDUAL = 64 * MIB  # the stub's
SHORT = {"max_model_len": 1024, "kv_memory": "32MiB"}


def model(weights: int, **arguments: Any) -> dict[str, Any]:
    """A stub whose weights take so many MiB."""
    return {**SHORT, "engine_args": {"weights_bytes": weights * MIB, **arguments}}


async def claims(node: LocalNode) -> dict[str, int]:
    """What each model holds of its device, in MiB."""
    workers = (await node.memory())["workers"].items()
    parts = ("weights_bytes", "kv_bytes", "residual_bytes")
    return {name: sum(claim[part] for part in parts) // MIB for name, claim in workers}


async def test_weights_go_round_all_tiers(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a=model(100))) as node:
        on_device, put_aside = 100 + 32 + 64, 64
        for residency, held, host in (
            (DEVICE, on_device, 0),
            (HOST, put_aside, 100),
            (DEVICE, on_device, 100),  # the copy survives, so that the next suspend is free
            (HOST, put_aside, 100),
            (PARKED, put_aside, 0),
            (HOST, put_aside, 100),
            (DEVICE, on_device, 100),
            (PARKED, put_aside, 0),
            (DEVICE, on_device, 0),
        ):
            await node.set_residency("a", residency)
            worker = await worker_of(node, "a")
            assert (worker.residency, worker.host_bytes) == (residency, host * MIB)
            assert await claims(node) == {"a": held}
        assert set(worker.activation_s) == {DISK, HOST, PARKED}
        await node.set_residency("a", DISK)
        assert await claims(node) == {}


async def test_a_resume_is_refused_before_it_begins(stub_config: MakeConfig) -> None:
    config = stub_config(memory="400MiB", a=model(150), b=model(150))
    async with LocalNode(config) as node:
        await node.set_residency("a", PARKED)
        await node.set_residency("b", DEVICE)
        with pytest.raises(BackendError, match=r"does not fit yet: a needs .* suspend b"):
            await node.set_residency("a", DEVICE)
        assert (await worker_of(node, "a")).state is WorkerState.SUSPENDED
        await node.set_residency("b", PARKED)
        await node.set_residency("a", DEVICE)
        assert await claims(node) == {"a": 150 + 96, "b": 64}


async def test_kv_limits_move_within_the_account(stub_config: MakeConfig) -> None:
    config = stub_config(memory="300MiB", a=model(0), b={"kv_memory": "150MiB"})
    async with LocalNode(config) as node:
        await node.set_residency("a", DEVICE)
        floor = (await worker_of(node, "a")).kv_floor_bytes
        with pytest.raises(BackendError, match=r"b needs 0\.21 GiB"):
            await node.set_residency("b", DEVICE)
        assert await node.set_kv_limit("a", floor) == floor
        await node.set_residency("b", DEVICE)
        with pytest.raises(BackendError, match="does not fit yet: a"):
            await node.set_kv_limit("a", 32 * MIB)
        assert (await worker_of(node, "a")).kv_limit_bytes == floor
        with pytest.raises(BackendError, match="at least"):
            await node.set_kv_limit("a", floor - 1)


async def test_a_move_brings_its_kv_limit(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a=model(10))) as node:
        floor = (await worker_of(node, "a")).kv_floor_bytes
        for residency, limit in ((DEVICE, 2 * floor), (HOST, floor), (DEVICE, 3 * floor)):
            await node.set_residency("a", residency, limit)
            worker = await worker_of(node, "a")
            held = limit if residency is DEVICE else 0
            assert (worker.residency, worker.kv_limit_bytes) == (residency, held)
        await node.set_residency("a", HOST, floor)
        await node.set_residency("a", DEVICE)
        assert (await worker_of(node, "a")).kv_limit_bytes == floor


async def test_the_host_budget_is_told_and_kept(stub_config: MakeConfig) -> None:
    config = stub_config(a=model(100), b=model(100), node={"host_memory": "150MiB"})
    async with LocalNode(config) as node:
        assert (await node.info()).host_capacity_bytes == 150 * MIB
        await node.set_residency("a", HOST)
        await node.set_residency("b", DEVICE)
        with pytest.raises(BackendError, match="copy of b in host memory"):
            await node.set_residency("b", HOST)
        assert (await worker_of(node, "b")).residency is DEVICE
        assert (await worker_of(node, "a")).host_bytes == 100 * MIB


async def test_a_spare_copy_makes_room_for_one_that_is_needed(stub_config: MakeConfig) -> None:
    """The one that has not moved for longest goes; no more than needed."""
    models = {name: model(50) for name in "abc"}
    config = stub_config(memory="2GiB", node={"host_memory": "120MiB"}, **models)
    async with LocalNode(config) as node:
        for name in "ab":
            await node.set_residency(name, HOST)
            await node.set_residency(name, DEVICE)
        await node.set_residency("c", DEVICE)
        await node.set_residency("c", HOST)
        copies = {w.model: w.host_bytes // MIB for w in (await node.info()).workers}
        assert copies == {"a": 0, "b": 50, "c": 50}
        assert (await node.memory())["host"]["free_bytes"] == 20 * MIB


async def test_copies_are_not_dropped_in_vain(stub_config: MakeConfig) -> None:
    config = stub_config(a=model(50), b=model(200), node={"host_memory": "120MiB"})
    async with LocalNode(config) as node:
        await node.set_residency("a", HOST)
        await node.set_residency("a", DEVICE)
        with pytest.raises(BackendError, match="copy of b"):
            await node.set_residency("b", HOST)
        assert (await worker_of(node, "a")).host_bytes == 50 * MIB


async def test_prefixes_are_kept_dropped_and_warmed(stub_config: MakeConfig) -> None:
    async with LocalNode(stub_config(a=SHORT)) as node:
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        await chat(worker, "call-1")
        kept = await node.keep_prefix("a", "call-1", 60)
        assert kept == (await pinned(worker)) > 0
        await node.drop_prefix("a", "call-1")
        assert await pinned(worker) == 0
        messages = [{"role": "system", "content": "You are a planner. " * 20}]
        warmed = await node.warm_prefix("a", "call-2", messages, 60)
        assert warmed == (await pinned(worker)) > 0
        with pytest.raises(BackendError, match="call-9"):
            await node.keep_prefix("a", "call-9", 60)


def worker_http(worker: WorkerInfo) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    return httpx.AsyncClient(transport=transport, base_url="http://worker")


async def chat(worker: WorkerInfo, call: str) -> None:
    body = {"model": worker.model, "messages": [{"role": "user", "content": "Hi"}]}
    async with worker_http(worker) as http:
        headers = {"x-request-id": call}
        answer = await http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200


async def pinned(worker: WorkerInfo) -> int:
    async with worker_http(worker) as http:
        return int((await http.get("/maestro/worker")).json()["kv"]["pinned_bytes"])


async def test_the_agent_answers_with_a_status_for_each_kind_of_mistake(
    stub_config: MakeConfig,
) -> None:
    whole = {**SHORT, "engine_args": {"control": False}}
    config = stub_config(memory="200MiB", a=SHORT, b={"kv_memory": "1GiB"}, c=whole)
    async with LocalNode(config) as node:
        await node.set_residency("a", DEVICE)
        kept = {"model": "a", "call": "x", "seconds": 1}
        posts: list[tuple[str, dict[str, Any], int]] = [
            ("residency", {"model": "nobody", "residency": "device"}, 404),
            ("residency", {"model": "a", "residency": "moon"}, 400),
            ("residency", {"residency": "device"}, 400),
            ("residency", {"model": "b", "residency": "device"}, 422),
            ("residency", {"model": "c", "residency": "host"}, 501),
            ("residency", {"model": "a", "residency": "device", "kv_limit_bytes": -1}, 400),
            ("kv", {"model": "a", "limit_bytes": 1}, 502),
            ("kv", {"model": "a"}, 400),
            ("kv", {"model": "b", "limit_bytes": 1}, 502),
            ("prefix/keep", kept, 502),
            ("prefix/keep", {**kept, "seconds": 0}, 400),
            ("prefix/drop", {"model": "nobody", "call": "x"}, 404),
            ("prefix/warm", kept, 400),
        ]
        async with node._http() as http:  # what another client than ours would see
            for path, body, status in posts:
                answer = await http.post(f"/v1/node/{path}", json=body)
                assert (path, body, answer.status_code) == (path, body, status)
                assert answer.json()["error"]


async def test_moves_after_the_agent_is_gone(stub_config: MakeConfig) -> None:
    node = await LocalNode(stub_config(a=SHORT)).start()
    await node.close()
    for move in (node.set_kv_limit("a", 1), node.drop_prefix("a", "x"), node.memory()):
        with pytest.raises(BackendError, match="not running"):
            await move
    assert issubclass(NodeLostError, BackendError)


# --- GPUs ---------------------------------------------------------------------------------------

FAKE_TOOL = """#!/bin/sh
case "$1" in
--query-gpu*) echo "0, GPU-a, 8192, 8000"; echo "1, GPU-b, 8192, 8000";;
esac
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's tool that tells of two; engines that need none run there all the same."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(FAKE_TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")


@pytest.mark.usefixtures("two_gpus")
async def test_starts_on_one_gpu_take_turns(stub_config: MakeConfig) -> None:
    gpus = {"devices": ["cuda:0", "cuda:1"]}
    slow = model(10, startup_delay_s=1.0)
    async with LocalNode(stub_config(node=gpus, a=slow, b=slow, c=slow)) as node:
        workers = {w.model: w for w in (await node.info()).workers}
        first, other = "a", next(m for m in "bc" if workers[m].device != workers["a"].device)
        second = next(m for m in "abc" if m not in (first, other))
        assert workers[second].device == workers[first].device
        order: list[tuple[str, str]] = []
        changes = node.changes()
        for _ in "abc":
            await anext(changes)
        starts = [asyncio.create_task(node.set_residency(m, DEVICE)) for m in (first, second)]
        starts.append(asyncio.create_task(node.set_residency(other, DEVICE)))
        async for change in changes:
            if isinstance(change, WorkerInfo):
                order.append((change.model, change.detail or change.state.value))
            if [state for _, state in order].count("ready") == 3:
                break
        await asyncio.gather(*starts)
    started = {m: order.index((m, "starting stub")) for m in "abc"}
    ready = {m: order.index((m, "ready")) for m in "abc"}
    turns = sorted((first, second), key=lambda m: started[m])
    assert ready[turns[0]] < started[turns[1]]
    assert started[other] < ready[turns[0]]


@pytest.mark.usefixtures("two_gpus")
async def test_closing_keeps_no_start_that_waits_for_its_turn(stub_config: MakeConfig) -> None:
    slow = model(10, startup_delay_s=20.0)
    config = stub_config(node={"devices": ["cuda:0"]}, a=slow, b=slow)
    node = await LocalNode(config).start()
    starts = [asyncio.create_task(node.set_residency("a", DEVICE))]
    await wait_for(node, lambda w: (w.model, w.detail) == ("a", "starting stub"))
    starts.append(asyncio.create_task(node.set_residency("b", DEVICE)))
    await asyncio.sleep(0.2)
    async with asyncio.timeout(10):
        await node.close()
        results = await asyncio.gather(*starts, return_exceptions=True)
    assert [type(result) for result in results] == [BackendError, BackendError], results
    log = (config.state_dir / "logs" / "node-here.log").read_text()
    assert "a: starting" in log
    assert "b: starting" not in log


# --- budgets ------------------------------------------------------------------------------------


def test_budgets_are_parts_of_what_is_free() -> None:
    budgets = find_budgets(NodeConfig(devices=("cpu",)))
    [device] = budgets.devices
    assert budgets.host_capacity_bytes / device.capacity_bytes == pytest.approx(0.15 / 0.65)
    given = find_budgets(NodeConfig(devices=("cpu",), memory=3 * GIB, host_memory=GIB))
    assert given == Budgets((DeviceInfo("cpu", 3 * GIB),), GIB)


@pytest.mark.usefixtures("two_gpus")
def test_budgets_of_gpus() -> None:
    budgets = find_budgets(NodeConfig())
    share = int(8000 * MIB * 0.8)
    assert budgets.devices == (DeviceInfo("cuda:0", share), DeviceInfo("cuda:1", share))
    assert budgets.host_capacity_bytes > 0


def test_earlier_budgets_hold_for_what_is_not_given(tmp_path: Path) -> None:
    file = tmp_path / "budgets.json"
    assert read_budgets(file) is None
    write_budgets(file, Budgets((DeviceInfo("cpu", 7),), 5))
    earlier = read_budgets(file)
    assert find_budgets(NodeConfig(devices=("cpu",)), earlier) == earlier
    given = find_budgets(NodeConfig(devices=("cpu",), memory=9), earlier)
    assert given == Budgets((DeviceInfo("cpu", 9),), 5)
    file.write_text("{")
    assert read_budgets(file) is None
