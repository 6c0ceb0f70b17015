"""Chat completions through the gateway: what clients see, what engines get."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from gateway.gateways import gateway
from openai import APIError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from maestro_agents.testing import Latency
from maestro_backend.node import NodeLostError
from maestro_backend.recording import replay
from maestro_backend.scheduler import Residency, WorkerState

SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "schema": {
            "type": "object",
            "properties": {"verdict": {"enum": ["approve", "revise"]}},
            "required": ["verdict"],
        },
    },
}
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}},
            "required": ["query"],
        },
    },
}


async def test_a_plain_call_comes_back_with_its_headers(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.chat()
        assert reply.status_code == 200
        assert reply.json()["choices"][0]["message"]["content"]
        assert int(reply.headers["content-length"]) == len(reply.content)
        assert reply.headers["x-maestro-worker"] == "n/big"
        assert int(reply.headers["x-maestro-queue-ms"]) >= 0
        assert int(reply.headers["x-maestro-predicted-tokens"]) > 0


async def test_the_engine_gets_the_body_with_only_our_changes(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        extra = {"maestro": {"role": "planner"}, "priority": -5, "temperature": 0.5, "custom": [1]}
        await g.chat("gpt-4o", "Grüße", headers={"traceparent": "00-1-2-01"}, **extra)
        [request] = g.stubs["big"].requests
        assert request.headers["traceparent"] == "00-1-2-01"
        assert request.body["model"] == "big"
        assert request.body["messages"] == [{"role": "user", "content": "Grüße"}]
        assert (request.body["temperature"], request.body["custom"]) == (0.5, [1])
        assert "maestro" not in request.body
        assert request.body["priority"] >= 0, "a client cannot jump the queue"


async def test_the_openai_package_streams_and_sees_usage_only_if_it_asked(tmp_path: Path) -> None:
    async with gateway(tmp_path, output_tokens=12) as g:
        client = AsyncOpenAI(base_url=g.url, api_key="EMPTY")
        ask = {"model": "big", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        plain = [c async for c in await client.chat.completions.create(**ask)]
        assert all(chunk.choices for chunk in plain)
        counted = [
            c
            async for c in await client.chat.completions.create(
                **ask, stream_options={"include_usage": True}
            )
        ]
        assert counted[-1].usage is not None and counted[-1].usage.completion_tokens == 12
        await client.close()
        await g.until(lambda: all(r.ended for r in g.shell.records.calls.values()))
        assert [r.output_tokens for r in g.shell.records.calls.values()] == [12, 12]


async def test_tools_and_structured_output_pass_through(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        tool = await g.chat(tools=[TOOL], tool_choice="required")
        [call] = tool.json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "search"
        structured = await g.chat(response_format=SCHEMA)
        content = structured.json()["choices"][0]["message"]["content"]
        assert json.loads(content)["verdict"] in ("approve", "revise")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "model"),
        ({"model": "big"}, "messages"),
        ({"model": "big", "messages": []}, "messages"),
        ({"model": "big", "messages": ["x"]}, "messages[0].role"),
        ({"model": "big", "messages": [{"role": "user"}, {"role": 3}]}, "messages[1].role"),
        ({"model": 7, "messages": [{"role": "user"}]}, "model"),
        ({"model": "big", "messages": [{"role": "user"}], "stream": "yes"}, "stream"),
        ({"model": "big", "messages": [{"role": "user"}], "max_tokens": 0}, "max_tokens"),
        ({"model": "big", "messages": [{"role": "user"}], "temperature": "hot"}, "temperature"),
        ({"model": "big", "messages": [{"role": "user"}], "tools": {}}, "tools"),
    ],
)
async def test_a_malformed_body_gets_400_naming_the_field(
    tmp_path: Path, body: dict[str, object], param: str
) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.post("/v1/chat/completions", json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param)
        assert param in error["message"]
        assert g.stubs["big"].requests == []


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe"])
async def test_a_body_that_is_no_json_object_gets_400(tmp_path: Path, raw: bytes) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.post("/v1/chat/completions", content=raw)
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_an_unknown_model_names_those_there_are(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        client = AsyncOpenAI(base_url=g.url, api_key="EMPTY")
        with pytest.raises(NotFoundError, match="big, gpt-4o, small"):
            await client.chat.completions.create(
                model="nope", messages=[{"role": "user", "content": "x"}]
            )
        await client.close()


async def test_the_engines_own_400_reaches_the_client(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_model_len=64) as g:
        client = AsyncOpenAI(base_url=g.url, api_key="EMPTY")
        with pytest.raises(BadRequestError) as caught:
            await client.chat.completions.create(
                model="big", messages=[{"role": "user", "content": "word " * 500}]
            )
        assert caught.value.code == "context_length_exceeded"
        await client.close()
        assert g.shell.scheduler.calls.by_id == {}


@pytest.mark.parametrize(
    "hint",
    ["x", 7, {"role": ""}, {"slo": {"deadline_s": -1}, "role": "critic"}, {"role": "r" * 20_000}],
)
async def test_a_bad_hint_never_fails_a_call_and_is_counted(tmp_path: Path, hint: object) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.chat(maestro=hint)
        assert reply.status_code == 200
        assert 'maestro_bad_hints_total{hint="maestro' in (await g.http.get("/metrics")).text
        if isinstance(hint, dict) and "slo" in hint:
            assert [r.role for r in g.shell.records.calls.values()] == ["critic"]


async def test_a_client_that_leaves_aborts_the_engine_request(tmp_path: Path) -> None:
    slow = Latency(decode_tokens_s=5)
    async with gateway(tmp_path, latency=slow, output_tokens=500) as g:
        for stream in (True, False):
            call = asyncio.create_task(g.chat(stream=stream))
            await g.until(lambda: g.stubs["big"].running == 1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await g.until(lambda: g.stubs["big"].running == 0)
        assert g.stubs["big"].aborted == 2
        assert [r.status for r in g.shell.records.calls.values()] == ["cancelled"] * 2
        assert g.shell.scheduler.calls.by_id == {}


async def test_a_client_that_hangs_up_at_done_has_had_its_call(tmp_path: Path) -> None:
    body = {"model": "big", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with gateway(tmp_path, output_tokens=3) as g:
        for _ in range(20):
            async with g.http.stream("POST", "/v1/chat/completions", json=body) as reply:
                async for line in reply.aiter_lines():
                    if line == "data: [DONE]":
                        break
        await g.until(lambda: all(r.ended for r in g.shell.records.calls.values()))
        assert [r.status for r in g.shell.records.calls.values()] == ["done"] * 20
        assert [r.output_tokens for r in g.shell.records.calls.values()] == [3] * 20


async def test_a_client_that_leaves_the_queue_is_forgotten(tmp_path: Path) -> None:
    async with gateway(tmp_path, window=1, latency=Latency(decode_tokens_s=50)) as g:
        with g.stubs["big"].paused():
            first = asyncio.create_task(g.chat())
            await g.until(lambda: len(g.stubs["big"].requests) == 1)
            queued = asyncio.create_task(g.chat())
            await g.until(lambda: len(g.shell.scheduler.calls.by_id) == 2)
            queued.cancel()
            await g.until(lambda: len(g.shell.scheduler.calls.by_id) == 1)
        assert (await first).status_code == 200
        assert len(g.stubs["big"].requests) == 1, "the queued call never reached the engine"


async def test_a_worker_lost_before_the_first_byte_is_invisible(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for stream in (False, True):
            g.stubs["big"].fail_next("drop")
            reply = await g.chat(stream=stream)
            assert reply.status_code == 200
        assert [r.attempts for r in g.shell.records.calls.values()] == [2, 2]


async def test_a_worker_lost_in_mid_stream_is_a_clear_error(tmp_path: Path) -> None:
    async with gateway(tmp_path, output_tokens=50) as g:
        g.stubs["big"].fail_next("drop", after_tokens=5)
        client = AsyncOpenAI(base_url=g.url, api_key="EMPTY", max_retries=0)
        seen = 0
        with pytest.raises(APIError, match="lost in mid-stream"):
            async for _ in await client.chat.completions.create(
                model="big", messages=[{"role": "user", "content": "x"}], stream=True
            ):
                seen += 1
        assert seen >= 5
        await client.close()
        await g.until(lambda: g.shell.scheduler.calls.by_id == {})


async def test_an_engine_that_keeps_failing_ends_in_502_with_its_words(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.stubs["big"].fail_next("error", status=500, times=2)
        reply = await g.chat()
        assert reply.status_code == 502
        assert reply.json()["error"]["code"] == "worker_failed"
        assert "HTTP 500" in reply.json()["error"]["message"]
        assert (await g.chat()).status_code == 200


async def test_calls_wait_for_a_worker_that_restarts(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.node.change("n/big", state=WorkerState.RESTARTING)
        await g.until(lambda: g.shell.scheduler.workers["n/big"].state == "restarting")
        waiting = asyncio.create_task(g.chat())
        await g.until(lambda: len(g.shell.scheduler.calls.by_id) == 1)
        assert (await g.chat("small")).status_code == 200, "other models go on"
        assert not waiting.done()
        g.node.change("n/big", state=WorkerState.READY)
        assert (await waiting).status_code == 200


async def test_a_model_that_cannot_be_brought_in_is_503_with_the_reason(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.node.change("n/big", state=WorkerState.STOPPED, residency=Residency.DISK)
        await g.until(lambda: g.shell.scheduler.workers["n/big"].state == "stopped")
        reply = await g.chat()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_failed")
        assert "a static node moves nothing" in reply.json()["error"]["message"]
        assert int(reply.headers["retry-after"]) > 0


async def test_a_node_lost_while_it_brings_a_model_in_fails_no_call(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.node.answer, g.node.gone = NodeLostError("gone"), True
        g.node.change("n/big", state=WorkerState.STOPPED, residency=Residency.DISK)
        await g.until(lambda: g.shell.scheduler.workers["n/big"].state == "stopped")
        waiting = asyncio.create_task(g.chat())
        await g.until(lambda: ("big", Residency.DEVICE) in g.node.moves)
        g.node.change("n/big", state=WorkerState.READY, residency=Residency.DEVICE)
        assert (await waiting).status_code == 200


async def test_a_request_to_the_node_that_breaks_alone_is_answered(tmp_path: Path) -> None:
    """The node lives on: nothing else would ever tell that the model does not come."""
    async with gateway(tmp_path) as g:
        g.node.answer = NodeLostError("the connection broke")
        g.node.change("n/big", state=WorkerState.STOPPED, residency=Residency.DISK)
        await g.until(lambda: g.shell.scheduler.workers["n/big"].state == "stopped")
        reply = await g.chat()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_failed")
        assert "the connection broke" in reply.json()["error"]["message"]


async def test_the_window_bounds_what_the_engine_holds(tmp_path: Path) -> None:
    async with gateway(tmp_path, window=3) as g:
        with g.stubs["big"].paused():
            calls = [asyncio.create_task(g.chat(text=str(i))) for i in range(10)]
            await g.until(lambda: len(g.shell.scheduler.calls.by_id) == 10)
            await g.until(lambda: len(g.stubs["big"].requests) == 3)
        replies = await asyncio.gather(*calls)
        assert {r.status_code for r in replies} == {200}
        assert len(g.stubs["big"].requests) == 10


async def test_two_hundred_calls_at_once_are_all_answered(tmp_path: Path) -> None:
    recording = tmp_path / "flight.jsonl"
    async with gateway(tmp_path, window=4, recording=recording) as g:
        calls = [g.chat(("big", "small")[i % 2], str(i), stream=i % 3 == 0) for i in range(200)]
        replies = await asyncio.gather(*calls)
        assert {r.status_code for r in replies} == {200}
        g.shell.scheduler.validate()
    count, divergence = replay(recording)
    assert divergence is None and count >= 400


async def test_models_health_and_unknown_routes(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        models = {m["id"]: m for m in (await g.http.get("/v1/models")).json()["data"]}
        assert set(models) == {"big", "small", "gpt-4o"}
        assert models["gpt-4o"]["residency"] == "device"
        assert models["big"]["max_model_len"] == 4096
        health = (await g.http.get("/health")).json()
        assert sorted(health["ready"]) == ["big", "small"]
        missing = await g.http.get("/v1/nothing")
        assert missing.status_code == 404 and "/v1/nothing" in missing.json()["error"]["message"]
        wrong = await g.http.get("/v1/chat/completions")
        assert wrong.status_code == 405 and "takes no GET" in wrong.json()["error"]["message"]


async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    async with gateway(tmp_path, output_tokens=7) as g:
        await g.chat()
        text = (await g.http.get("/metrics")).text
        assert 'maestro_calls_total{model="big",status="done"} 1.0' in text
        assert 'maestro_tokens_total{kind="output",model="big"} 7.0' in text
        assert 'maestro_worker_ready{worker="n/big"} 1.0' in text
        assert 'maestro_kv_reserved_bytes{worker="n/big"} 0.0' in text


async def test_with_a_key_all_but_health_ask_for_it(tmp_path: Path) -> None:
    async with gateway(tmp_path, api_key="secret") as g:
        assert (await g.http.get("/health")).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}):
            reply = await g.http.get("/v1/models", headers=headers)
            assert reply.status_code == 401
            assert "API key" in reply.json()["error"]["message"]
        good = {"authorization": "Bearer secret"}
        assert (await g.chat(headers=good)).status_code == 200


async def test_the_sync_openai_package_works_too(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:

        def ask() -> str | None:
            with OpenAI(base_url=g.url, api_key="EMPTY") as client:
                reply = client.chat.completions.create(
                    model="big", messages=[{"role": "user", "content": "x"}]
                )
                return reply.choices[0].message.content

        assert await asyncio.to_thread(ask)


async def test_a_body_in_many_pieces_is_read_whole(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:

        async def pieces():  # type: ignore[no-untyped-def]  # an async generator of bytes
            body = json.dumps({"model": "big", "messages": [{"role": "user", "content": "x" * 99}]})
            for i in range(0, len(body), 7):
                yield body[i : i + 7].encode()

        assert (await g.http.post("/v1/chat/completions", content=pieces())).status_code == 200
