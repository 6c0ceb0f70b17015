"""Device to host and back: our sleep backend, and vLLM's own level 1 on the same model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from maestro_backend.bench import Caller, spread, worker_of
from maestro_backend.scheduler import Residency

from ._step import Step, run, timed, told_by
from .transfers import pcie_gb_s

_CYCLES = 6
_GIB = 1024**3
_START_S = 150.0


async def sleep(step: Step) -> None:
    """Small, then large (the one that counts), then medium."""
    limit = 0.0
    if step.on_gpu:
        limit = pcie_gb_s(4 * _GIB, on_gpu=True)["to_device"]
        step.figure("limit_gb_s", limit)
    for size in ("small", "large", "medium") if step.on_gpu else ("small",):
        ours = await _ours(step, size)
        step.figure(f"{size}_ours", ours)
        if step.engine == "stub":
            step.note("the stub has no sleep of its own to compare with")
            continue
        stock = await _stock(step, size)
        step.figure(f"{size}_stock", stock)
        _compare(step, size, ours, stock, limit)


def _compare(
    step: Step, size: str, ours: dict[str, Any], stock: dict[str, Any], limit: float
) -> None:
    if not step.on_gpu:
        step.note("a dry run: vLLM's own sleep does nothing on a CPU")
        return
    faster = stock["suspend_s"]["median"] / ours["suspend_s"]["median"]
    step.check(f"{size}: repeated suspends 5 times as fast", faster >= 5, f"{faster:.1f} times")
    share = ours["resume_gb_s"] / limit
    step.check(f"{size}: wake at 85 % of the link", share >= 0.85, f"{share:.1%} of {limit} GB/s")


async def _ours(step: Step, size: str) -> dict[str, Any]:
    async with step.node({size: step.models.made_up(size)}) as node:
        start_s = await timed(node.set_residency(size, Residency.DEVICE))
        async with Caller(await worker_of(node, size)) as caller:
            before = await caller.answers()
            used = step.device_bytes()
            cycles = await _cycles(
                step,
                lambda: node.set_residency(size, Residency.HOST),
                lambda: node.set_residency(size, Residency.DEVICE),
            )
            same = await caller.answers() == before
        grown = step.device_bytes() - used
        weights = (await told_by(node, size))["weights"]
    step.check(f"{size}: the same answers afterwards", same, repr(before[0][:40]))
    if step.on_gpu:
        holds = abs(grown) < 0.02 * max(used, 1)
        step.check(f"{size}: no memory is lost", holds, f"{grown >> 20} MiB of {used >> 20}")
    rate = weights["device_bytes"] / cycles["resume_s"]["median"] / 1e9
    return {
        "start_s": round(start_s, 1),
        "weights_bytes": weights["device_bytes"],
        "host_bytes": weights["host_bytes"],
        **cycles,
        "resume_gb_s": round(rate, 2),
    }


async def _stock(step: Step, size: str) -> dict[str, Any]:
    async with _stock_server(step, size) as http:
        cycles = await _cycles(
            step,
            lambda: _posted(http, "/sleep?level=1"),
            lambda: _posted(http, "/wake_up"),
        )
    return cycles


async def _cycles(
    step: Step, suspend: Callable[[], Awaitable[object]], resume: Callable[[], Awaitable[object]]
) -> dict[str, Any]:
    """Seconds of the first way out and in, of the others, and what left the device."""
    out, back, freed = [], [], []
    for _ in range(_CYCLES):
        before = step.device_bytes()
        out.append(await timed(suspend()))
        freed.append(before - step.device_bytes())
        back.append(await timed(resume()))
    return {
        "first_suspend_s": round(out[0], 3),
        "first_resume_s": round(back[0], 3),
        "suspend_s": spread(out[1:]),
        "resume_s": spread(back[1:]),
        "freed_bytes": min(freed),
    }


async def _posted(http: httpx.AsyncClient, path: str) -> None:
    (await http.post(path)).raise_for_status()


@asynccontextmanager
async def _stock_server(step: Step, size: str) -> AsyncIterator[httpx.AsyncClient]:
    """vLLM's own server with nothing of ours in it, and its development routes."""
    settings = step.models.made_up(size)
    flags = ["--model", settings["source"], "--kv-cache-memory-bytes", str(settings["kv_memory"])]
    flags += ["--max-model-len", str(settings["max_model_len"]), "--enforce-eager"]
    if step.on_gpu:
        flags += ["--enable-sleep-mode", "--load-format", "dummy"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAESTRO")}
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="maestro-stock-") as folder:
        socket = str(Path(folder) / "socket")
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--uds", socket]
        server = await asyncio.create_subprocess_exec(
            *command, *flags, env=environment, stdout=sys.stderr, start_new_session=True
        )
        transport = httpx.AsyncHTTPTransport(uds=socket)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://stock", timeout=None
            ) as http:
                await _until_up(http, server)
                yield http
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            await server.wait()


async def _until_up(http: httpx.AsyncClient, server: asyncio.subprocess.Process) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if server.returncode is not None:
            raise RuntimeError(f"vLLM's own server ended with {server.returncode}")
        try:
            if (await http.get("/health")).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.5)
    raise RuntimeError(f"vLLM's own server was not up in {_START_S:.0f} s")


if __name__ == "__main__":
    run(sleep)
