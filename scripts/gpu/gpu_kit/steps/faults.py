"""What can go wrong with weights on their way: no room, a killed engine, a lost file."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from maestro_agents.protocol import MaestroError
from maestro_backend.bench import worker_of
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency, WorkerState

from ._step import Step, answers, http_of, run, told_by

_HOST, _DEVICE, _PARKED = Residency.HOST, Residency.DEVICE, Residency.PARKED
_CLOSE = 256 * 1024**2
_WAIT_S = 30.0


async def faults(step: Step) -> None:
    """One case after the other; a case that breaks off does not keep the next from running."""
    async with step.node({"a": step.models.random("small")}, host_memory="1MiB") as node:
        await _case(step, _no_room_on_the_host, node)
    files = step.models.random("small")
    async with step.node({"a": files, "b": files}) as node:
        for case in (_two_at_once, _killed_while_suspended, _killed_in_a_wake):
            await _case(step, case, node)
        if step.engine != "stub":
            await _case(step, partial(_lost_checkpoint, Path(files["source"])), node)


async def _case(step: Step, case: Any, node: LocalNode) -> None:
    """It begins with all models on the device."""
    name = getattr(case, "func", case).__name__.strip("_").replace("_", " ")
    try:
        for worker in (await node.info()).workers:
            await node.set_residency(worker.model, _DEVICE)
        await case(step, node)
    except (MaestroError, AssertionError, OSError, httpx.HTTPError) as error:
        step.check(name, False, f"{type(error).__name__}: {error}"[:300])
    else:
        step.check(name, True, "as it should be")


async def _no_room_on_the_host(step: Step, node: LocalNode) -> None:
    """The copy is refused, and the model serves on."""
    before = await answers(node, "a")
    try:
        await node.set_residency("a", _HOST)
    except MaestroError:
        pass
    else:
        raise AssertionError("a copy was made without room for it")
    worker = await worker_of(node, "a")
    assert worker.state is WorkerState.READY
    assert await answers(node, "a") == before
    async with http_of(worker) as http:  # past the ledger, which has refused it so far
        order = {"residency": "host", "host_budget_bytes": 1}
        refused = await http.post("/maestro/residency", json=order)
        assert refused.status_code >= httpx.codes.BAD_REQUEST, refused.text
    assert await answers(node, "a") == before


async def _two_at_once(step: Step, node: LocalNode) -> None:
    """Moves of two models at the same time, both ways."""
    before = [await answers(node, model) for model in "ab"]
    await node.set_residency("a", _HOST)
    for _ in range(3):
        await asyncio.gather(node.set_residency("a", _DEVICE), node.set_residency("b", _HOST))
        await asyncio.gather(node.set_residency("a", _HOST), node.set_residency("b", _DEVICE))
    await node.set_residency("a", _DEVICE)
    assert [await answers(node, model) for model in "ab"] == before


async def _killed_while_suspended(step: Step, node: LocalNode) -> None:
    """Its memory comes back, its neighbour goes on, and it starts again."""
    before = [await answers(node, model) for model in "ab"]
    used = step.device_bytes()
    await node.set_residency("a", _HOST)
    suspended = step.device_bytes()
    await _kill(node, "a")
    assert await answers(node, "b") == before[1]
    await _until_below(step, suspended)
    await node.set_residency("a", _DEVICE)
    assert await answers(node, "a") == before[0]
    await _until_below(step, used + _CLOSE)


async def _killed_in_a_wake(step: Step, node: LocalNode) -> None:
    before = [await answers(node, model) for model in "ab"]
    await node.set_residency("a", _HOST)
    wake = asyncio.create_task(node.set_residency("a", _DEVICE))
    await asyncio.sleep(0.02)
    await _kill(node, "a")
    await asyncio.gather(wake, return_exceptions=True)
    assert await answers(node, "b") == before[1]
    await node.set_residency("a", _DEVICE)
    assert await answers(node, "a") == before[0]


async def _lost_checkpoint(folder: Path, step: Step, node: LocalNode) -> None:
    """Parked weights whose file is away stay parked; once it is back, they are themselves."""
    [weights] = folder.glob("*.safetensors")
    away = weights.with_suffix(".away")
    before = await answers(node, "b")
    await node.set_residency("b", _PARKED)
    weights.rename(away)
    try:
        await node.set_residency("b", _DEVICE)
    except MaestroError:
        pass
    else:
        raise AssertionError("weights came back from nowhere")
    finally:
        away.rename(weights)
    assert (await told_by(node, "b"))["residency"] == "parked"
    await node.set_residency("b", _DEVICE)
    assert await answers(node, "b") == before


async def _kill(node: LocalNode, model: str) -> None:
    """The whole engine, as the kernel would when memory is short."""
    pid = (await worker_of(node, model)).pid
    assert pid is not None
    psutil.Process(pid).kill()
    async with asyncio.timeout(_WAIT_S):
        while (await worker_of(node, model)).pid == pid:
            await asyncio.sleep(0.05)


async def _until_below(step: Step, size: int) -> None:
    """The driver takes a moment to have a dead process's memory back."""
    async with asyncio.timeout(_WAIT_S):
        while step.device_bytes() > size:
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    run(faults)
