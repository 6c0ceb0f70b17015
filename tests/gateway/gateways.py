"""A gateway in this process before stub engines in threads; no node agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from maestro_agents.protocol import BackendError
from maestro_agents.testing import StubEngine
from maestro_backend.config import Config
from maestro_backend.gateway import Serving, Shell, serving
from maestro_backend.scheduler import DeviceInfo, NodeInfo, Residency, WorkerInfo, WorkerState

GIB = 2**30


class StaticNode:
    """A node whose workers are what the test says they are."""

    def __init__(self, workers: list[WorkerInfo]) -> None:
        self.workers = {w.worker: w for w in workers}
        self.moves: list[tuple[str, Residency]] = []
        self.answer = BackendError("a static node moves nothing")
        self._changed = asyncio.Event()

    async def join(self) -> NodeInfo:
        return await self.info()

    async def info(self) -> NodeInfo:
        return NodeInfo("n", (DeviceInfo("cpu", 64 * GIB),), tuple(self.workers.values()))

    async def changes(self) -> AsyncIterator[WorkerInfo]:
        while True:
            for worker in list(self.workers.values()):
                yield worker
            await self._changed.wait()
            self._changed.clear()

    async def set_residency(self, model: str, residency: Residency) -> None:
        self.moves.append((model, residency))
        raise self.answer

    async def close(self) -> None:
        return None

    def change(self, worker: str, **changes: Any) -> None:
        self.workers[worker] = replace(self.workers[worker], **changes)
        self._changed.set()


@dataclass
class Gateway:
    """The gateway under test with its stubs, by model."""

    serving: Serving
    node: StaticNode
    stubs: dict[str, StubEngine]
    http: httpx.AsyncClient

    @property
    def url(self) -> str:
        return self.serving.url

    @property
    def shell(self) -> Shell:
        return self.serving.shell

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until something holds, at each turn of the loop."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def chat(self, model: str = "big", text: str = "Hello", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)


@asynccontextmanager
async def gateway(
    tmp_path: Path,
    *,
    window: int = 8,
    policy: str = "maestro",
    api_key: str | None = None,
    recording: Path | None = None,
    **stub: Any,
) -> AsyncIterator[Gateway]:
    """A gateway with the models `big` (also called gpt-4o) and `small`."""
    config = Config.parse(
        {
            "models": {
                "big": {"source": "random:tiny-llama", "served_names": ["gpt-4o"]},
                "small": {"source": "random:tiny-llama"},
            },
            "policy": policy,
            "state_dir": str(tmp_path),
        }
    )
    async with AsyncExitStack() as stack:
        stubs, workers = {}, []
        for model in config.models:
            uds = str(tmp_path / f"{model}.sock")
            stubs[model] = stack.enter_context(StubEngine((model,), uds=uds, **stub))
            workers.append(
                WorkerInfo(
                    worker=f"n/{model}",
                    node="n",
                    device="cpu",
                    model=model,
                    state=WorkerState.READY,
                    residency=Residency.DEVICE,
                    weights_bytes=GIB,
                    kv_limit_bytes=GIB,
                    kv_bytes_per_token=1000,
                    max_inflight=window,
                    max_model_len=4096,
                    address=uds,
                )
            )
        node = StaticNode(workers)
        served = await stack.enter_async_context(
            serving(config, node, host="127.0.0.1", port=0, api_key=api_key, recording=recording)
        )
        base = served.url.removesuffix("/v1")
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=base, timeout=30, headers={"content-type": "application/json"}
            )
        )
        made = Gateway(served, node, stubs, http)
        await made.until(lambda: len(served.shell.scheduler.workers) == len(workers))
        yield made
