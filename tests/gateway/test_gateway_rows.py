"""The gateway's rows are those of training: one `features()`, one past."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gateway.gateways import Gateway, gateway

from maestro_backend.gateway._chat import _shape
from maestro_backend.gateway._request import parse_chat
from maestro_backend.predictor import (
    CallShape,
    Estimator,
    Predictor,
    RunExamples,
    base_model,
    read_traces,
)
from maestro_backend.predictor._call import Example

TRACES = Path(__file__).parents[2].parent / "shared" / "data"


def body_of(shape: CallShape) -> dict[str, object]:
    """A request whose prompt has just these counts."""
    fence = "```" + "c" * shape.code_chars + "```" if shape.code_chars > 0 else ""
    left = shape.prompt_chars - len(fence)
    breaks = shape.prompt_lines - shape.messages
    text = "\n" * breaks + fence + "x" * (left - breaks)
    messages = [{"role": "user", "content": text}]
    messages += [{"role": "assistant", "content": ""}] * (shape.messages - 1)
    body: dict[str, object] = {"model": shape.model or "m", "messages": messages}
    if shape.tool_choice:
        body["tools"] = [{"type": "function", "function": {"name": "f"}}] * max(1, shape.tools)
        body["tool_choice"] = shape.tool_choice
    if shape.output_format == "json":
        body["response_format"] = {"type": "json_object"}
    return {**body, "maestro": {"role": shape.role}}


def tellable(call: Example) -> bool:
    """Some traces lack counts, or leave out parts of the prompt that they count the rest of."""
    shape = call.shape
    breaks = shape.prompt_lines - shape.messages
    return shape.messages > 0 and 0 <= breaks <= shape.prompt_chars - shape.code_chars - 6


@pytest.mark.parametrize("source", ["tau1", "chatdev_agile", "lmcache_magentic", "parrot_metagpt"])
def test_recorded_calls_have_the_same_rows_on_the_gateways_path(source: str) -> None:
    pytest.importorskip("pyarrow", reason="reads parquet traces")
    if not TRACES.is_dir():
        pytest.skip("the recorded traces are not beside the checkout")
    runs = read_traces([TRACES / f"{source}.parquet"])[:3]
    estimator = Estimator(base_model())
    predictor = Predictor()
    predictor.use(estimator, "base")
    for run in runs:
        wanted = [estimate.row for _, estimate in estimator.replayed(run)]
        got = served(predictor, run)
        for call, mine, its in zip(run.calls, got, wanted, strict=True):
            if tellable(call):
                assert mine == pytest.approx(its, nan_ok=True, rel=1e-5), call.index
    assert sum(tellable(call) for run in runs for call in run.calls) > 20


def served(predictor: Predictor, run: RunExamples) -> list[np.ndarray]:
    """The rows that the gateway's own steps make of a run, call by call, in waves."""
    rows, ended = [], set[int]()
    calls = list(run.calls)
    while len(rows) < len(calls):
        wave = [c for c in calls[len(rows) :] if {*c.parents} <= ended]
        wave = [c for at, c in enumerate(wave) if c.index == len(rows) + at]
        live = []
        for call in wave:
            shape = arrived(call)
            live.append(predictor.arrive(run.run, shape, 0.0))
            # What only a clock and an engine tell is taken from the record.
            live[-1].shape = replace(live[-1].shape, gap_s=call.shape.gap_s)
        predictor.foretell(live)
        for call, one in zip(wave, live, strict=True):
            assert one.estimate is not None
            rows.append(one.estimate.row)
            predictor.finish(one, call.outcome, 0.0)
            ended.add(call.index)
    return rows


def arrived(call: Example) -> CallShape:
    """The call's shape, read off the wire wherever the trace knows enough to write it there."""
    if not tellable(call):
        return call.shape
    headers = {"x-maestro-stage": call.shape.stage, "x-maestro-run": call.run}
    request = parse_chat(json.dumps(body_of(call.shape)).encode(), headers)
    shape = _shape(request, call.shape.model)
    known = replace(
        shape,
        workflow=call.shape.workflow,
        prompt_tokens=call.shape.prompt_tokens,
        prompt_bytes=call.shape.prompt_bytes,
    )
    return replace(known, tools=call.shape.tools) if call.shape.tools < 0 else known


async def test_what_the_store_holds_replays_to_the_rows_that_were_served(tmp_path: Path) -> None:
    async with gateway(tmp_path, output_tokens=9) as g:
        await g.until(lambda: g.shell.predictor.estimator is not None)
        await _team(g, "r1")
        wanted = {call: live.estimate for call, live in g.shell.learning.remembered().items()}
        assert len(wanted) == 6
        runs = await asyncio.to_thread(g.shell.learning.stored)
    [run] = [run for run in runs if run.run == "r1"]
    replayed = Estimator(base_model()).replayed(run)
    got = sorted((estimate.row.tolist() for _, estimate in replayed), key=str)
    served = sorted((e.row.tolist() for e in wanted.values() if e), key=str)
    assert np.array(got) == pytest.approx(np.array(served), nan_ok=True, rel=1e-5)
    assert len(run.calls[4].parents) == 3, "it waited for all three side by side"


async def _team(g: Gateway, run: str) -> None:
    """plan, three searches side by side, write, review."""

    async def call(stage: str, text: str) -> None:
        headers = {"x-maestro-run": run, "x-maestro-workflow": "team@1", "x-maestro-stage": stage}
        reply = await g.chat(text=text, headers=headers)
        assert reply.status_code == 200

    await call("plan", "plan it\nplease")
    with g.stubs["big"].paused():
        beside = [asyncio.create_task(call("search", "s" * n)) for n in (30, 60, 90)]
        await g.until(lambda: len(g.stubs["big"].requests) == 4)
    await asyncio.gather(*beside)
    await call("write", "```code```")
    await call("review", "well?")
