"""What every step has: where it writes its findings, its models, its node, its memory."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from maestro_backend._tied import tie_to_parent
from maestro_backend.bench import PROMPTS, keep_logs, say, worker_of
from maestro_backend.config import Config
from maestro_backend.node import LocalNode, read_gpus
from maestro_backend.scheduler import WorkerInfo

from ._models import Models

T = TypeVar("T")

GPU = "cuda:0"
HOST_MEMORY = "96GiB"
"""For pinned copies: a virtual machine may tell of less memory than it will have."""

_MODELS = Path(__file__).resolve().parents[4] / "build" / "gpu" / "models"


class Step:
    """One step on one engine. `limit_s` is the time it has."""

    def __init__(self, engine: str, lines: Path, limit_s: float) -> None:
        self.engine = engine
        self.limit_s = limit_s
        self.on_gpu = engine == "vllm"
        self.models = Models(engine, _MODELS)
        self._lines = lines

    def figure(self, name: str, value: Any) -> None:
        """Something measured; it is on the disk when this returns."""
        self._write({"figure": name, "value": value})

    def check(self, name: str, holds: bool, told: str) -> None:
        """Something that has to hold, and what was seen."""
        self._write({"check": name, "holds": holds, "told": told})

    def note(self, text: str) -> None:
        """Something to know."""
        self._write({"note": text})

    def _write(self, line: Mapping[str, Any]) -> None:
        say(json.dumps(line))
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @asynccontextmanager
    async def node(
        self, models: Mapping[str, Mapping[str, Any]], **settings: Any
    ) -> AsyncIterator[LocalNode]:
        """A node with these models and nothing else."""
        here = {"devices": [GPU], "host_memory": HOST_MEMORY}
        if not self.on_gpu:
            here = {"devices": ["cpu"], "memory": "12GiB"}
        with tempfile.TemporaryDirectory(prefix="maestro-gpu-") as state:
            node = {"name": "here", **here, **settings}
            raw = {"models": models, "nodes": [node], "state_dir": state}
            try:
                async with LocalNode(Config.parse(raw)) as running:
                    yield running
            finally:
                keep_logs(Path(state), self.logs)

    @property
    def logs(self) -> Path:
        """Where the logs of the engines are kept."""
        return self._lines.parent / "logs"

    def device_bytes(self) -> int:
        """What all processes hold of the GPU now, as the driver says; 0 without a GPU."""
        return read_gpus()[GPU].used_bytes if self.on_gpu else 0


async def answers(node: LocalNode, model: str) -> tuple[Any, ...]:
    """Texts and log-probabilities of some answers, one call at a time: the batch never differs.

    Random weights say much the same whatever happens to them; their log-probabilities do not.
    """
    seen = []
    async with http_of(await worker_of(node, model)) as http:
        for prompt in PROMPTS:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 24,
                "ignore_eos": True,
                "temperature": 0,
                "logprobs": True,
            }
            answer = await http.post("/v1/chat/completions", json=body)
            [choice] = answer.raise_for_status().json()["choices"]
            told = (choice.get("logprobs") or {}).get("content") or ()
            seen.append((choice["message"]["content"], *(round(t["logprob"], 3) for t in told)))
    return tuple(seen)


def shown(seen: tuple[Any, ...]) -> str:
    """The beginning of the first answer."""
    text, *logprobs = seen[0]
    return f"{text[:24]!r} {logprobs[:3]}"


async def checksum(step: Step, node: LocalNode, model: str) -> str:
    """Of all weights on the GPU; "" elsewhere."""
    if not step.on_gpu:
        return ""
    async with http_of(await worker_of(node, model)) as http:
        answer = await http.get("/maestro/checksum")
        return str(answer.raise_for_status().json()["checksum"])


async def told_by(node: LocalNode, model: str) -> dict[str, Any]:
    """What the worker of `model` itself says."""
    async with http_of(await worker_of(node, model)) as http:
        answer = await http.get("/maestro/worker")
        return dict(answer.raise_for_status().json())


@asynccontextmanager
async def http_of(worker: WorkerInfo) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a worker's own socket."""
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://worker", timeout=None
    ) as http:
        yield http


async def timed(work: Awaitable[object]) -> float:
    """The seconds it takes."""
    began = time.monotonic()
    await work
    return time.monotonic() - began


def run(body: Callable[[Step], Awaitable[None]]) -> None:
    """A step's main program: `ENGINE LINES LIMIT_S`. All its engines end with it."""
    tie_to_parent(signal.SIGTERM)
    engine, lines, limit = sys.argv[1:]
    step = Step(engine, Path(lines), float(limit))

    async def whole() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await body(step)

    try:
        asyncio.run(whole())
    except asyncio.CancelledError:
        sys.exit(1)
