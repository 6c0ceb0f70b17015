"""A wake when somebody else has taken the memory: it fails as a whole, and works later."""

from __future__ import annotations

import asyncio
from typing import Any

from maestro_agents.protocol import MaestroError
from maestro_backend.bench import worker_of
from maestro_backend.scheduler import Residency

from ._step import Step, answers, http_of, run, shown, told_by

_CLOSE = 64 * 1024**2
_SETTLE_S = 2.5


async def shortage(step: Step) -> None:
    """The order goes past the ledger, which would refuse it, to the worker; then by the ledger."""
    planned = {} if step.on_gpu else {"engine_args": {"fail_resume": 1}}
    settings = step.models.random("small", **planned)
    async with step.node({"small": settings}) as node:
        await node.set_residency("small", Residency.DEVICE)
        worker = await worker_of(node, "small")
        before = await answers(node, "small")
        for tier in ("host", "parked") if step.on_gpu else ("host",):
            await node.set_residency("small", Residency(tier))
            hog = _take_nearly_all(worker.weights_bytes) if step.on_gpu else None
            used = step.device_bytes()
            async with http_of(worker) as http:
                answer = await http.post("/maestro/residency", json={"residency": "device"})
            told = await told_by(node, "small")
            _judge(step, tier, answer, told["residency"], step.device_bytes() - used)
            if hog is not None:
                await asyncio.sleep(_SETTLE_S)  # until the agent has seen it
                await _refused_by_the_ledger(step, node, tier)
                del hog
                _give_back()
                await asyncio.sleep(_SETTLE_S)
            await node.set_residency("small", Residency.DEVICE)
            same = await answers(node, "small") == before
            step.check(f"{tier}: the same answers afterwards", same, shown(before))


def _judge(step: Step, tier: str, answer: Any, residency: str, grown: int) -> None:
    step.check(
        f"{tier}: refused", answer.status_code == 409, f"{answer.status_code} {answer.text[:120]}"
    )
    step.check(f"{tier}: it is still there", residency == tier, residency)
    step.check(f"{tier}: nothing stays mapped", abs(grown) <= _CLOSE, f"{grown >> 20} MiB more")


async def _refused_by_the_ledger(step: Step, node: Any, tier: str) -> None:
    try:
        await asyncio.wait_for(node.set_residency("small", Residency.DEVICE), 30)
    except MaestroError as error:
        step.check(f"{tier}: by the node too", True, f"{type(error).__name__}: {error}"[:160])
    except TimeoutError:
        step.check(f"{tier}: by the node too", False, "no answer in 30 s")
    else:
        step.check(f"{tier}: by the node too", False, "it came back without memory")


def _take_nearly_all(weights: int) -> Any:
    """Leave half of what the weights take."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return torch.empty(free - weights // 2, dtype=torch.uint8, device="cuda")


def _give_back() -> None:
    import torch

    torch.cuda.empty_cache()


if __name__ == "__main__":
    run(shortage)
