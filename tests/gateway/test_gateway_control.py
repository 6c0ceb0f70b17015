"""The control routes, and annotated calls through them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import quote

import pytest
from gateway.gateways import gateway

from maestro_agents.protocol import END, START, CallIdentity, ConfigError, Edge, Stage, Workflow
from maestro_agents.testing import Latency
from maestro_backend.gateway import Feed, serving
from maestro_backend.predictor import CallOutcome, CallShape

TEAM = Workflow(
    name="team",
    stages=(Stage(path="plan", role="planner"), Stage(path="write", role="writer")),
    edges=(
        Edge(source=START, target="plan"),
        Edge(source="plan", target="write"),
        Edge(source="write", target=END),
    ),
)
URL = f"/v1/maestro/workflows/{quote(TEAM.id, safe='')}"


def headers(stage: str, run: str = "run-1") -> dict[str, str]:
    return CallIdentity(run=run, workflow=TEAM.id, stage=stage).headers()


async def test_an_unknown_workflow_is_served_and_asked_for(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.chat(headers=headers("plan"))
        assert (reply.status_code, reply.headers["x-maestro-workflow"]) == (200, "unknown")
        put = await g.http.put(URL, content=TEAM.model_dump_json())
        assert (put.status_code, put.json()) == (200, {"id": TEAM.id})
        reply = await g.chat(headers=headers("plan"))
        assert "x-maestro-workflow" not in reply.headers


async def test_events_say_when_the_workflow_is_unknown(tmp_path: Path) -> None:
    event = {"type": "run_started", "workflow": TEAM.id}
    async with gateway(tmp_path) as g:
        reply = await g.http.post("/v1/maestro/runs/r/events", json={"events": [event]})
        assert reply.json() == {"accepted": 1}
        assert reply.headers["x-maestro-workflow"] == "unknown"
        await g.http.put(URL, content=TEAM.model_dump_json())
        reply = await g.http.post("/v1/maestro/runs/r/events", json={"events": [event]})
        assert "x-maestro-workflow" not in reply.headers


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        (URL, '{"name": "team"}', "stages"),
        (URL, "not json", "body"),
        (URL, '{"name": "a b", "stages": []}', "name"),
        ("/v1/maestro/workflows/other", TEAM.model_dump_json(), "id"),
    ],
)
async def test_a_wrong_workflow_gets_400_naming_the_field(
    tmp_path: Path, path: str, body: str, where: str
) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.put(path, content=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, where)


async def test_wrong_events_get_400_and_none_is_taken(tmp_path: Path) -> None:
    body = {"events": [{"type": "run_started"}, {"type": "stage_started"}]}
    async with gateway(tmp_path) as g:
        reply = await g.http.post("/v1/maestro/runs/r/events", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].startswith("events.1")
        assert (await g.http.get("/v1/maestro/runs/r")).status_code == 404


async def test_a_body_over_the_limit_gets_413(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.put(URL, content=b" " * (2**20 + 1))
        assert reply.status_code == 413


async def test_a_run_shows_its_calls_forecast_and_lead_times(tmp_path: Path) -> None:
    async with gateway(tmp_path, output_tokens=9) as g:
        await g.http.put(URL, content=TEAM.model_dump_json())
        await g.chat(headers=headers("plan"), maestro={"role": "planner"})
        view = (await g.http.get("/v1/maestro/runs/run-1")).json()
        assert [c["stage"] for c in view["forecast"]] == ["write"]
        await g.chat("small", headers=headers("write"))
        await g.http.post("/v1/maestro/runs/run-1/events", json={"events": [{"type": "run_ended"}]})
        view = (await g.http.get("/v1/maestro/runs/run-1")).json()
        plan, write = view["calls"]
        assert (plan["role"], plan["lead_s"], plan["output_tokens"]) == ("planner", None, 9)
        assert write["lead_s"] > 0 and write["worker"] == "n/small"
        assert view["lead_time_s"]["foreseen"] == 1
        assert (view["announced_never_made"], view["forecast"]) == (0, [])
        assert view["ended"] is not None
        assert g.shell.scheduler.runs.by_id == {}


async def test_prompt_text_is_nowhere_in_what_we_keep(tmp_path: Path) -> None:
    recording = tmp_path / "flight.jsonl"
    async with gateway(tmp_path, recording=recording) as g:
        await g.chat(text="my-secret-prompt", headers=headers("plan"))
        state = (await g.http.get("/v1/maestro/state")).text
        run = (await g.http.get("/v1/maestro/runs/run-1")).text
    assert "my-secret-prompt" not in state + run + recording.read_text()


async def test_state_streams_changes_as_they_happen(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        accept = {"accept": "text/event-stream"}
        async with g.http.stream("GET", "/v1/maestro/state", headers=accept) as stream:
            lines = stream.aiter_lines()
            first = json.loads((await anext(lines)).removeprefix("data: "))
            assert first["type"] == "state" and len(first["workers"]) == 2
            call = asyncio.create_task(g.chat())
            statuses = []
            async for line in lines:
                if line:
                    change = json.loads(line.removeprefix("data: "))
                    statuses.append(change["status"])
                    if change["status"] == "done":
                        break
            assert statuses == ["queued", "running", "done"]
            await call


async def test_two_runs_at_once_keep_apart(tmp_path: Path) -> None:
    async with gateway(tmp_path, latency=Latency(decode_tokens_s=200)) as g:
        await g.http.put(URL, content=TEAM.model_dump_json())
        await asyncio.gather(
            *(g.chat(headers=headers(stage, run)) for run in "ab" for stage in ("plan", "write"))
        )
        for run in "ab":
            view = (await g.http.get(f"/v1/maestro/runs/{run}")).json()
            assert sorted(c["stage"] for c in view["calls"]) == ["plan", "write"]


async def test_the_shortest_run_goes_first(tmp_path: Path) -> None:
    """Two runs without a deadline wait for one place: one has a whole stage ahead of it, the other
    is at its end."""
    async with gateway(tmp_path, window=1) as g:
        await g.http.put(URL, content=TEAM.model_dump_json())
        for stage, tokens in (("plan", 200), ("write", 16)) * 20:
            shape = CallShape("big", TEAM.id, stage, prompt_bytes=100)
            g.shell.predictor.learn(shape, CallOutcome(25, tokens))
        with g.stubs["big"].paused():
            calls = [asyncio.create_task(g.chat(text="first"))]
            await g.until(lambda: len(g.stubs["big"].requests) == 1)
            for text, stage, run in (("long", "plan", "l"), ("short", "write", "s")):
                body = {"text": text, "maestro": {"slo": {"class": "batch"}}}
                calls.append(asyncio.create_task(g.chat(**body, headers=headers(stage, run))))
                await g.until(lambda: len(g.shell.scheduler.calls.by_id) == len(calls))
        await asyncio.gather(*calls)
        order = [r.body["messages"][0]["content"] for r in g.stubs["big"].requests]
        assert order == ["first", "short", "long"]


async def test_a_non_loopback_bind_needs_a_key(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        with pytest.raises(ConfigError, match="MAESTRO_API_KEY"):
            async with serving(g.shell.config, g.node, host="0.0.0.0", port=0):
                pass


async def test_a_taken_port_is_said_clearly(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        port = int(g.url.split(":")[2].split("/")[0])
        with pytest.raises(ConfigError, match="choose another with --port"):
            async with serving(g.shell.config, g.node, host="127.0.0.1", port=port):
                pass


async def test_a_slow_listener_loses_the_oldest_and_stops_at_close() -> None:
    feed = Feed()
    with feed.listening() as changes:
        for number in range(1500):
            feed.publish({"n": number})
        feed.close()
        got = [change["n"] async for change in changes]
    assert got == list(range(501, 1500)), "the last 1,000 entries, one of them the end"
