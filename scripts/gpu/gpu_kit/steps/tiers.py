"""Parked weights, which come back from the checkpoint, and starts from the disk."""

from __future__ import annotations

import time
from pathlib import Path

from maestro_backend.bench import forget_pages, spread
from maestro_backend.scheduler import Residency

from ._step import Step, answers, checksum, run, shown, timed, told_by

_CYCLES = 4


async def tiers(step: Step) -> None:
    """One small model with real files."""
    settings = step.models.random("small")
    async with step.node({"small": settings}) as node:
        start_s = await timed(node.set_residency("small", Residency.DEVICE))
        step.figure("first_start_s", round(start_s, 2))
        before, bytes_before = await answers(node, "small"), await checksum(step, node, "small")
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
            same = await answers(node, "small") == before
            step.check(f"{name}: the same answers afterwards", same, shown(before))
            same = await checksum(step, node, "small") == bytes_before
            if step.on_gpu:
                step.check(f"{name}: the same bytes afterwards", same, bytes_before[:16])
        for cold in (False, True):
            await node.set_residency("small", Residency.DISK)
            if cold and step.engine != "stub":
                forget_pages(Path(settings["source"]))
            seconds = await timed(node.set_residency("small", Residency.DEVICE))
            step.figure("start_evicted_s" if cold else "start_cached_s", round(seconds, 2))
        same = await answers(node, "small") == before
        step.check("disk: the same answers", same, shown(before))


if __name__ == "__main__":
    run(tiers)
