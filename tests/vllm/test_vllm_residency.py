"""Residency of real engines as a node moves it: the books, the answers, a death while away."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import pytest
from node.nodes import wait_for, worker_of

from maestro_agents.protocol import BackendError
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency, WorkerState

pytestmark = pytest.mark.vllm

MIB = 1024**2


async def answer(node: LocalNode, model: str) -> str:
    worker = await worker_of(node, model)
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://w", timeout=300) as http:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Tell me about rivers."}],
            "max_tokens": 16,
            "temperature": 0,
        }
        reply = await http.post("/v1/chat/completions", json=body)
        return str(reply.raise_for_status().json()["choices"][0]["message"]["content"])


async def test_a_round_through_the_tiers(vllm_node: LocalNode) -> None:
    told = await answer(vllm_node, "smollm2")
    for tier in (Residency.HOST, Residency.PARKED, Residency.HOST):
        await vllm_node.set_residency("smollm2", tier)
        away = await worker_of(vllm_node, "smollm2")
        assert (away.state, away.residency) == (WorkerState.SUSPENDED, tier)
        assert away.host_bytes == (away.host_copy_bytes if tier is Residency.HOST else 0)
        assert away.weights_bytes > 600 * MIB  # measured: 513 of parameters, and packed copies
        assert away.kv_limit_bytes == 0
        assert (await vllm_node.memory())["workers"]["smollm2"]["kv_bytes"] == 0
    await vllm_node.set_residency("smollm2", Residency.DEVICE, away.kv_floor_bytes)
    back = await worker_of(vllm_node, "smollm2")
    assert (back.state, back.residency) == (WorkerState.READY, Residency.DEVICE)
    assert back.kv_limit_bytes == back.kv_floor_bytes
    assert back.activation_s[Residency.HOST] < back.activation_s[Residency.DISK]
    assert await answer(vllm_node, "smollm2") == told
    await vllm_node.set_kv_limit("smollm2", back.kv_max_bytes)


async def test_a_kv_limit_through_the_node(vllm_node: LocalNode) -> None:
    worker = await worker_of(vllm_node, "smollm2")
    limit = worker.kv_floor_bytes + 12345
    assert await vllm_node.set_kv_limit("smollm2", limit) == limit
    assert (await worker_of(vllm_node, "smollm2")).kv_limit_bytes == limit
    with pytest.raises(BackendError, match="max_model_len"):
        await vllm_node.set_kv_limit("smollm2", worker.kv_floor_bytes - 1)
    await vllm_node.set_kv_limit("smollm2", worker.kv_max_bytes)
    assert (await worker_of(vllm_node, "smollm2")).kv_limit_bytes == worker.kv_max_bytes


async def test_a_worker_killed_while_away_is_stopped_and_can_be_brought_back(
    vllm_node: LocalNode,
) -> None:
    told = await answer(vllm_node, "tiny")
    await vllm_node.set_residency("tiny", Residency.PARKED)
    away = await worker_of(vllm_node, "tiny")
    pid = away.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    dead = await wait_for(vllm_node, lambda w: w.model == "tiny" and w.state is WorkerState.STOPPED)
    assert (dead.pid, dead.host_bytes) == (None, 0)
    assert "tiny" not in (await vllm_node.memory())["workers"]
    await vllm_node.set_residency("tiny", Residency.DEVICE)
    assert await answer(vllm_node, "tiny") == told
    back = await worker_of(vllm_node, "tiny")
    assert back.weights_bytes == away.weights_bytes, "once measured, no estimate any more"


async def test_a_call_that_comes_in_the_middle_of_a_move_is_answered(vllm_node: LocalNode) -> None:
    told = await answer(vllm_node, "smollm2")
    moves = [Residency.HOST, Residency.DEVICE, Residency.PARKED, Residency.DEVICE]

    async def move() -> None:
        for tier in moves:
            await vllm_node.set_residency("smollm2", tier)

    moving = asyncio.create_task(move())
    answers = []
    while not moving.done():
        answers.append(await answer(vllm_node, "smollm2"))
    await moving
    assert answers
    assert set(answers) == {told}
