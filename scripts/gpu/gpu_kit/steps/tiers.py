"""Parked weights, which come back from the checkpoint, and starts from the disk."""

from __future__ import annotations

import time
from pathlib import Path

from maestro_backend.bench import Caller, forget_pages, spread, worker_of
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency

from ._step import Step, run, timed, told_by

_CYCLES = 4


async def tiers(step: Step) -> None:
    """One small model with real files."""
    settings = step.models.random("small")
    async with step.node({"small": settings}) as node:
        start_s = await timed(node.set_residency("small", Residency.DEVICE))
        step.figure("first_start_s", round(start_s, 2))
        before = await _answers(node)
        for way in (("parked",), ("host", "parked")):
            out, back = [], []
            for _ in range(_CYCLES):
                began = time.monotonic()
                for tier in way:
                    await node.set_residency("small", Residency(tier))
                out.append(time.monotonic() - began)
                weights = (await told_by(node, "small"))["weights"]
                back.append(await timed(node.set_residency("small", Residency.DEVICE)))
            name = "_".join(way)
            step.figure(f"to_{name}_s", spread(out))
            step.figure(f"from_{name}_s", spread(back))
            size, held = weights["device_bytes"], weights["host_bytes"]
            step.figure("weights_bytes", size)
            step.figure(f"from_{name}_gb_s", round(size / spread(back)["median"] / 1e9, 2))
            step.check(f"{name}: no copy is held", held == 0, f"{held} bytes")
            same = await _answers(node) == before
            step.check(f"{name}: the same answers afterwards", same, repr(before[0][:40]))
        for cold in (False, True):
            await node.set_residency("small", Residency.DISK)
            if cold and step.engine != "stub":
                forget_pages(Path(settings["source"]))
            seconds = await timed(node.set_residency("small", Residency.DEVICE))
            step.figure("start_evicted_s" if cold else "start_cached_s", round(seconds, 2))
        step.check("disk: the same answers", await _answers(node) == before, repr(before[0][:40]))


async def _answers(node: LocalNode) -> tuple[str, ...]:
    async with Caller(await worker_of(node, "small")) as caller:
        return await caller.answers()


if __name__ == "__main__":
    run(tiers)
