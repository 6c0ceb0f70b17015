"""Our plugin in real engines, over the worker's own socket: weights, KV memory, prefixes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from node.nodes import worker_of

from maestro_backend.config import Config
from maestro_backend.node import LocalNode
from maestro_backend.workers import ENGINES, ServedModel, cache_dir, fetch
from maestro_backend.workers._probe import Probe

pytestmark = pytest.mark.vllm

LONG = "The quick brown fox jumps over the lazy dog. " * 40
PROMPTS = ("Tell me about Paris.", "Count to ten.")


@asynccontextmanager
async def engine(node: LocalNode, model: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a worker's socket; afterwards its weights and its whole KV cache are back."""
    worker = await worker_of(node, model)
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://w", timeout=300) as http:
        try:
            yield http
        finally:
            await http.post("/maestro/residency", json={"residency": "device"})
            built = (await state(http))["kv"]["built_bytes"]
            await http.post("/maestro/kv", json={"limit_bytes": built})


async def state(http: httpx.AsyncClient) -> dict[str, Any]:
    told: dict[str, Any] = (await http.get("/maestro/worker")).raise_for_status().json()
    return told


async def reply(
    http: httpx.AsyncClient, prompt: str, tokens: int = 24, call: str = "a"
) -> dict[str, Any]:
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    answer = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": call})
    told: dict[str, Any] = answer.raise_for_status().json()
    return told


async def ask(http: httpx.AsyncClient, prompt: str, tokens: int = 24, call: str = "a") -> str:
    return str((await reply(http, prompt, tokens, call))["choices"][0]["message"]["content"])


async def answers(http: httpx.AsyncClient) -> list[str]:
    return [await ask(http, prompt) for prompt in PROMPTS]


async def prefix_hits(http: httpx.AsyncClient) -> float:
    """Tokens that were found in the prefix cache so far."""
    lines = (await http.get("/metrics")).text.splitlines()
    [line] = [x for x in lines if x.startswith("vllm:prefix_cache_hits_total")]
    return float(line.rsplit(" ", 1)[1])


async def running(http: httpx.AsyncClient, count: int) -> list[dict[str, Any]]:
    """The progress of `count` calls, once so many have generated something."""
    async with asyncio.timeout(120):
        while True:
            live = (await http.get("/maestro/progress")).json()["requests"]
            if sum(entry["generated_tokens"] > 0 for entry in live) >= count:
                return list(live)
            await asyncio.sleep(0.05)


def memory(pid: int | None) -> int:
    server = psutil.Process(pid or 0)
    return sum(p.memory_full_info().pss for p in (server, *server.children(recursive=True)))


@pytest.mark.parametrize("tier", ["host", "parked"])
async def test_weights_leave_the_process_and_come_back_the_same(
    vllm_node: LocalNode, tier: str
) -> None:
    pid = (await worker_of(vllm_node, "smollm2")).pid
    async with engine(vllm_node, "smollm2") as http:
        told = await answers(http)
        on_device = memory(pid)
        moved = (await http.post("/maestro/residency", json={"residency": tier})).json()
        assert moved["residency"] == tier
        assert moved["weights"]["host_bytes"] == (
            moved["weights"]["host_copy_bytes"] if tier == "host" else 0
        )
        parameters = 134_515_008 * 4  # float32
        assert on_device - memory(pid) > parameters
        assert moved["freed_bytes"] > parameters
        assert (await http.get("/health")).status_code == 200
        back = (await http.post("/maestro/residency", json={"residency": "device"})).json()
        assert back["residency"] == "device"
        assert abs(memory(pid) - on_device) < 0.05 * on_device
        assert await answers(http) == told


async def test_a_copy_is_refused_over_the_host_budget(vllm_node: LocalNode) -> None:
    async with engine(vllm_node, "smollm2") as http:
        told = await answers(http)
        await http.delete("/maestro/host-copy")
        body = {"residency": "host", "host_budget_bytes": 1000}
        refused = await http.post("/maestro/residency", json=body)
        assert refused.status_code == 409
        assert "1000 are free" in refused.json()["error"]
        assert (await state(http))["residency"] == "device"
        assert await answers(http) == told


async def test_calls_freeze_and_wait_while_the_weights_are_away(vllm_node: LocalNode) -> None:
    """On the slower model: its calls take seconds, so that they are seen before they end."""
    async with engine(vllm_node, "smollm2") as http:
        begun = [asyncio.create_task(reply(http, p, 120, f"run-{p[:3]}")) for p in PROMPTS]
        live = await running(http, len(PROMPTS))
        assert {entry["call"] for entry in live} == {"run-Tel", "run-Cou"}
        assert all(entry["kv_bytes"] > 0 and entry["computed_tokens"] > 0 for entry in live)
        moved = (await http.post("/maestro/residency", json={"residency": "host"})).json()
        assert moved["requests"] == len(PROMPTS)
        late = asyncio.create_task(reply(http, "Late.", 8))
        frozen = (await http.get("/maestro/progress")).json()["requests"]
        again = (await http.get("/maestro/progress")).json()["requests"]
        assert [e["generated_tokens"] for e in frozen[:2]] == [
            e["generated_tokens"] for e in again[:2]
        ]
        assert not any(task.done() for task in (*begun, late))
        await http.post("/maestro/residency", json={"residency": "device"})
        ends = [await task for task in (*begun, late)]
        assert [end["usage"]["completion_tokens"] for end in ends] == [120, 120, 8]


async def test_only_kept_prefixes_survive_when_the_weights_move(vllm_node: LocalNode) -> None:
    async with engine(vllm_node, "smollm2") as http:
        await ask(http, LONG + "one", 4, "one")
        await http.post("/maestro/prefix/keep", json={"call": "one", "seconds": 600})
        await ask(http, "Another beginning. " + LONG, 4)
        for tier in ("host", "device", "parked", "device"):
            await http.post("/maestro/residency", json={"residency": tier})
        before = await prefix_hits(http)
        await ask(http, LONG + "one", 4)
        assert await prefix_hits(http) - before >= 256
        before = await prefix_hits(http)
        await ask(http, "Another beginning. " + LONG, 4)
        assert await prefix_hits(http) - before < 128
        await http.post("/maestro/prefix/drop", json={"call": "one"})


@pytest.mark.parametrize("tier", ["host", "parked"])
async def test_kv_memory_leaves_with_the_weights(vllm_node: LocalNode, tier: str) -> None:
    async with engine(vllm_node, "smollm2") as http:
        told = await answers(http)
        await http.post("/maestro/residency", json={"residency": tier})
        kv = (await state(http))["kv"]
        assert kv["held_bytes"] == 0
        assert kv["resident_bytes"] < 1024**2  # pages on the edges, in each layer
        limit = 2 * kv["floor_bytes"]
        order = {"residency": "device", "kv_limit_bytes": limit}
        back = (await http.post("/maestro/residency", json=order)).json()["kv"]
        assert limit - kv["block_bytes"] < back["held_bytes"] <= limit == back["limit_bytes"]
        assert await answers(http) == told


async def test_a_paused_call_keeps_its_kv(vllm_node: LocalNode) -> None:
    async with engine(vllm_node, "smollm2") as http:
        told = await ask(http, PROMPTS[0], 120)
        begun = asyncio.create_task(ask(http, PROMPTS[0], 120, "paused"))
        await running(http, 1)
        await http.post("/maestro/residency", json={"residency": "host"})
        kv = (await state(http))["kv"]
        assert kv["used_bytes"] >= kv["block_bytes"]
        assert kv["held_bytes"] == kv["used_bytes"] + kv["block_bytes"]  # and the null block
        assert kv["resident_bytes"] <= 1.1 * kv["held_bytes"]  # pages on the edges
        order = {"residency": "device", "kv_limit_bytes": kv["floor_bytes"]}
        await http.post("/maestro/residency", json=order)
        assert await begun == told


@pytest.mark.parametrize("harm", ["a tensor of another shape", "no file"])
async def test_a_restore_that_fails_can_be_tried_again(
    vllm_node: LocalNode, vllm_config: Config, tmp_path: Path, harm: str
) -> None:
    weights = Path(vllm_config.models["tiny"].source) / "model.safetensors"
    async with engine(vllm_node, "tiny") as http:
        told = await answers(http)
        await http.post("/maestro/residency", json={"residency": "parked"})
        shutil.copy(weights, tmp_path / "kept")
        try:
            if harm == "no file":
                weights.unlink()
            else:
                await asyncio.to_thread(break_late_tensor, weights)
            failed = await http.post("/maestro/residency", json={"residency": "device"})
            assert failed.status_code == 409
            assert (await state(http))["residency"] == "parked"
            waiting = asyncio.create_task(ask(http, PROMPTS[0]))
        finally:
            shutil.copy(tmp_path / "kept", weights)
        mended = await http.post("/maestro/residency", json={"residency": "device"})
        assert mended.status_code == 200
        assert await waiting == told[0]
        assert await answers(http) == told


def break_late_tensor(weights: Path) -> None:
    """Give the last tensor another shape; in a process of its own, for torch is big."""
    script = """
import sys
from safetensors.torch import load_file, save_file
tensors = load_file(sys.argv[1])
last = sorted(tensors)[-1]
tensors[last] = tensors[last][:1].repeat(3, *[1] * (tensors[last].dim() - 1))
save_file(tensors, sys.argv[1], metadata={"format": "pt"})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(weights)], check=True)


async def test_kv_blocks_are_those_of_the_checkpoint(
    vllm_node: LocalNode, vllm_config: Config
) -> None:
    """Bytes that were built, blocks of the engine's own count, blocks of a call at any moment."""
    worker = await worker_of(vllm_node, "smollm2")
    settings = vllm_config.models["smollm2"]
    checkpoint = await fetch(settings.source, cache=cache_dir())
    model = ServedModel("smollm2", settings, checkpoint)
    async with Probe(Path(worker.address)) as probe:
        blocks, block_tokens = await probe.kv_blocks()
    ours = ENGINES["vllm-cpu"].kv_geometry(model, block_tokens)
    assert ours is not None and ours == worker.kv_geometry
    assert ours.block_bytes == block_tokens * 2 * 30 * 3 * 64 * 4
    async with engine(vllm_node, "smollm2") as http:
        kv = (await state(http))["kv"]
        assert kv["block_bytes"] == ours.block_bytes
        assert kv["built_bytes"] == blocks * ours.block_bytes
        assert kv["floor_bytes"] == ENGINES["vllm-cpu"].kv_floor_bytes(model)
        call = asyncio.create_task(ask(http, LONG, 140, "counted"))
        seen: dict[int, int] = {}
        while not call.done():
            live = (await http.get("/maestro/progress")).json()["requests"]
            seen |= {c["computed_tokens"]: c["kv_bytes"] for c in live if c["computed_tokens"]}
        await call
    assert seen == {tokens: ours.bytes_of(tokens) for tokens in seen}
    assert len(set(seen.values())) > 1, "it grew by a block at least"


async def test_kv_memory_follows_the_limit(vllm_node: LocalNode) -> None:
    async with engine(vllm_node, "smollm2") as http:
        told = await answers(http)
        kv = (await state(http))["kv"]
        for limit in (kv["floor_bytes"], kv["built_bytes"], (kv["floor_bytes"] * 2)):
            answer = await http.post("/maestro/kv", json={"limit_bytes": limit})
            now = (await state(http))["kv"]
            assert answer.status_code == 200
            assert limit - now["block_bytes"] < now["held_bytes"] <= limit
            assert now["resident_bytes"] <= 1.01 * limit  # pages on the edges
            assert await answers(http) == told
        for wrong in (kv["floor_bytes"] - 1, kv["built_bytes"] + 1):
            refused = await http.post("/maestro/kv", json={"limit_bytes": wrong})
            assert refused.status_code == 422
            assert "max_model_len" in refused.json()["error"]
        assert (await state(http))["kv"]["limit_bytes"] == now["limit_bytes"]


async def test_blocks_in_use_are_given_up_only_when_their_calls_end(vllm_node: LocalNode) -> None:
    """Shrink below what runs: nothing fails, the limit is reached in the end."""
    async with engine(vllm_node, "smollm2") as http:
        floor = (await state(http))["kv"]["floor_bytes"]
        calls = [asyncio.create_task(ask(http, f"{i} {LONG * 2}", 40, f"c{i}")) for i in range(6)]
        await running(http, 4)
        asked = (await http.post("/maestro/kv", json={"limit_bytes": floor})).json()["kv"]
        assert asked["held_bytes"] > floor
        assert all(await asyncio.gather(*calls))
        async with asyncio.timeout(60):
            while (await state(http))["kv"]["held_bytes"] > floor:
                await asyncio.sleep(0.05)
        assert (await state(http))["kv"]["resident_bytes"] <= 1.01 * floor  # pages on the edges


async def test_a_kept_prefix_outlives_the_calls_that_would_evict_it(vllm_node: LocalNode) -> None:
    async with engine(vllm_node, "smollm2") as http:
        kv = (await state(http))["kv"]
        limit = kv["floor_bytes"] + 8 * kv["block_bytes"]
        await http.post("/maestro/kv", json={"limit_bytes": limit})
        await ask(http, LONG + "kept", 4, "kept")
        kept = await http.post("/maestro/prefix/keep", json={"call": "kept", "seconds": 600})
        assert kept.json()["pinned_bytes"] >= 2 * kv["block_bytes"]
        assert (await state(http))["kv"]["pinned_bytes"] == kept.json()["pinned_bytes"]
        for number in range(12):  # more than the whole limit
            await ask(http, f"{number} {LONG * 2}", 4)
        before = await prefix_hits(http)
        await ask(http, LONG + "kept", 4)
        assert await prefix_hits(http) - before >= 256
        await http.post("/maestro/prefix/drop", json={"call": "kept"})
        assert (await state(http))["kv"]["pinned_bytes"] == 0
        gone = await http.post("/maestro/prefix/keep", json={"call": "nobody", "seconds": 1})
        assert gone.status_code == 404
        too_much = await http.post("/maestro/kv", json={"limit_bytes": kv["floor_bytes"]})
        assert too_much.status_code == 200
        await ask(http, LONG + "other", 4, "other")
        refused = await http.post("/maestro/prefix/keep", json={"call": "other", "seconds": 1})
        assert refused.status_code == 409


async def test_kept_prefixes_expire(vllm_node: LocalNode) -> None:
    async with engine(vllm_node, "smollm2") as http:
        await ask(http, LONG + "soon", 4, "soon")
        await http.post("/maestro/prefix/keep", json={"call": "soon", "seconds": 0.1})
        async with asyncio.timeout(60):
            while (await state(http))["kv"]["pinned_bytes"]:
                await asyncio.sleep(0.05)


async def test_a_warmed_prefix_is_found_by_the_call(vllm_node: LocalNode) -> None:
    async with engine(vllm_node, "smollm2") as http:
        messages = [{"role": "system", "content": "You count foxes. " + LONG}]
        body = {"call": "next", "messages": messages, "seconds": 600}
        warmed = await http.post("/maestro/prefix/warm", json=body)
        assert warmed.json()["pinned_bytes"] > 0
        before = await prefix_hits(http)
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        chat = {"model": model, "messages": [*messages, {"role": "user", "content": "Go"}]}
        await http.post("/v1/chat/completions", json={**chat, "max_tokens": 2})
        assert await prefix_hits(http) - before >= 256
        await http.post("/maestro/prefix/drop", json={"call": "next"})


async def test_bad_orders_are_refused_by_name(vllm_node: LocalNode) -> None:
    async with engine(vllm_node, "tiny") as http:
        moon = await http.post("/maestro/residency", json={"residency": "moon"})
        assert (moon.status_code, "moon" in moon.json()["error"]) == (422, True)
        empty = await http.post("/maestro/kv", json={})
        assert (empty.status_code, "limit_bytes" in empty.json()["error"]) == (400, True)
        packed = await http.get("/maestro/checksum")
        assert (packed.status_code, "on a CPU" in packed.json()["error"]) == (409, True)


def test_a_worker_without_an_agent_ends_itself() -> None:
    script = """
import asyncio
from maestro_backend.workers.vllm_plugin._control import Control
async def main():
    control = Control(None)
    control.renew_lease(3600.0)
    control.renew_lease(0.05)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    run = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), timeout=50)
    assert run.returncode == -signal.SIGTERM
