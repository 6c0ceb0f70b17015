"""vLLM starts as a worker, serves, can leave the device, and the ledger agrees."""

from __future__ import annotations

import asyncio
import time

from maestro_backend.bench import PROMPTS, Caller, worker_of
from maestro_backend.node import LocalNode, read_gpus
from maestro_backend.scheduler import Residency

from ._step import GPU, Step, answers, run, shown, timed, told_by

_CALLS = 16
_TOKENS = 128
_LEDGER = 0.03


async def serve(step: Step) -> None:
    """One small model."""
    before = step.device_bytes()
    async with step.node({"small": step.models.random("small", max_num_seqs=16)}) as node:
        start_s = await timed(node.set_residency("small", Residency.DEVICE))
        step.figure("cold_start_s", round(start_s, 2))
        worker = await worker_of(node, "small")
        tiers = [tier.value for tier in worker.tiers]
        step.check("its weights can leave the device", {"host", "parked"} <= {*tiers}, str(tiers))
        step.figure("elastic", worker.elastic)
        first, second = await answers(node, "small"), await answers(node, "small")
        async with Caller(worker) as caller:
            step.check("the same question has the same answer", first == second, shown(first))
            step.figure(
                "tokens_s", {"1": await _speed(caller, 1), "16": await _speed(caller, _CALLS)}
            )
        told = await told_by(node, "small")
        step.figure("weights_bytes", told["weights"]["device_bytes"])
        await _ledger(step, node, before)


async def _speed(caller: Caller, at_once: int) -> float:
    began = time.monotonic()
    prompts = [f"{number}: {PROMPTS[0]}" for number in range(at_once)]
    await asyncio.gather(*(caller.ask(prompt, _TOKENS) for prompt in prompts))
    return round(at_once * _TOKENS / (time.monotonic() - began), 1)


async def _ledger(step: Step, node: LocalNode, before: int) -> None:
    """What the agent measures, and what the ledger claims, against the driver's own total."""
    await asyncio.sleep(3.0)  # it is measured every second
    memory = await node.memory()
    claim = memory["workers"]["small"]
    claimed = claim["weights_bytes"] + claim["kv_bytes"] + claim["residual_bytes"]
    step.figure("claim", claim)
    if not step.on_gpu:
        return
    by_pid = bool(read_gpus()[GPU].by_pid)
    step.figure("driver_tells_processes", by_pid)
    taken = step.device_bytes() - before
    step.figure("driver_bytes", taken)
    step.figure("residual_bytes", taken - claim["weights_bytes"] - claim["kv_bytes"])
    if by_pid:
        error = abs(claim["measured_bytes"] - taken) / taken
        step.check("measured within 3 % of the driver", error <= _LEDGER, f"{error:.2%}")
    else:
        step.note("the driver tells no processes: workers count as what they claim")
    told = f"{claimed >> 20} MiB claimed, {taken >> 20} taken"
    step.check("the claim covers what is taken", claimed >= taken * (1 - _LEDGER), told)


if __name__ == "__main__":
    run(serve)
