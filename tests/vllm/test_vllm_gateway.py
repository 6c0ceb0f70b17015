"""The whole path on real vLLM: openai package and example app, through the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from openai import APIError, AsyncOpenAI

from maestro_backend.config import Config
from maestro_backend.gateway import CallStatus, Serving, serving
from maestro_backend.node import LocalNode
from maestro_backend.recording import replay
from maestro_backend.scheduler import WorkerState

pytestmark = pytest.mark.vllm

APP = Path(__file__).parents[2] / "examples" / "research_team" / "app.py"
HELLO = [{"role": "user", "content": "Say hello to Ada."}]


@asynccontextmanager
async def gateway(
    config: Config, node: LocalNode, recording: Path | None = None
) -> AsyncIterator[tuple[Serving, AsyncOpenAI]]:
    """A gateway before the session's engines, with a client that never retries."""
    async with serving(config, node, host="127.0.0.1", port=0, recording=recording) as served:
        async with asyncio.timeout(180):
            while not all_ready(served):
                await asyncio.sleep(0.05)
        client = AsyncOpenAI(base_url=served.url, api_key="EMPTY", max_retries=0, timeout=300)
        async with client:
            yield served, client


def all_ready(served: Serving) -> bool:
    workers = served.shell.scheduler.workers.values()
    return bool(workers) and all(w.state is WorkerState.READY for w in workers)


async def test_the_openai_package_plain_and_streamed(
    vllm_config: Config, vllm_node: LocalNode
) -> None:
    async with gateway(vllm_config, vllm_node) as (served, client):
        ask = {"model": "smollm2", "messages": HELLO, "max_tokens": 12, "temperature": 0}
        plain = await client.chat.completions.create(**ask)
        stream = await client.chat.completions.create(**ask, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == plain.choices[0].message.content
        async with asyncio.timeout(10):
            while not all(r.ended for r in served.shell.records.calls.values()):
                await asyncio.sleep(0.01)
        first, second = served.shell.records.calls.values()
        assert first.prompt_tokens == second.prompt_tokens > 0
        assert first.output_tokens == second.output_tokens == plain.usage.completion_tokens
        assert second.first_token is not None


async def test_a_client_that_leaves_aborts_the_request_in_the_engine(
    vllm_config: Config, vllm_node: LocalNode
) -> None:
    async with gateway(vllm_config, vllm_node) as (served, client):
        stream = await client.chat.completions.create(
            model="smollm2",
            messages=HELLO,
            max_tokens=2000,
            stream=True,
            extra_body={"min_tokens": 2000},
        )
        await anext(aiter(stream))
        await stream.close()
        worker = served.shell.scheduler.workers["here/smollm2"]
        transport = httpx.AsyncHTTPTransport(uds=worker.address)
        async with httpx.AsyncClient(transport=transport, base_url="http://w") as engine:
            async with asyncio.timeout(30):
                while "vllm:num_requests_running" not in (text := await metrics(engine)) or not (
                    idle(text)
                ):
                    await asyncio.sleep(0.1)
        [record] = served.shell.records.calls.values()
        assert record.status is CallStatus.CANCELLED


async def metrics(engine: httpx.AsyncClient) -> str:
    return (await engine.get("/metrics")).text


def idle(text: str) -> bool:
    lines = [x for x in text.splitlines() if x.startswith("vllm:num_requests_running{")]
    return all(float(line.rsplit(" ", 1)[1]) == 0 for line in lines)


async def test_two_research_teams_at_once_on_both_models(
    vllm_config: Config, vllm_node: LocalNode, tmp_path: Path
) -> None:
    recording = tmp_path / "flight.jsonl"
    async with gateway(vllm_config, vllm_node, recording) as (served, _):
        answers = await asyncio.gather(
            research(served.url, "What is a KV cache?"), research(served.url, "Why batch requests?")
        )
        assert all(answer["draft"] for answer in answers)
        shell = served.shell
        async with asyncio.timeout(10):
            while sum(run.ended is not None for run in shell.book.runs.values()) < 2:
                await asyncio.sleep(0.05)
        calls = list(shell.records.calls.values())
        assert {c.status for c in calls} == {CallStatus.DONE}
        assert {c.model for c in calls} == {"smollm2", "tiny"}
        assert len({c.run for c in calls}) == 2
        foreseen = [c for c in calls if c.lead_s is not None]
        assert len(foreseen) >= len(calls) - 2, "all but the two first calls were announced"
        critics = [c for c in calls if c.stage == "critic"]
        assert all(c.lead_s > 1.0 for c in critics if c.lead_s), "known since the planner"
        shell.scheduler.validate()
    count, divergence = replay(recording)
    assert divergence is None and count > 50


async def research(url: str, question: str) -> dict[str, object]:
    """Run the example app as its user would."""
    environment = {
        **os.environ,
        "MAESTRO_BASE_URL": url,
        "RESEARCH_MODEL": "smollm2",
        "CRITIC_MODEL": "tiny",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(APP),
        "--json",
        question,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(300):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    result: dict[str, object] = json.loads(output)
    return result


async def test_a_worker_killed_in_mid_stream_is_a_clear_error_and_comes_back(
    vllm_config: Config, vllm_node: LocalNode
) -> None:
    async with gateway(vllm_config, vllm_node) as (served, client):
        stream = await client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=3000,
            stream=True,
            extra_body={"min_tokens": 3000},
        )
        await anext(aiter(stream))
        worker = served.shell.scheduler.workers["here/tiny"]
        assert worker.pid is not None
        family = psutil.Process(worker.pid).children(recursive=True)
        psutil.Process(worker.pid).kill()
        with pytest.raises(APIError, match="lost in mid-stream"):
            async for _ in stream:
                pass
        # A call that comes while the worker is away waits for it, unseen by its client.
        reply = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)
        assert reply.usage is not None and reply.usage.completion_tokens > 0
        again = served.shell.scheduler.workers["here/tiny"]
        assert again.pid != worker.pid and again.restarts == worker.restarts + 1
        assert not [p for p in family if p.is_running()]
