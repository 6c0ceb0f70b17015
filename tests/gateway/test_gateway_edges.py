"""What the world does to a gateway: odd bodies, failing disks, broken engines, web pages."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from gateway.gateways import gateway

from maestro_agents.protocol import ConfigError
from maestro_agents.testing import Latency
from maestro_backend.gateway import CallRecord, CallStatus
from maestro_backend.gateway._records import Records
from maestro_backend.gateway._sse import StreamReader, Usage
from maestro_backend.recording import Recorder, replay
from maestro_backend.scheduler import Scheduler, Tick
from maestro_backend.scheduler.policies import policy


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"model": "big", "messages": [{"role": "user", "content": "\\ud83d"}]}', "Unicode"),
        (b'{"model": "big", "x": "\\udc00", "messages": [{"role": "user"}]}', "Unicode"),
        (b'{"model": "big", "messages": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
async def test_bodies_that_break_encoders_get_400(tmp_path: Path, raw: bytes, text: str) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.post("/v1/chat/completions", content=raw)
        assert reply.status_code == 400 and text in reply.json()["error"]["message"]
        assert (await g.chat()).status_code == 200


async def test_a_trace_header_that_is_not_ascii_is_left_out(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        headers = {b"tracestate": "a=é".encode("latin-1"), b"traceparent": b"00-1-2-01"}
        body = {"model": "big", "messages": [{"role": "user", "content": "x"}]}
        reply = await g.http.post("/v1/chat/completions", json=body, headers=headers)
        assert reply.status_code == 200
        [request] = g.stubs["big"].requests
        assert "tracestate" not in request.headers and "traceparent" in request.headers


async def test_a_long_stream_reserves_its_prompt_and_ahead_of_its_tokens(tmp_path: Path) -> None:
    async with gateway(tmp_path, output_tokens=600, latency=Latency(decode_tokens_s=600)) as g:
        claim = g.shell.scheduler.ledger.claims["n/big"]
        call = asyncio.create_task(g.chat(text="word " * 400, stream=True))
        await g.until(lambda: len(g.shell.records.calls) == 1)
        [record] = g.shell.records.calls.values()
        prompt = 500  # 2,000 bytes at four bytes a token, and the message around them
        while record.status is not CallStatus.DONE:
            held = sum(claim.reservations.values())
            if record.status is CallStatus.RUNNING and record.first_token is not None:
                assert held >= (prompt + record.output_tokens) * 1000
            await asyncio.sleep(0.005)
        assert (await call).status_code == 200
        assert record.output_tokens == 600 > record.predicted_tokens


ERROR = b'data: {"error": {"message": "out of memory"}}\n\ndata: [DONE]\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


@pytest.mark.parametrize(
    ("streams", "status"),
    [
        ([ERROR, TOKEN + b"data: [DONE]\n\n"], CallStatus.DONE),
        ([TOKEN + ERROR], CallStatus.FAILED),
    ],
)
async def test_an_error_inside_a_stream_is_tried_again_or_recorded(
    tmp_path: Path, streams: list[bytes], status: CallStatus
) -> None:
    """vLLM reports a failure in mid-stream as an event of a 200 reply."""
    left = iter(streams)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        writer.write(head + next(left))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    address = str(tmp_path / "raw.sock")
    async with await asyncio.start_unix_server(answer, address), gateway(tmp_path) as g:
        g.node.change("n/big", address=address)
        await g.until(lambda: g.shell.scheduler.workers["n/big"].address == address)
        reply = await g.chat(stream=True)
        await g.until(lambda: all(r.ended for r in g.shell.records.calls.values()))
        [record] = g.shell.records.calls.values()
        assert (record.status, record.attempts) == (status, len(streams))
        assert ("out of memory" in reply.text) == (status is CallStatus.FAILED)


async def test_the_reader_passes_bytes_unchanged_however_they_are_cut() -> None:
    events = [
        b'data: {"choices":[{"delta":{"content":"Gr\xc3\xbc\xc3\x9fe"}}]}',
        b'data: {"choices":[{"delta":{"content":"data: [DONE] \\n\\n"}}]}',
        b": comment",
    ]
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    for end in (b"\n\n", b"\r\n\r\n"):
        whole = end.join([*events, usage, b"data: [DONE]", b""])
        wanted = end.join([*events, b"data: [DONE]", b""])
        for size in (1, 2, 7, 1000):
            reader = StreamReader(forward_usage=False)
            pieces = [reader.feed(whole[i : i + size]) for i in range(0, len(whole), size)]
            assert b"".join(pieces) == wanted
            assert reader.usage == Usage(3, 2) and reader.done


async def test_an_engines_4xx_is_counted_as_failed(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_model_len=64) as g:
        assert (await g.chat(text="word " * 500)).status_code == 400
        [record] = g.shell.records.calls.values()
        assert record.status is CallStatus.FAILED and "context_length" in record.error


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8000"}, 403),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:1"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
async def test_without_a_key_web_pages_are_kept_out(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    async with gateway(tmp_path) as g:
        assert (await g.chat(headers=headers)).status_code == status


async def test_with_a_key_any_host_is_served(tmp_path: Path) -> None:
    async with gateway(tmp_path, api_key="k") as g:
        headers = {"host": "maestro.example", "authorization": "Bearer k"}
        assert (await g.chat(headers=headers)).status_code == 200


async def test_a_run_id_may_hold_a_slash(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.chat(headers={"x-maestro-run": "team/7", "x-maestro-stage": "a/b"})
        url = "/v1/maestro/runs/team%2F7"
        assert (await g.http.get(url)).json()["run"] == "team/7"
        done = await g.http.post(f"{url}/events", json={"events": [{"type": "run_ended"}]})
        assert done.status_code == 200
        assert (await g.http.get(url)).json()["ended"] is not None


def record(number: int) -> CallRecord:
    return CallRecord(f"c{number}", f"r{number % 3}", "", "", 0, "", "m", 0.0, 1.0)


def test_a_live_record_is_never_dropped_and_ended_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_backend.gateway._records._MAX_CALLS", 10)
    records = Records()
    live = record(0)
    records.add(live)
    for number in range(1, 50):
        ended = record(number)
        ended.status = CallStatus.DONE
        records.add(ended)
    assert len(records.calls) == 10 and records.calls["c0"] is live
    listed = [r.call for run in ("r0", "r1", "r2") for r in records.of_run(run)]
    assert sorted(listed) == sorted(records.calls)


def test_a_recording_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot record to"):
        Recorder(tmp_path, Scheduler(policy("fcfs")))


def test_a_disk_that_fails_ends_the_recording_only(caplog: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    recorder = Recorder(full, Scheduler(policy("fcfs")))
    for _ in range(3):
        recorder.record(0.0, Tick(), [])
    recorder.close()
    assert len([r for r in caplog.records if "ends here" in r.message]) == 1


async def test_a_rejected_call_is_recorded_as_such_and_replays(tmp_path: Path) -> None:
    recording = tmp_path / "flight.jsonl"
    async with gateway(tmp_path, recording=recording) as g:
        g.stubs["big"].fail_next("error", status=503, times=2)
        reply = await g.chat()
        assert reply.status_code == 502
        [failed] = g.shell.records.calls.values()
        assert (failed.status, failed.attempts) == ("failed", 2)
        assert json.loads(reply.text)["error"]["code"] == "worker_failed"
    assert replay(recording)[1] is None
