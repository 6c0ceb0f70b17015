"""The stub's batch, pace, faults and records."""

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from maestro_agents.protocol import ConfigError, UnsupportedError
from maestro_agents.testing import Latency, StubEngine


def body(text: str = "x", **more: Any) -> dict[str, Any]:
    return {"model": "stub", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
def stub() -> Iterator[StubEngine]:
    with StubEngine(output_tokens=8) as engine:
        yield engine


@pytest.fixture
async def http(stub: StubEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stub.base_url, timeout=10) as client:
        yield client


async def reached(stub: StubEngine, condition: Any) -> None:
    await asyncio.to_thread(stub.wait, condition)


def metrics(stub: StubEngine) -> dict[str, float]:
    lines = httpx.get(f"{stub.url}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


async def test_a_lower_priority_number_is_served_sooner_ties_by_arrival() -> None:
    order: list[str] = []
    paced = Latency(overhead_s=0.05)
    with StubEngine(max_num_seqs=1, latency=paced, output_tokens=1) as stub:
        async with httpx.AsyncClient(base_url=stub.base_url, timeout=10) as http:

            async def ask(name: str, priority: int) -> None:
                await http.post("/chat/completions", json=body(name, priority=priority))
                order.append(name)

            with stub.paused():
                asks = []
                for number, (name, priority) in enumerate(
                    [("first", 0), ("late", 5), ("soon", 1), ("late2", 5), ("urgent", -1)]
                ):
                    asks.append(asyncio.create_task(ask(name, priority)))
                    await reached(stub, lambda n=number: stub.running + stub.waiting == n + 1)
                assert (stub.running, stub.waiting) == (1, 4)
            await asyncio.gather(*asks)
    assert order == ["first", "urgent", "soon", "late", "late2"]


async def test_a_client_that_leaves_is_counted_and_frees_its_slot(
    stub: StubEngine, http: httpx.AsyncClient
) -> None:
    stub.fail_next("hang", after_tokens=2)
    async with http.stream("POST", "/chat/completions", json=body(stream=True)) as reply:
        async for _ in reply.aiter_lines():
            break
        assert stub.running == 1
    await reached(stub, lambda: stub.aborted == 1 and stub.running == 0)
    assert (await http.post("/chat/completions", json=body())).status_code == 200
    assert stub.aborted == 1


async def test_a_client_that_leaves_the_queue_is_never_computed() -> None:
    with StubEngine(max_num_seqs=1, output_tokens=3) as stub, stub.paused():
        async with httpx.AsyncClient(base_url=stub.base_url, timeout=10) as http:
            asks = [
                asyncio.create_task(http.post("/chat/completions", json=body())) for _ in range(2)
            ]
            await reached(stub, lambda: (stub.running, stub.waiting) == (1, 1))
            asks[1].cancel()
            asks[0].cancel()
            await asyncio.wait(asks)
            await reached(stub, lambda: stub.aborted == 2)
            assert (stub.running, stub.waiting) == (0, 0)
        assert metrics(stub)['vllm:generation_tokens_total{engine="0",model_name="stub"}'] == 0


async def test_an_error_fault_comes_before_the_first_byte_and_only_as_often_as_planned(
    stub: StubEngine, http: httpx.AsyncClient
) -> None:
    stub.fail_next("error", status=503, times=2)
    statuses = [
        (await http.post("/chat/completions", json=body(stream=True))).status_code for _ in range(3)
    ]
    assert statuses == [503, 503, 200]


async def test_a_bad_request_does_not_use_up_a_fault(
    stub: StubEngine, http: httpx.AsyncClient
) -> None:
    stub.fail_next("error", status=503)
    assert (await http.post("/chat/completions", json={})).status_code == 400
    assert (await http.post("/chat/completions", json=body())).status_code == 503


async def test_a_drop_cuts_a_stream_after_the_planned_tokens(
    stub: StubEngine, http: httpx.AsyncClient
) -> None:
    stub.fail_next("drop", after_tokens=3)
    lines: list[str] = []
    with pytest.raises(httpx.TransportError):
        async with http.stream("POST", "/chat/completions", json=body(stream=True)) as reply:
            async for line in reply.aiter_lines():
                lines.append(line)
    text = [line for line in lines if '"content": "' in line and '"content": ""' not in line]
    assert len(text) == 3
    assert stub.aborted == 0
    await reached(stub, lambda: stub.running == 0)


async def test_a_drop_before_the_first_byte_sends_nothing(
    stub: StubEngine, http: httpx.AsyncClient
) -> None:
    stub.fail_next("drop")
    with pytest.raises(httpx.TransportError):
        await http.post("/chat/completions", json=body(stream=True))


async def test_faults_can_be_planned_over_http(stub: StubEngine, http: httpx.AsyncClient) -> None:
    planned = await http.post(f"{stub.url}/stub/fault", json={"kind": "error", "status": 500})
    assert planned.json() == {"planned": 1}
    assert (await http.post("/chat/completions", json=body())).status_code == 500
    wrong = await http.post(f"{stub.url}/stub/fault", json={"kind": "explode"})
    assert wrong.json()["error"]["param"] == "kind"


async def test_it_can_be_paused_over_http(stub: StubEngine, http: httpx.AsyncClient) -> None:
    paused = await http.post(f"{stub.url}/stub/paused", json={"paused": True})
    assert paused.json() == {"paused": True, "moving": False}
    call = asyncio.create_task(http.post("/chat/completions", json=body()))
    assert not (await asyncio.wait({call}, timeout=0.2))[0]
    await http.post(f"{stub.url}/stub/paused", json={"paused": False})
    assert (await call).status_code == 200
    wrong = await http.post(f"{stub.url}/stub/paused", json={"paused": "yes"})
    assert wrong.json()["error"]["param"] == "paused"


def test_a_stub_in_this_process_refuses_to_die(stub: StubEngine) -> None:
    with pytest.raises(UnsupportedError, match="drop"):
        stub.fail_next("die")


async def test_requests_are_recorded_with_lower_case_headers(
    stub: StubEngine, http: httpx.AsyncClient
) -> None:
    sent = body("hello", maestro={"role": "planner"})
    await http.post("/chat/completions", json=sent, headers={"X-Maestro-Run": "r1"})
    (seen,) = stub.requests
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["x-maestro-run"] == "r1"
    assert seen.body == sent
    listed = (await http.get(f"{stub.url}/stub/requests")).json()["requests"]
    assert [entry["body"] for entry in listed] == [sent]


async def test_metrics_use_vllms_names(stub: StubEngine, http: httpx.AsyncClient) -> None:
    reply = await http.post("/chat/completions", json=body("hello"))
    usage = reply.json()["usage"]
    seen = metrics(stub)
    labels = '{engine="0",model_name="stub"}'
    assert seen[f"vllm:prompt_tokens_total{labels}"] == usage["prompt_tokens"]
    assert seen[f"vllm:generation_tokens_total{labels}"] == usage["completion_tokens"] == 8
    assert seen[f"vllm:num_requests_running{labels}"] == 0
    assert seen[f"vllm:num_requests_waiting{labels}"] == 0
    assert seen['vllm:cache_config_info{engine="0",num_gpu_blocks="4096",block_size="16"}'] == 1


async def test_output_length_may_depend_on_the_body() -> None:
    with StubEngine(output_tokens=lambda asked: asked["want"]) as stub:
        async with httpx.AsyncClient(base_url=stub.base_url) as http:
            made = [
                (await http.post("/chat/completions", json=body(want=want))).json()["usage"]
                for want in (1, 7, 90)
            ]
    assert [usage["completion_tokens"] for usage in made] == [1, 7, 90]


def test_latency_is_prefill_then_steps_slowed_by_the_batch() -> None:
    latency = Latency(prefill_tokens_s=100, decode_tokens_s=10, batch_slowdown=0.5, overhead_s=1)
    assert latency.first_s(50) == pytest.approx(1.5)
    assert latency.step_s(1) == pytest.approx(0.1)
    assert latency.step_s(3) == pytest.approx(0.2)
    assert Latency().first_s(1000) == Latency().step_s(9) == 0


def test_a_paced_stub_takes_at_least_the_modelled_time() -> None:
    with StubEngine(latency=Latency(decode_tokens_s=100), output_tokens=20) as stub:
        began = time.monotonic()
        httpx.post(f"{stub.base_url}/chat/completions", json=body())
        assert time.monotonic() - began >= 0.19


def test_it_listens_on_a_unix_socket_and_removes_it(tmp_path: Path) -> None:
    path = tmp_path / "stub.sock"
    with StubEngine(uds=path) as stub:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
            assert http.get(f"{stub.base_url}/models").status_code == 200
        with pytest.raises(ConfigError, match="running there"), StubEngine(uds=path):
            pass
    assert not path.exists()


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "stub.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with (
        StubEngine(uds=path) as stub,
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http,
    ):
        assert http.get(f"{stub.url}/health").status_code == 200


def test_leaving_does_not_wait_for_hanging_requests() -> None:
    with StubEngine() as stub:
        stub.fail_next("hang")
        with httpx.Client(timeout=0.2) as http, pytest.raises(httpx.ReadTimeout):
            http.post(f"{stub.base_url}/chat/completions", json=body())
        began = time.monotonic()
    assert time.monotonic() - began < 2


def test_a_missing_uvicorn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r'pip install "maestro-mas\[backend\]"'), StubEngine():
        pass
