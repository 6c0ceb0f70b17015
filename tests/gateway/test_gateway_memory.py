"""What the shell does about memory: KV limits, kept prefixes, preemption, progress."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from gateway.gateways import GIB, Gateway, gateway
from gateway.test_gateway_control import TEAM, URL, headers

from maestro_agents.protocol import BackendError
from maestro_agents.testing import Latency
from maestro_backend.gateway import CallRecord, CallStatus
from maestro_backend.recording import replay
from maestro_backend.scheduler import Residency, Settings, WorkerState
from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run
from maestro_backend.scheduler.policies import POLICIES, Policy

ELASTIC = {
    "elastic": True,
    "kv_floor_bytes": 4_096_000,
    "kv_max_bytes": GIB,
    "kv_limit_bytes": 4_096_000,
}


async def metric(g: Gateway, line: str) -> float:
    text = (await g.http.get("/metrics")).text
    [found] = [x for x in text.splitlines() if x.startswith(line + " ")]
    return float(found.split()[-1])


async def running(g: Gateway, number: int) -> CallRecord:
    """Wait until the call with this number runs in its engine."""

    def at_work() -> bool:
        return len(g.stubs["big"].requests) > number

    await g.until(at_work)
    return list(g.shell.records.calls.values())[number]


@pytest.mark.parametrize("held", [0, 80 * GIB])
async def test_a_model_that_can_never_run_here_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, held: int
) -> None:
    """Also while its KV cache, which has one size, is away with its weights."""
    fixed = {"elastic": False, "kv_max_bytes": 80 * GIB, "kv_limit_bytes": held}
    async with gateway(tmp_path, worker=fixed):
        assert "big cannot run here: it needs 81.0 GiB" in caplog.text


async def test_a_kv_limit_grows_for_a_call_that_needs_it(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker=ELASTIC) as g:
        reply = await g.chat(text="word " * 4000)
        assert reply.status_code == 200
        [(model, limit)] = g.node.limits
        assert model == "big" and ELASTIC["kv_floor_bytes"] < limit <= GIB
        assert g.shell.scheduler.ledger.claims["n/big"].kv_limit == limit
        assert await metric(g, 'maestro_actions_total{action="kv_grow"}') == 1
        state = (await g.http.get("/v1/maestro/state")).json()
        assert state["actions"]["kv_grow"] == 1


async def test_a_limit_that_the_node_refuses_loses_no_call(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker=ELASTIC) as g:

        async def refuse(model: str, limit_bytes: int) -> int:
            raise BackendError("not now")

        g.node.set_kv_limit = refuse  # type: ignore[method-assign]  # a node that refuses
        assert (await g.chat(text="word " * 4000)).status_code == 200
        assert await metric(g, 'maestro_actions_total{action="failure"}') == 1


async def test_a_prefix_is_kept_for_the_next_call_of_the_run(tmp_path: Path) -> None:
    roomy = {**ELASTIC, "kv_limit_bytes": GIB}
    async with gateway(tmp_path, worker=roomy) as g:
        await g.http.put(URL, content=TEAM.model_dump_json())
        await g.chat(headers=headers("plan"))
        await g.chat(headers=headers("write"))  # from now on, write is known to call this model
        await g.chat(headers=headers("plan", "run-2"))
        plan = list(g.shell.records.calls)[2]
        await g.until(lambda: any(call == plan for _, call, _ in g.node.prefixes))
        assert g.shell.scheduler.ledger.claims["n/big"].kv_kept > 0
        body = {"events": [{"type": "run_ended"}]}
        await g.http.post("/v1/maestro/runs/run-2/events", json=body)
        await g.until(lambda: ("big", plan, 0.0) in g.node.prefixes)
        assert g.shell.scheduler.ledger.claims["n/big"].kv_kept == 0


async def test_a_prefix_that_is_gone_is_not_held(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker={**ELASTIC, "kv_limit_bytes": GIB}) as g:
        g.node.keeps = False
        await g.http.put(URL, content=TEAM.model_dump_json())
        for run in ("run-1", "run-2"):
            for stage in ("plan", "write"):
                assert (await g.chat(headers=headers(stage, run))).status_code == 200
        await g.until(lambda: g.shell.scheduler.counts["failure"] > 0)
        assert g.shell.scheduler.ledger.claims["n/big"].kv_kept == 0


async def preempted(g: Gateway, **long: Any) -> asyncio.Task[Any]:
    """A long call that holds all KV bytes, and then a short one that waits for some."""
    body = {"text": "word " * 4000, "headers": headers("plan"), **long}
    first = asyncio.create_task(g.chat(**body))
    await running(g, 0)
    second = asyncio.create_task(g.chat(text="short", headers=headers("write", "run-2")))
    await g.until(lambda: g.shell.scheduler.counts["delay"] > 0)
    return asyncio.ensure_future(asyncio.gather(first, second))


HELD = {"kv_limit_bytes": 4_000_000}
"""The long prompt of about 5,000 tokens takes all of it."""
AT_ONCE = Settings(preempt_patience_s=0.1)


class Ruthless(Policy):
    """A larger call gives way, however long it has run already."""

    name = "maestro"

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        return (call.request.kv_tokens,)

    def may_preempt(self, key: Key, victim: Key) -> bool:
        return victim > key


@pytest.fixture
def ruthless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "maestro", Ruthless)
    monkeypatch.setattr("maestro_backend.scheduler._shortage._LOSS", 1e9)


@pytest.mark.usefixtures("ruthless")
async def test_a_preempted_call_is_aborted_and_served_later(tmp_path: Path) -> None:
    recording = tmp_path / "flight.jsonl"
    async with gateway(tmp_path, worker=HELD, settings=AT_ONCE, recording=recording) as g:
        await g.http.put(URL, content=TEAM.model_dump_json())
        with g.stubs["big"].paused():
            both = await preempted(g)
            await g.until(lambda: g.stubs["big"].aborted == 1)
            await running(g, 1)
        first, second = await both
        assert (first.status_code, second.status_code) == (200, 200)
        texts = [len(r.body["messages"][0]["content"]) for r in g.stubs["big"].requests]
        assert texts == [20_000, 5, 20_000], "the long one was started again"
        records = list(g.shell.records.calls.values())
        assert [r.status for r in records] == [CallStatus.DONE, CallStatus.DONE]
        assert g.shell.scheduler.counts["preemption"] == 1
        assert g.shell.scheduler.calls.by_id == {}
    assert replay(recording)[1] is None


@pytest.mark.usefixtures("ruthless")
async def test_a_call_whose_client_has_seen_a_byte_is_not_preempted(tmp_path: Path) -> None:
    slow = Latency(decode_tokens_s=30)
    async with gateway(
        tmp_path, worker=HELD, settings=AT_ONCE, latency=slow, output_tokens=30
    ) as g:
        await g.http.put(URL, content=TEAM.model_dump_json())
        body = {"text": "word " * 4000, "headers": headers("plan"), "stream": True}
        first = asyncio.create_task(g.chat(**body))
        record = await running(g, 0)
        await g.until(lambda: record.first_token is not None)
        second = asyncio.create_task(g.chat(text="short", headers=headers("write", "run-2")))
        assert (await first).text.endswith("data: [DONE]\n\n")
        assert (await second).status_code == 200
        counts = g.shell.scheduler.counts
        assert counts["preemption"] == counts["failure"] == 1
        assert record.attempts == 1 and g.stubs["big"].aborted == 0


@pytest.mark.usefixtures("ruthless")
async def test_a_client_that_leaves_while_preempted_is_gone(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker=HELD, settings=AT_ONCE) as g:
        await g.http.put(URL, content=TEAM.model_dump_json())
        with g.stubs["big"].paused():
            both = await preempted(g)
            await g.until(lambda: g.stubs["big"].aborted == 1)
            await running(g, 1)
            both.cancel()
            await asyncio.gather(both, return_exceptions=True)
            await g.until(lambda: not g.shell.scheduler.calls.by_id)
        assert (await g.chat()).status_code == 200
        g.shell.scheduler.validate()


async def test_calls_that_do_not_stream_show_their_progress(tmp_path: Path) -> None:
    pace = Latency(decode_tokens_s=200)
    async with gateway(tmp_path, output_tokens=300, latency=pace) as g:
        call = asyncio.create_task(g.chat(text="word " * 400))
        record = await running(g, 0)
        await g.until(lambda: record.output_tokens >= 50)
        held = g.shell.scheduler.ledger.claims["n/big"].kv_reserved
        assert held >= (400 + record.output_tokens) * 1000
        assert (await call).status_code == 200
        assert record.output_tokens == 300


async def test_an_engine_that_tells_no_progress_serves_all_the_same(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        asked.append(request.split(b" ")[1])
        found = b"404 Not Found" if b"/maestro/" in request else b"200 OK"
        if b"/maestro/" not in request:
            await asked_enough.wait()
        body = b"{}"
        head = b"HTTP/1.1 " + found + b"\r\ncontent-length: 2\r\nconnection: close\r\n\r\n"
        writer.write(head + body)
        await writer.drain()
        writer.close()
        if b"/maestro/" in request:
            asked_enough.set()

    asked: list[bytes] = []
    asked_enough = asyncio.Event()
    address = str(tmp_path / "raw.sock")
    async with await asyncio.start_unix_server(answer, address), gateway(tmp_path) as g:
        g.node.change("n/big", address=address)
        await g.until(lambda: g.shell.scheduler.workers["n/big"].address == address)
        assert (await g.chat()).status_code == 200
        assert asked.count(b"/maestro/progress") == 1


async def test_measured_memory_is_told(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.node.measure("cpu", 123)
        await g.until(lambda: g.shell.scheduler.ledger.measured == {"n/cpu": 123})
        assert await metric(g, 'maestro_device_used_bytes{device="n/cpu"}') == 123
        state = (await g.http.get("/v1/maestro/state")).json()
        assert state["devices"]["n/cpu"]["used"] == 123
        assert state["hosts"] == {"n": {"capacity": 0, "free": 0, "used": None}}


async def test_a_suspended_model_comes_back_for_its_call(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.node.answer = None
        g.node.change("n/big", state=WorkerState.SUSPENDED, residency=Residency.HOST)
        core = g.shell.scheduler
        await g.until(lambda: core.workers["n/big"].state is WorkerState.SUSPENDED)
        assert (await g.chat()).status_code == 200
        assert g.node.moves == [("big", Residency.DEVICE)]


async def test_a_suspended_model_that_can_neither_resume_nor_stop_is_503(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.node.change("n/big", state=WorkerState.SUSPENDED, residency=Residency.HOST)
        reply = await g.chat()
        assert reply.status_code == 503 and "moves nothing" in reply.text
        assert g.node.moves == [("big", Residency.DEVICE), ("big", Residency.DISK)]
