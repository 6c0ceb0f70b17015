"""The workload of the colocation benchmark: runs of a recorded LangGraph app, on four models.

Stage lengths are recorded ones (`lengths.json`), scaled down for a CPU. The client speaks the wire
protocol that the adapters speak.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from typing import Any

import httpx

from maestro_agents.protocol import (
    BODY_KEY,
    END,
    START,
    Annotation,
    CallIdentity,
    Edge,
    RunEnded,
    RunEvent,
    RunEvents,
    RunStarted,
    Stage,
    StageEnded,
    StageStarted,
    Workflow,
)

MODEL_OF = {
    "analysts": "smollm2",
    "researchers": "writer",
    "research_manager": "judge",
    "debaters": "writer",
    "risk_manager": "judge",
    "trader": "trader",
}
"""Which of the four models each stage calls, in the order of the stages."""

PROMPT_SCALE, OUTPUT_SCALE = 1 / 16, 1 / 16
_MOST_PROMPT, _MOST_OUTPUT = 512, 128

_JSON = {"content-type": "application/json"}

Length = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """Tokens (prompt, output) of each call, stage by stage."""

    stages: tuple[tuple[str, tuple[Length, ...]], ...]


@dataclass(slots=True)
class Outcome:
    """What the runs of one system came to; times in seconds."""

    runs_s: list[float] = field(default_factory=list)
    calls: int = 0
    failed: list[str] = field(default_factory=list)


def recorded_runs(count: int) -> list[RecordedRun]:
    """The first `count` recorded runs, scaled."""
    text = files(__package__).joinpath("lengths.json").read_text(encoding="utf-8")
    return [
        RecordedRun(tuple((stage, tuple(map(_scaled, run[stage]))) for stage in MODEL_OF))
        for run in json.loads(text)["runs"][:count]
    ]


def _scaled(length: Sequence[int]) -> Length:
    prompt, output = length
    return (
        min(_MOST_PROMPT, max(8, round(prompt * PROMPT_SCALE))),
        min(_MOST_OUTPUT, max(4, round(output * OUTPUT_SCALE))),
    )


def workflow(model_of: Mapping[str, str]) -> Workflow:
    """The graph of an app: its stages and their models, one after the other."""
    path = [START, *model_of, END]
    return Workflow(
        name="bench",
        stages=tuple(
            Stage(path=stage, role=stage, model=model, calls=True)
            for stage, model in model_of.items()
        ),
        edges=tuple(Edge(source=source, target=target) for source, target in pairwise(path)),
    )


class App:
    """The client of one gateway: `model_of` are its stages. Use it as an async context manager."""

    def __init__(self, url: str, system: str, model_of: Mapping[str, str]) -> None:
        self._system = system
        self._played = 0
        self._model_of = model_of
        self._workflow = workflow(model_of)
        self._http = httpx.AsyncClient(base_url=url, timeout=None, headers=_JSON)
        self.outcome = Outcome()

    async def __aenter__(self) -> App:
        path = f"maestro/workflows/{self._workflow.id}"
        content = self._workflow.model_dump_json(by_alias=True)
        (await self._http.put(path, content=content)).raise_for_status()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def play(self, runs: Sequence[RecordedRun], at_once: int) -> Outcome:
        """Play all runs, `at_once` of them at any time."""
        waiting = list(runs)

        async def player() -> None:
            while waiting:
                self._played += 1
                await self._run(f"{self._system}-{self._played}", waiting.pop(0))

        await asyncio.gather(*(player() for _ in range(at_once)))
        return self.outcome

    async def _run(self, name: str, run: RecordedRun) -> None:
        started = time.monotonic()
        await self._tell(name, RunStarted(workflow=self._workflow.id))
        for stage, calls in run.stages:
            await self._tell(name, StageStarted(stage=stage))
            lengths = enumerate(calls)
            await asyncio.gather(*(self._call(name, stage, i, length) for i, length in lengths))
            await self._tell(name, StageEnded(stage=stage))
        await self._tell(name, RunEnded())
        self.outcome.runs_s.append(time.monotonic() - started)

    async def _call(self, run: str, stage: str, instance: int, length: Length) -> None:
        prompt, output = length
        identity = CallIdentity(run=run, workflow=self._workflow.id, stage=stage, instance=instance)
        body: dict[str, Any] = {
            "model": self._model_of[stage],
            "messages": [{"role": "user", "content": f"{run} {stage} {instance}" + " so" * prompt}],
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            BODY_KEY: Annotation(role=stage).wire[0],
        }
        self.outcome.calls += 1
        try:
            answer = await self._http.post(
                "chat/completions", json=body, headers=identity.headers()
            )
        except httpx.TransportError as error:
            self.outcome.failed.append(repr(error))
            return
        if answer.status_code != httpx.codes.OK:
            self.outcome.failed.append(f"{answer.status_code}: {answer.text[:200]}")

    async def _tell(self, run: str, event: RunEvent) -> None:
        content = RunEvents(events=(event,)).model_dump_json()
        path = f"maestro/runs/{run}/events"
        (await self._http.post(path, content=content)).raise_for_status()
