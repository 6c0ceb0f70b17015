"""A gateway in this process before stub engines in threads; no node agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from maestro_agents.protocol import BackendError
from maestro_agents.testing import StubEngine
from maestro_backend.config import Config
from maestro_backend.gateway import Serving, Shell, serving
from maestro_backend.node import NodeLostError
from maestro_backend.scheduler import (
    DeviceInfo,
    DeviceMeasured,
    NodeInfo,
    Residency,
    Settings,
    WorkerInfo,
    WorkerState,
)

GIB = 2**30


class StaticNode:
    """A node whose workers are what the test says they are."""

    def __init__(self, workers: list[WorkerInfo]) -> None:
        self.workers = {w.worker: w for w in workers}
        self.moves: list[tuple[str, Residency]] = []
        self.limits: list[tuple[str, int]] = []
        self.prefixes: list[tuple[str, str, float]] = []
        """Model, call and seconds of each prefix kept; 0 seconds for one dropped."""
        self.measured: list[DeviceMeasured] = []
        self.answer: BackendError | None = BackendError("a static node moves nothing")
        """Why it moves nothing; None: it moves everything at once."""
        self.gone = False
        """It answers nothing, though the stream of its changes has not ended yet."""
        self.keeps = True
        self._changed = asyncio.Event()

    async def join(self) -> NodeInfo:
        return await self.info()

    async def info(self) -> NodeInfo:
        if self.gone:
            raise NodeLostError("gone")
        return NodeInfo("n", (DeviceInfo("cpu", 64 * GIB),), tuple(self.workers.values()))

    async def changes(self) -> AsyncIterator[WorkerInfo | DeviceMeasured]:
        while True:
            for worker in list(self.workers.values()):
                yield worker
            for measured in self.measured:
                yield measured
            await self._changed.wait()
            self._changed.clear()

    async def set_residency(
        self, model: str, residency: Residency, kv_limit_bytes: int | None = None
    ) -> None:
        self.moves.append((model, residency))
        if self.answer is not None:
            raise self.answer
        alive = residency in (Residency.HOST, Residency.PARKED)
        away = WorkerState.SUSPENDED if alive else WorkerState.STOPPED
        state = WorkerState.READY if residency is Residency.DEVICE else away
        self.change(f"n/{model}", state=state, residency=residency)

    async def set_kv_limit(self, model: str, limit_bytes: int) -> int:
        self.limits.append((model, limit_bytes))
        self.workers[f"n/{model}"] = replace(self.workers[f"n/{model}"], kv_limit_bytes=limit_bytes)
        return limit_bytes

    async def keep_prefix(self, model: str, call: str, seconds: float) -> int:
        if not self.keeps:
            raise BackendError(f"no call {call!r} ended here lately")
        self.prefixes.append((model, call, seconds))
        return 1

    async def drop_prefix(self, model: str, call: str) -> None:
        self.prefixes.append((model, call, 0.0))

    async def warm_prefix(
        self, model: str, call: str, messages: Sequence[dict[str, Any]], seconds: float
    ) -> int:
        raise BackendError("a static node warms nothing")

    async def close(self) -> None:
        return None

    def change(self, worker: str, **changes: Any) -> None:
        self.workers[worker] = replace(self.workers[worker], **changes)
        self._changed.set()

    def measure(self, device: str, used_bytes: int) -> None:
        self.measured.append(DeviceMeasured(device, used_bytes))
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
    worker: dict[str, Any] | None = None,
    settings: Settings | None = None,
    **stub: Any,
) -> AsyncIterator[Gateway]:
    """A gateway with the models `big` (also called gpt-4o) and `small`; `worker` overrides what
    the node tells of theirs."""
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
                replace(
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
                    ),
                    **(worker or {}),
                )
            )
        node = StaticNode(workers)
        served = await stack.enter_async_context(
            serving(
                config,
                node,
                host="127.0.0.1",
                port=0,
                api_key=api_key,
                recording=recording,
                settings=settings,
            )
        )
        base = served.url.removesuffix("/v1")
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=base, timeout=30, headers={"content-type": "application/json"}
            )
        )
        made = Gateway(served, node, stubs, http)
        await made.until(lambda: len(served.shell.scheduler.workers) == len(workers))
        await made.until(lambda: served.shell.predictor.version == "base")
        yield made
