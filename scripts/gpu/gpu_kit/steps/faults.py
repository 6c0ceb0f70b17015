"""What can go wrong with weights on their way: no room, a killed engine, a lost file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil

from maestro_agents.protocol import MaestroError
from maestro_backend.bench import Caller, worker_of
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency, WorkerState

from ._step import Step, run, told_by

_HOST, _DEVICE, _PARKED = Residency.HOST, Residency.DEVICE, Residency.PARKED
_CLOSE = 256 * 1024**2
_WAIT_S = 30.0


async def faults(step: Step) -> None:
    """One case after the other; a case that breaks off does not keep the next from running."""
    cases = (_no_room_on_the_host, _two_at_once, _killed_while_suspended, _killed_in_a_wake)
    for case in cases if step.engine == "stub" else (*cases, _lost_checkpoint):
        name = case.__name__.strip("_").replace("_", " ")
        try:
            await case(step)
        except (MaestroError, AssertionError, OSError) as error:
            step.check(name, False, f"{type(error).__name__}: {error}"[:300])
        else:
            step.check(name, True, "as it should be")


async def _no_room_on_the_host(step: Step) -> None:
    """The copy is refused, and the model serves on."""
    async with step.node({"a": step.models.made_up("small")}, host_memory="1MiB") as node:
        await node.set_residency("a", _DEVICE)
        before = await _answers(node, "a")
        try:
            await node.set_residency("a", _HOST)
        except MaestroError:
            pass
        else:
            raise AssertionError("a copy was made without room for it")
        assert (await worker_of(node, "a")).state is WorkerState.READY
        assert await _answers(node, "a") == before


async def _two_at_once(step: Step) -> None:
    """Moves of two models at the same time, both ways."""
    async with step.node(_pair(step)) as node:
        await asyncio.gather(*(node.set_residency(model, _DEVICE) for model in "ab"))
        before = [await _answers(node, model) for model in "ab"]
        await node.set_residency("a", _HOST)
        for _ in range(3):
            await asyncio.gather(node.set_residency("a", _DEVICE), node.set_residency("b", _HOST))
            await asyncio.gather(node.set_residency("a", _HOST), node.set_residency("b", _DEVICE))
        await node.set_residency("a", _DEVICE)
        assert [await _answers(node, model) for model in "ab"] == before


async def _killed_while_suspended(step: Step) -> None:
    """Its memory comes back, its neighbour goes on, and it starts again."""
    async with step.node(_pair(step)) as node:
        await node.set_residency("b", _DEVICE)
        alone = step.device_bytes()
        before = await _answers(node, "b")
        await node.set_residency("a", _DEVICE)
        first = await _answers(node, "a")
        await node.set_residency("a", _HOST)
        await _kill(node, "a")
        assert await _answers(node, "b") == before
        await _until_close(step, alone)
        await node.set_residency("a", _DEVICE)
        assert await _answers(node, "a") == first


async def _killed_in_a_wake(step: Step) -> None:
    async with step.node(_pair(step)) as node:
        await node.set_residency("b", _DEVICE)
        before = await _answers(node, "b")
        await node.set_residency("a", _DEVICE)
        await node.set_residency("a", _HOST)
        wake = asyncio.create_task(node.set_residency("a", _DEVICE))
        await asyncio.sleep(0.02)
        await _kill(node, "a")
        await asyncio.gather(wake, return_exceptions=True)
        assert await _answers(node, "b") == before
        await node.set_residency("a", _DEVICE)
        assert (await worker_of(node, "a")).state is WorkerState.READY


async def _lost_checkpoint(step: Step) -> None:
    """Parked weights whose file is away stay parked; once it is back, they are themselves."""
    settings = step.models.random("small")
    [weights] = Path(settings["source"]).glob("*.safetensors")
    away = weights.with_suffix(".away")
    async with step.node({"a": settings}) as node:
        await node.set_residency("a", _DEVICE)
        before = await _answers(node, "a")
        await node.set_residency("a", _PARKED)
        weights.rename(away)
        try:
            await node.set_residency("a", _DEVICE)
        except MaestroError:
            pass
        else:
            raise AssertionError("weights came back from nowhere")
        finally:
            away.rename(weights)
        assert (await told_by(node, "a"))["residency"] == "parked"
        await node.set_residency("a", _DEVICE)
        assert await _answers(node, "a") == before


def _pair(step: Step) -> dict[str, dict[str, object]]:
    return {model: step.models.made_up("small") for model in "ab"}


async def _answers(node: LocalNode, model: str) -> tuple[str, ...]:
    async with Caller(await worker_of(node, model)) as caller:
        return await caller.answers()


async def _kill(node: LocalNode, model: str) -> None:
    """The whole engine, as the kernel would when memory is short."""
    pid = (await worker_of(node, model)).pid
    assert pid is not None
    psutil.Process(pid).kill()
    async with asyncio.timeout(_WAIT_S):
        while (await worker_of(node, model)).pid == pid:
            await asyncio.sleep(0.05)


async def _until_close(step: Step, used: int) -> None:
    if not step.on_gpu:
        return
    async with asyncio.timeout(_WAIT_S):
        while step.device_bytes() > used + _CLOSE:
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    run(faults)
