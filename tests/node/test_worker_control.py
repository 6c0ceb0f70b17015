"""The client of a worker's control API: what it makes of each kind of answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from node.homes import DEVICE, HOST, KV, MIB, RESIDUAL, WEIGHTS, Home

from maestro_agents.protocol import BackendError
from maestro_backend.scheduler import WorkerState
from maestro_backend.workers._control import Control, WorkerRefusedError


@asynccontextmanager
async def answering(path: Path, status: int, body: str) -> AsyncIterator[Control]:
    """A worker that always gives the same answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(f"{head}{body}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(serve, path), Control(path) as control:
        yield control


ERROR = json.dumps({"error": "the reason"})

ASKS: dict[str, Callable[[Control], Awaitable[object]]] = {
    "move": lambda control: control.move(HOST, 0),
    "limit": lambda control: control.limit_kv(1),
    "keep": lambda control: control.keep_prefix("c", 1.0),
    "lease": lambda control: control.renew_lease(1.0),
}


@pytest.mark.parametrize("ask", ASKS)
async def test_no_is_told_apart_from_a_failure(tmp_path: Path, ask: str) -> None:
    async with answering(tmp_path / "a", 409, ERROR) as control:
        with pytest.raises(WorkerRefusedError, match="the reason"):
            await ASKS[ask](control)
    async with answering(tmp_path / "b", 500, ERROR) as control:
        with pytest.raises(BackendError, match=r"failed at .*the reason") as failed:
            await ASKS[ask](control)
        assert not isinstance(failed.value, WorkerRefusedError)
    async with answering(tmp_path / "c", 502, "a proxy") as control:
        with pytest.raises(BackendError, match="502"):
            await ASKS[ask](control)


async def test_an_engine_without_our_routes_has_no_status(tmp_path: Path) -> None:
    async with answering(tmp_path / "a", 404, json.dumps({"detail": "Not Found"})) as control:
        assert await control.status() is None
        with pytest.raises(WorkerRefusedError, match="no /maestro/kv"):
            await control.limit_kv(1)


@pytest.mark.parametrize("failure", ["a move", "a limit"])
async def test_an_engine_that_fails_at_an_order(
    home: Home, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """Where its weights are after a failed move nobody knows: it is ended. A limit that may have
    grown counts until it is known."""
    worker = home.worker()
    await worker.bring(DEVICE, MIB)
    first = worker.info.pid

    async def fail(*arguments: object) -> None:
        raise BackendError("the engine failed at it: 500")

    with monkeypatch.context() as broken:
        broken.setattr(Control, "move", fail)
        broken.setattr(Control, "limit_kv", fail)
        with pytest.raises(BackendError, match="failed"):
            await (worker.bring(HOST) if failure == "a move" else worker.set_kv_limit(KV))
        if failure == "a limit":
            assert home.held() == (WEIGHTS + KV + RESIDUAL, 0)
    if failure == "a move":
        await home.until(worker, WorkerState.STOPPED)
        assert home.held() == (0, 0)
        await worker.bring(DEVICE)
        assert worker.info.pid != first
    else:
        while home.held() != (WEIGHTS + MIB + RESIDUAL, 0):
            await asyncio.sleep(0.02)
        assert (worker.info.pid, worker.info.kv_limit_bytes) == (first, MIB)
