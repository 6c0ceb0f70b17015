"""`maestro calibrate` on the stub engine, whose pace is known."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from maestro_agents.protocol import ConfigError
from maestro_agents.testing import Latency, StubEngine
from maestro_backend.calibration_cli import add_calibrate, run_calibrate
from maestro_backend.clusters import (
    DecodePoint,
    EngineClient,
    calibrate,
    load_cluster,
    load_geometry,
)
from maestro_backend.clusters._calibrate import _together
from maestro_backend.clusters._engine_client import Timed

MODEL = load_geometry("llama-3.1-8b")
PREFILL_TOKENS_S = 8000.0
DECODE_TOKENS_S = 80.0
PACE = Latency(prefill_tokens_s=PREFILL_TOKENS_S, decode_tokens_s=DECODE_TOKENS_S)


@pytest.fixture(scope="module")
def stub() -> Iterator[StubEngine]:
    with StubEngine(latency=PACE, output_tokens=32, max_model_len=4096) as engine:
        yield engine


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_calibrate(parser)
    return run_calibrate(parser.parse_args(argv))


async def test_the_pace_of_the_stub_is_found(stub: StubEngine) -> None:
    said: list[str] = []
    async with EngineClient(stub.base_url, "stub") as client:
        found = await calibrate(client, MODEL, seconds=3, step_s=0.002, say=said.append)
    fit = found.fit
    assert fit.prefill_tokens_s == pytest.approx(PREFILL_TOKENS_S, rel=0.1)
    for batch in (1, 4, 8):
        step_s = fit.seconds(DecodePoint(batch, 80, 1.0))
        assert step_s == pytest.approx(1 / DECODE_TOKENS_S, rel=0.1)
    assert found.median_error < 0.1
    assert {point.batch for point in found.decodes} >= {1, 2, 4}
    assert len(said) == len(found.prefills) + len(found.decodes)
    prompts = [request.body["prompt"] for request in stub.requests]
    assert len({prompt[:20] for prompt in prompts}) == len(prompts), "a prefix cache would help"


def test_the_command_writes_a_profile_that_a_cluster_file_can_use(
    stub: StubEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    engine = ("--url", stub.base_url, "--model", "stub", "--geometry", "llama-3.1-8b")
    assert run(*engine, "--seconds", "1.5", "--like", "h100", "--out", str(out)) == 0
    told = capsys.readouterr()
    reached = re.search(r"reached: ([\d.]+) GB/s, ([\d.]+) TFLOPS.*median error", told.out)
    assert reached is not None
    assert "holds the profile 'mine'" in told.err
    (tmp_path / "cluster.yaml").write_text(
        "name: c\ncatalogues: [mine.yaml]\nnodes:\n  - {name: a, host_memory: 1TiB, disk: 6GB/s,"
        " devices: [{profile: mine, static: llama-3.1-8b, models: [llama-3.1-8b]}]}\n"
    )
    profile = load_cluster(tmp_path / "cluster.yaml").nodes[0].devices[0].profile
    assert profile.bandwidth == pytest.approx(float(reached[1]) * 1e9, rel=0.01)
    assert profile.flops == pytest.approx(float(reached[2]) * 1e12, rel=0.01)
    assert (profile.memory_share, profile.compute_share, profile.allreduce_s) == (1, 1, 0)
    assert profile.to_device == 50e9, "what is not measured is that of --like"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "m"], "give --url of a running engine; maestro calibrate starts none"),
        (["--url", "host:1", "--model", "m"], "does not begin with http"),
        (["--url", "http://127.0.0.1:9/v1", "--model", "m"], "no geometry is known for 'm'"),
        (["--url", "http://127.0.0.1:9/v1", "--model", "llama-3.1-8b"], "no engine answers at"),
        (
            ["--url", "http://h/v1", "--model", "llama-3.1-8b", "--api-key-env", "MAESTRO_NO_KEY"],
            "the variable MAESTRO_NO_KEY is not set",
        ),
        (
            ["--url", "http://h/v1", "--model", "llama-3.1-8b", "--like", "h10"],
            "profile: there is no 'h10'; did you mean h100?",
        ),
        (
            ["--url", "http://h/v1", "--model", "llama-3.1-8b", "--seconds", "0"],
            "--seconds must be more than 0",
        ),
        (
            ["--url", "http://h/v1", "--model", "llama-3.1-8b", "--out", "no/where/x.yaml"],
            "there is no folder",
        ),
    ],
)
def test_mistakes_are_named(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(*argv)


def test_a_model_that_is_not_served(stub: StubEngine) -> None:
    with pytest.raises(ConfigError, match=r"does not serve 'llama-3.1-8b' \(it serves: stub\)"):
        run("--url", stub.base_url, "--model", "llama-3.1-8b")


def answering(*statuses: int, seen: list[Any]) -> httpx.MockTransport:
    """Servers that refuse, one status after the other, then answer two tokens."""
    left = list(statuses)
    event = 'data: {"choices": [{"delta": {"content": "a"}, "text": "a"}]}\n\n'
    usage = 'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}\n\n'

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.content, request.headers.get("authorization")))
        if left:
            return httpx.Response(left.pop(0), text="unknown field: ignore_eos")
        return httpx.Response(200, text=event + event + usage + "data: [DONE]\n\n")

    return httpx.MockTransport(handle)


async def test_a_server_without_completions_or_ignore_eos_is_asked_in_another_way() -> None:
    seen: list[Any] = []
    transport = answering(404, 400, seen=seen)
    async with EngineClient("http://e/v1", "m", "secret", transport=transport) as client:
        answer = await client.ask(50, 2)
    assert (answer.prompt_tokens, answer.output_tokens, len(answer.pieces)) == (9, 2, 2)
    paths = [path for path, _, _ in seen]
    assert paths == ["/v1/completions", "/v1/chat/completions", "/v1/chat/completions"]
    assert [b"ignore_eos" in body for _, body, _ in seen] == [True, True, False]
    assert {key for _, _, key in seen} == {"Bearer secret"}


async def test_a_server_that_fails_is_told_as_it_says() -> None:
    transport = answering(500, seen=[])
    async with EngineClient("http://e/v1", "m", "secret", transport=transport) as client:
        with pytest.raises(ConfigError, match="completions answered 500: unknown field") as caught:
            await client.ask(50, 2)
    assert "secret" not in str(caught.value)


def test_answers_that_are_never_made_at_once_say_nothing_of_a_batch() -> None:
    first = Timed(0.0, (1.0, 1.1, 1.2, 1.3), 64, 4)
    later = Timed(0.0, (2.0, 2.1, 2.2, 2.3), 64, 4)
    assert _together([first, later]) is None
    beside = _together([first, replace(later, pieces=first.pieces)])
    assert beside is not None and beside.seconds == pytest.approx(0.1)
