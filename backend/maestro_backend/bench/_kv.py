"""How the KV limit moves under load: how soon, how exactly, and at what cost to the calls."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from maestro_agents.protocol import BackendError
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency, WorkerInfo

from ._engines import MODEL, Caller, one_model, pss_bytes, say, spread, worker_of

_SHARES = (1.0, 0.6, 0.3, 0.0, 0.4, 0.8, 0.2, 1.0, 0.0, 1.0)
"""Limits to step through: 0 is the floor, 1 all that was built."""

_CALLERS = 6
_POLL_S = 0.05
_SAMPLES = 5
_SAMPLE_S = 0.4
STEP_S = 8.0
"""How long the load goes on at each limit, in seconds."""


@dataclass(slots=True)
class Load:
    """Calls that go on until the benchmark has seen enough. A prompt is never asked twice."""

    served: int = 0
    failed: list[str] = field(default_factory=list)

    async def run(self, worker: WorkerInfo, caller: int) -> None:
        async with Caller(worker) as client:
            for number in range(1_000_000):
                prompt = f"Caller {caller}, question {number}: " + "tell me more about it. " * 60
                try:
                    await client.ask(prompt, 100)
                except (BackendError, httpx.HTTPError) as error:
                    self.failed.append(repr(error))
                else:
                    self.served += 1


async def bench_kv(engine: str, step_s: float = STEP_S) -> dict[str, Any]:
    """Step the limit up and down under load, then ask the same at each limit without load.

    `time_to_applied_s` is from the order until no more than the limit is held, `rss_error` the
    largest difference between measured KV memory and the limit after a shrink, relative to it:
    measured is what the processes take (PSS), less what they took beside the KV cache under the
    same load before the first step. `kv_resident_bytes` is the engine's count of resident pages.
    """
    async with one_model(engine, kv_memory="768MiB", max_model_len=2048) as node:
        await node.set_residency(MODEL, Residency.DEVICE)
        worker = await worker_of(node)
        load = Load()
        callers = [asyncio.create_task(load.run(worker, i)) for i in range(_CALLERS)]
        await asyncio.sleep(step_s)
        base = await _beside_kv(worker)
        steps = [await _step(node, worker, share, base, step_s) for share in _SHARES]
        for task in callers:
            task.cancel()
        ends = await asyncio.gather(*callers, return_exceptions=True)
        load.failed += [repr(e) for e in ends if not isinstance(e, asyncio.CancelledError)]
        identical = await _same_at_each_limit(node, worker)
    shrinks = [step for step in steps if step["change"] < 0]
    return {
        "bench": "kv",
        "engine": engine,
        "model": "SmolLM2-135M",
        "steps": steps,
        "time_to_applied_s": {
            "shrink": spread(step["applied_s"] for step in shrinks),
            "grow": spread(step["applied_s"] for step in steps if step["change"] > 0),
        },
        "rss_error": round(max(step["rss_error"] for step in shrinks), 4),
        "rss_over_limit": round(max(step["over"] for step in steps), 4),
        "served": load.served,
        "failed": len(load.failed),
        "failures": load.failed[:3],
        "outputs_identical": identical,
    }


async def _step(
    node: LocalNode, worker: WorkerInfo, share: float, base: int, step_s: float
) -> dict[str, Any]:
    before = (await worker_of(node)).kv_limit_bytes
    limit = _limit(worker, share)
    started = time.monotonic()
    while await node.set_kv_limit(MODEL, limit) > limit:
        await asyncio.sleep(_POLL_S)
    applied_s = time.monotonic() - started
    await asyncio.sleep(step_s)
    kv = await _median_pss(worker) - base
    step = {
        "limit_bytes": limit,
        "change": limit - before,
        "applied_s": round(applied_s, 3),
        "kv_rss_bytes": kv,
        "kv_resident_bytes": await _kv_resident(worker),
        "rss_error": round(abs(kv - limit) / limit, 4),
        "over": round(max(0.0, (kv - limit) / limit), 4),
    }
    say(f"limit {limit >> 20} MiB: applied in {applied_s:.2f} s, KV memory {kv >> 20} MiB")
    return step


def _limit(worker: WorkerInfo, share: float) -> int:
    return int(worker.kv_floor_bytes + share * (worker.kv_max_bytes - worker.kv_floor_bytes))


async def _same_at_each_limit(node: LocalNode, worker: WorkerInfo) -> bool:
    """One call at a time: the batch is the same at every limit."""
    seen = set()
    async with Caller(worker) as caller:
        for share in (1.0, 0.5, 0.0, 1.0):
            await node.set_kv_limit(MODEL, _limit(worker, share))
            seen.add(await caller.answers())
    return len(seen) == 1


async def _beside_kv(worker: WorkerInfo) -> int:
    """What the processes take beside the KV cache, calls under way."""
    return await _median_pss(worker) - await _kv_resident(worker)


async def _median_pss(worker: WorkerInfo) -> int:
    """Of a few seconds: what a step of the engine takes comes and goes."""
    sizes = []
    for _ in range(_SAMPLES):
        sizes.append(await asyncio.to_thread(pss_bytes, worker.pid or 0))
        await asyncio.sleep(_SAMPLE_S)
    return int(statistics.median(sizes))


async def _kv_resident(worker: WorkerInfo) -> int:
    """KV bytes that take memory now, by the engine's own count."""
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as http:
        with suppress(httpx.HTTPError, KeyError, ValueError):
            return int((await http.get("/maestro/worker")).json()["kv"]["resident_bytes"])
    return 0
