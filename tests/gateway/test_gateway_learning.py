"""Predictions in the gateway: beside the calls, refreshed, explained, kept across restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from gateway.gateways import Gateway, gateway

from maestro_agents.testing import Latency
from maestro_backend.cli import main
from maestro_backend.predictor import CallOutcome, CallShape
from maestro_backend.predictor.store import StoreView


def headers(run: str, stage: str = "write") -> dict[str, str]:
    return {"x-maestro-run": run, "x-maestro-workflow": "team@1", "x-maestro-stage": stage}


async def serve_runs(g: Gateway, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        run = f"run-{number}"
        reply = await g.chat(headers=headers(run))
        assert reply.status_code == 200
        await g.http.post(
            f"/v1/maestro/runs/{run}/events", json={"events": [{"type": "run_ended"}]}
        )


async def test_a_stage_is_learned_from_run_to_run(tmp_path: Path) -> None:
    async with gateway(tmp_path, output_tokens=37) as g:
        first = await g.chat(headers=headers("r"))
        await serve_runs(g, 12)
        later = await g.chat(headers=headers("s"))
        assert int(first.headers["x-maestro-predicted-tokens"]) != 37
        assert int(later.headers["x-maestro-predicted-tokens"]) == pytest.approx(37, abs=8)


async def test_what_was_learned_outlives_the_process(tmp_path: Path) -> None:
    async with gateway(tmp_path, output_tokens=37) as g:
        await serve_runs(g, 12)
    with StoreView(tmp_path / "calls.sqlite") as view:
        assert view.count() == 12
        [run] = view.runs()[:1]
    assert run.calls[0].shape.stage == "write"
    async with gateway(tmp_path, output_tokens=37) as g:
        reply = await g.chat(headers=headers("s"))
        assert int(reply.headers["x-maestro-predicted-tokens"]) == pytest.approx(37, abs=8)


async def test_no_prompt_text_is_on_the_disk(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.chat(text="the secret of the house", headers=headers("r"))
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("calls.sqlite*"))
    assert b"write" in kept
    assert b"secret" not in kept


async def test_a_call_that_runs_long_is_predicted_again(tmp_path: Path) -> None:
    latency = Latency(decode_tokens_s=250)
    async with gateway(tmp_path, output_tokens=400, latency=latency) as g:
        shape = CallShape("big", "team@1", "write", prompt_bytes=100)
        for _ in range(20):
            g.shell.predictor.learn(shape, CallOutcome(25, 30))
        task = asyncio.create_task(g.chat(headers=headers("r"), stream=True))
        await g.until(lambda: bool(g.shell.scheduler.calls.by_id))
        [call] = g.shell.scheduler.calls.by_id.values()
        await g.until(lambda: call.request.length.p50 > 100)
        assert call.request.length.p90 > call.request.length.p50
        await task


async def test_a_model_that_breaks_costs_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway(tmp_path) as g:
        estimator = g.shell.predictor.estimator
        assert estimator is not None

        def broken(*_: object) -> None:
            raise RuntimeError("a broken model")

        monkeypatch.setattr(estimator, "estimates", broken)
        for run in ("a", "b"):
            assert (await g.chat(headers=headers(run))).status_code == 200
        assert caplog.text.count("plain tables predict") == 1


async def test_a_second_gateway_on_one_store_serves_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway(tmp_path) as one:
        (tmp_path / "two").mkdir()
        config = one.shell.config.model_copy(update={"state_dir": tmp_path})
        async with gateway(tmp_path / "two") as other:
            journeys = other.shell.book.outlook.journeys
            learning = type(other.shell.learning)(config, other.shell.predictor, journeys)
            async with learning.running():
                await other.until(lambda: "not stored" in caplog.text)
        assert (await one.chat(headers=headers("r"))).status_code == 200


async def test_a_run_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with gateway(tmp_path, output_tokens=9) as g:
        await g.chat(headers=headers("team/run 1", "plan"))
        await g.chat(headers=headers("team/run 1", "write"))
        answer = await g.http.get("/v1/maestro/runs/team%2Frun%201/explain")
        plan, write = answer.json()["calls"]
        assert (plan["stage"], plan["output_tokens"], plan["version"]) == ("plan", 9, "base")
        assert write["predicted"]["p50"] <= write["predicted"]["p90"] <= write["predicted"]["p99"]
        assert write["why"]["usual"] > 0
        assert all(reason["factor"] > 0 for reason in write["why"]["reasons"])
        arguments = ["explain", "--run", "team/run 1", "--url", g.url]
        assert await asyncio.to_thread(main, arguments) == 0
        shown = capsys.readouterr().out
        assert "2 calls" in shown and "usual" in shown
    async with gateway(tmp_path) as g:
        again = (await g.http.get("/v1/maestro/runs/team%2Frun%201/explain")).json()
        assert [call["output_tokens"] for call in again["calls"]] == [9, 9]
        assert (await g.http.get("/v1/maestro/runs/nobody/explain")).status_code == 404


@pytest.mark.parametrize("where", ["call_arrived", "call_predicted", "call_ended"])
async def test_a_defect_in_the_forecast_costs_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async with gateway(tmp_path) as g:

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("a broken forecast")

        monkeypatch.setattr(g.shell.book, where, broken)
        assert (await g.chat(headers=headers("r"))).status_code == 200
        await g.until(lambda: not g.shell.scheduler.calls.by_id)
        assert not g.shell.scheduler.ledger.claims["n/big"].reservations


async def test_a_defect_in_learning_costs_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path) as g:

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("broken tables")

        monkeypatch.setattr(g.shell.predictor, "finish", broken)
        assert (await g.chat(headers=headers("r"))).status_code == 200
        await g.until(lambda: not g.shell.scheduler.calls.by_id)
        assert not g.shell.scheduler.ledger.claims["n/big"].reservations


@pytest.mark.parametrize("field", ["max_tokens", "n"])
async def test_an_absurd_number_is_refused_and_harms_nobody(tmp_path: Path, field: str) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.chat(headers=headers("r"), **{field: 10**400})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
        await g.chat(headers=headers("s"))
        answer = (await g.http.get("/v1/maestro/runs/s/explain")).json()
        assert answer["calls"][0]["version"] == "base"
