"""Workers without an agent: real stub processes on the node's own books."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from node.nodes import survivors

from maestro_agents.protocol import BackendError
from maestro_backend.config import Config
from maestro_backend.node._learned import LearnedState
from maestro_backend.node._ledger import Ledger
from maestro_backend.scheduler import DeviceInfo, Residency, WorkerInfo, WorkerState
from maestro_backend.workers import (
    ENGINES,
    Backoff,
    Checkpoint,
    ServedModel,
    Worker,
    read_records,
)

DEVICE, HOST, PARKED = Residency.DEVICE, Residency.HOST, Residency.PARKED
DISK, REMOTE = Residency.DISK, Residency.REMOTE
MIB = 1024**2
WEIGHTS = 32 * MIB
KV = 8 * MIB
LIMIT_S = 30.0
RESIDUAL = 64 * MIB
"""What the stub engine promises."""


class Home:
    """A node without its agent: the books, and workers on them. `told` is all they published."""

    def __init__(self, folder: Path, memory: int = 400 * MIB, host_memory: int = 100 * MIB) -> None:
        self.folder = folder
        self.ledger = Ledger([DeviceInfo("cpu", memory)], host_memory)
        self.workers: list[Worker] = []
        self.told: list[WorkerInfo] = []
        self._changed = asyncio.Event()

    def worker(
        self, name: str = "a", *, source: str = "x", engine: Any = None, **given: Any
    ) -> Worker:
        """A worker with 32 MiB of weights and an 8 MiB KV cache for contexts of 1024 tokens."""
        options = {key: given.pop(key) for key in ("tied", "lease_s", "backoff") if key in given}
        arguments = {"weights_bytes": WEIGHTS, **given.pop("engine_args", {})}
        settings = {"source": source, "engine": "stub", "engine_args": arguments, "kv_memory": KV}
        settings |= {"max_model_len": 1024, **given}
        config = Config.parse({"models": {name: settings}}).models[name]
        learned = LearnedState(self.folder / f"{name}.learned", {name: "1"}, {name: RESIDUAL})
        worker = Worker(
            ServedModel(name, config, Checkpoint(config.source)),
            engine or ENGINES["stub"],
            node="here",
            device="cpu",
            address=self.folder / f"{name}.sock",
            log=self.folder / f"{name}.log",
            cache=self.folder / "cache",
            record=self.folder / "workers" / f"{name}.json",
            account=self.ledger,
            learned=learned,
            publish=self._publish,
            **{"backoff": Backoff(first=0.01), **options},
        )
        self.workers.append(worker)
        return worker

    def held(self, name: str = "a") -> tuple[int, int]:
        """What a model holds of the device and of the host."""
        held = self.ledger.held.get(name)
        return held.memory.total_bytes if held else 0, self.ledger.host_held.get(name, 0)

    async def until(self, worker: Worker, state: WorkerState) -> WorkerInfo:
        """Wait until the worker tells that state."""
        await self.changed(lambda: worker.info.state is state)
        return worker.info

    async def changed(self, holds: Callable[[], bool]) -> None:
        """Wait until something was told and it `holds`."""
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def _publish(self, info: WorkerInfo) -> None:
        self.told.append(info)
        self._changed.set()


@contextlib.asynccontextmanager
async def at_home(folder: Path) -> AsyncIterator[Home]:
    """A home whose workers end with it, and leave nothing: no process, claim or record."""
    home = Home(folder)
    before = set(psutil.Process().children(recursive=True))
    yield home
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(worker.stop() for worker in home.workers))
    left = [p for p in psutil.Process().children(recursive=True) if p not in before]
    alive = survivors(left, timeout=5)
    for process in alive:
        process.kill()
    assert alive == []
    assert home.ledger.held == home.ledger.host_held == {}
    assert read_records(folder / "workers") == {}


async def chat(worker: Worker, text: str = "Hi", call: str = "c1", **more: Any) -> httpx.Response:
    transport = httpx.AsyncHTTPTransport(uds=worker.info.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=30) as http:
        body = {"messages": [{"role": "user", "content": text}], **more}
        return await http.post("/v1/chat/completions", json=body, headers={"x-request-id": call})


def pid_of(worker: Worker) -> int:
    assert worker.info.pid is not None
    return worker.info.pid


def kill(worker: Worker) -> None:
    os.kill(pid_of(worker), signal.SIGKILL)


async def control(worker: Worker) -> Any:
    """What the engine itself says."""
    transport = httpx.AsyncHTTPTransport(uds=worker.info.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as http:
        return (await http.get("/maestro/worker")).json()


async def failure(work: Awaitable[Any], kind: type[BackendError] = BackendError) -> str:
    with pytest.raises(kind) as raised:
        await work
    return str(raised.value)


class Liar(type(ENGINES["stub"])):  # type: ignore[misc]  # a class that is only reached so
    """Promises 2 MiB less of weights than its worker takes."""

    def memory(self, model: ServedModel) -> Any:
        told = super().memory(model)
        return dataclasses.replace(told, weights_bytes=told.weights_bytes - 2 * MIB)
