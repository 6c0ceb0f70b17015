"""Nodes whose workers outlive their agent: how it is killed, and what must be true afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psutil

from maestro_backend.config import Config
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency, WorkerInfo, WorkerState
from maestro_backend.workers import WorkerRecord, read_records


def records(config: Config) -> list[WorkerRecord]:
    """Of all workers that its agents have started."""
    return list(read_records(config.state_dir / "workers").values())


def kill_agent(node: LocalNode) -> None:
    """Its workers live on."""
    assert node.pid is not None
    agent = psutil.Process(node.pid)
    agent.kill()


@contextlib.asynccontextmanager
async def leased(config: Config) -> AsyncIterator[LocalNode]:
    """A node whose workers are not tied to its agent."""
    async with LocalNode(config, tied=False) as node:
        yield node


async def ask(worker: WorkerInfo, path: str = "/maestro/worker") -> dict[str, Any]:
    """What the worker itself says."""
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as http:
        return dict((await http.get(path)).raise_for_status().json())


async def pause(worker: WorkerInfo, paused: bool) -> bool:
    """Of a stub: while it is paused, its weights stay where they are. Whether they are moving."""
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as http:
        answer = await http.post("/stub/paused", json={"paused": paused})
        return bool(answer.raise_for_status().json()["moving"])


async def all_known(node: LocalNode) -> dict[str, Any]:
    """The memory report once every worker has told what it takes."""
    async with asyncio.timeout(10):
        while (memory := await node.memory())["expected"]:
            await asyncio.sleep(0.02)
    return memory


async def check_the_books(node: LocalNode) -> None:
    """Every worker is where it says it is, and the ledger holds what that takes: no more."""
    claims = (await all_known(node))["workers"]
    for worker in (await node.info()).workers:
        claim = claims.pop(worker.model, None)
        if worker.pid is None:
            assert claim is None
            continue
        said = await ask(worker)
        assert said["residency"] == worker.residency.value
        on_device = worker.residency is Residency.DEVICE
        assert worker.state is (WorkerState.READY if on_device else WorkerState.SUSPENDED)
        assert claim["kv_bytes"] == worker.kv_limit_bytes == said["kv"]["held_bytes"]
        assert claim["weights_bytes"] == (worker.weights_bytes if on_device else 0)
        assert claim["residual_bytes"] == worker.residual_bytes
        assert claim["host_bytes"] == worker.host_bytes == said["weights"]["host_bytes"]
    assert claims == {}
