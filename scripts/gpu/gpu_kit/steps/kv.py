"""The KV limit up and down under load; a cache of one size that leaves with the weights."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from maestro_backend.bench import Load, spread, worker_of
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency, WorkerInfo

from ._step import Step, answers, run, shown, told_by

_SHARES = (0.5, 0.0, 1.0, 0.2, 0.8, 0.0, 1.0)
"""Of the way from the floor to all that was built."""

_CALLERS = 6
_AT_LIMIT_S = {"vllm": 5.0, "vllm-cpu": 3.0, "stub": 0.5}
_POLL_S = 0.02
_SLACK = 0.1
_CLOSE = 256 * 1024**2


async def kv(step: Step) -> None:
    """One small model whose cache is much larger than the load needs: elastic, and of one size."""
    built = {"vllm": "16GiB"}.get(step.engine, "96MiB")
    settings = step.models.random("small", kv_memory=built, max_num_seqs=16)
    if step.on_gpu:
        async with step.node({"small": settings}) as node:
            await _whole(step, node)
    async with step.node({"small": {**settings, "elastic_kv": True}}) as node:
        await node.set_residency("small", Residency.DEVICE)
        worker = await worker_of(node, "small")
        why = "" if worker.elastic else "one size: is kvcached built? see installed.json"
        step.check("the KV limit can be moved", worker.elastic, why)
        if worker.elastic:
            await _limits(step, node, worker)


async def _limits(step: Step, node: LocalNode, worker: WorkerInfo) -> None:
    load = Load()
    callers = [asyncio.create_task(load.run(worker, number)) for number in range(_CALLERS)]
    try:
        await asyncio.sleep(_AT_LIMIT_S[step.engine])
        steps = []
        for share in _SHARES:
            steps.append(await _one_limit(step, node, worker, share))
            step.figure("limits", steps)
    finally:
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    for way, some in (
        ("shrink", [s for s in steps if s["change"] < 0]),
        ("grow", [s for s in steps if s["change"] > 0]),
    ):
        step.figure(f"{way}_applied_s", spread(s["applied_s"] for s in some))
    over = max(s["mapped_bytes"] / s["limit_bytes"] for s in steps)
    least = min(s["mapped_bytes"] for s in steps)
    held = least > 0 and over <= 1 + _SLACK
    step.check(
        "never more is mapped than the limit", held, f"{over:.3f} of it, never under {least}"
    )
    if step.on_gpu:
        wrong = max(abs(s["driver_change_bytes"] - s["mapped_change_bytes"]) for s in steps)
        step.check("the driver sees what is mapped", wrong <= _CLOSE, f"{wrong >> 20} MiB off")
    step.check("no call fails", not load.failed, f"{load.served} served, {load.failed[:2]}")
    await _same_at_each_limit(step, node, worker)


async def _one_limit(
    step: Step, node: LocalNode, worker: WorkerInfo, share: float
) -> dict[str, Any]:
    before = (await worker_of(node, "small")).kv_limit_bytes
    limit = _limit(worker, share)
    mapped, used = await _mapped(node), step.device_bytes()
    began = time.monotonic()
    while await node.set_kv_limit("small", limit) > limit:
        await asyncio.sleep(_POLL_S)
    applied_s = time.monotonic() - began
    await asyncio.sleep(_AT_LIMIT_S[step.engine])
    now = await _mapped(node)
    return {
        "limit_bytes": limit,
        "change": limit - before,
        "applied_s": round(applied_s, 3),
        "mapped_bytes": now,
        "mapped_change_bytes": now - mapped,
        "driver_change_bytes": step.device_bytes() - used,
    }


async def _mapped(node: LocalNode) -> int:
    """Memory behind the cache now, by the worker's own count."""
    told = (await told_by(node, "small"))["kv"]
    return int(told.get("resident_bytes", told["held_bytes"]))


def _limit(worker: WorkerInfo, share: float) -> int:
    return int(worker.kv_floor_bytes + share * (worker.kv_max_bytes - worker.kv_floor_bytes))


async def _same_at_each_limit(step: Step, node: LocalNode, worker: WorkerInfo) -> None:
    seen = set()
    for share in (1.0, 0.3, 0.0, 1.0):
        await node.set_kv_limit("small", _limit(worker, share))
        seen.add(await answers(node, "small"))
    step.check("the same answers at each limit", len(seen) == 1, f"{len(seen)} different")


async def _whole(step: Step, node: LocalNode) -> None:
    """The cache of one size leaves with the weights and comes back with them."""
    await node.set_residency("small", Residency.DEVICE)
    before = await answers(node, "small")
    used = step.device_bytes()
    await node.set_residency("small", Residency.HOST)
    freed = used - step.device_bytes()
    told = await told_by(node, "small")
    await node.set_residency("small", Residency.DEVICE)
    same = await answers(node, "small") == before
    worker = await worker_of(node, "small")
    step.figure("freed_bytes", freed)
    held = told["kv"]["held_bytes"]
    step.check("one size: all of it leaves", held == 0, f"{held} bytes held")
    least = 0.97 * (worker.weights_bytes + worker.kv_max_bytes)
    step.check("one size: the driver has it back", freed >= least, f"{freed >> 20} MiB")
    step.check("one size: the same answers afterwards", same, shown(before))


if __name__ == "__main__":
    run(kv)
