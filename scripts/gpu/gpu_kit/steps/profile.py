"""Prefill and decode times: the points that a simulated device of this kind is made from."""

from __future__ import annotations

import asyncio
import statistics
import time
from itertools import count

from maestro_backend.bench import Caller, worker_of
from maestro_backend.scheduler import Residency

from ._step import Step, run

_TRIES = 3
_NUMBERS = count()


async def profile(step: Step) -> None:
    """Times are seconds on the worker's own socket; a token of a prompt is one letter."""
    long = (128, 512, 2048, 7000) if step.on_gpu else (64, 256, 1024)
    batches = (1, 4, 16, 64) if step.on_gpu else (1, 4)
    steps = 64 if step.on_gpu else 16
    for size in ("small", "medium") if step.on_gpu else ("small",):
        settings = step.models.made_up(size, eager=False, max_num_seqs=64)
        async with step.node({size: settings}) as node:
            await node.set_residency(size, Residency.DEVICE)
            async with Caller(await worker_of(node, size)) as caller:
                await caller.ask(_prompt(long[0]), 8)
                prefill = {}
                for tokens in long:
                    prefill[str(tokens)] = await _prefill_s(caller, tokens)
                    step.figure(f"{size}_prefill_s", prefill)
                decode = {}
                for batch in batches:
                    decode[str(batch)] = await _decode_s(caller, batch, steps)
                    step.figure(f"{size}_decode_s", decode)
        slower = prefill[str(long[-1])] > prefill[str(long[0])] or step.engine == "stub"
        step.check(f"{size}: longer prompts take longer", slower, str(prefill))


async def _prefill_s(caller: Caller, tokens: int) -> float:
    """Of one prompt with nothing of it cached, the first token included."""
    return round(statistics.median([await _ask_s(caller, tokens, 1) for _ in range(_TRIES)]), 5)


async def _decode_s(caller: Caller, batch: int, steps: int) -> float:
    """Of one step of so many calls: what more tokens take beyond the first."""
    rounds = []
    for _ in range(_TRIES):
        short = await _together_s(caller, batch, 1)
        rounds.append((await _together_s(caller, batch, 1 + steps) - short) / steps)
    return round(statistics.median(rounds), 6)


async def _together_s(caller: Caller, batch: int, tokens: int) -> float:
    began = time.monotonic()
    await asyncio.gather(*(_ask_s(caller, 256, tokens) for _ in range(batch)))
    return time.monotonic() - began


async def _ask_s(caller: Caller, prompt: int, tokens: int) -> float:
    began = time.monotonic()
    await caller.ask(_prompt(prompt), tokens)
    return time.monotonic() - began


def _prompt(tokens: int) -> str:
    """Never the same: no prefix of it is cached."""
    return f"{next(_NUMBERS):06d}".ljust(tokens, "x")


if __name__ == "__main__":
    run(profile)
