"""Device to host and back: our sleep backend, and vLLM's own level 1 on the same model."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from maestro_backend.bench import spread, worker_of
from maestro_backend.scheduler import Residency

from ._step import Step, answers, checksum, http_of, run, shown, timed, told_by

_CYCLES = 6
_GIB = 1024**3
_START_S = 150.0


async def sleep(step: Step) -> None:
    """Small, with random weights; large, which is judged; then medium."""
    limit = 0.0
    if step.on_gpu:
        from .transfers import pcie_gb_s  # it needs torch, the stub does not

        limit = pcie_gb_s(4 * _GIB, on_gpu=True)["to_device"]
        step.figure("limit_gb_s", limit)
    for size in ("small", "large", "medium") if step.on_gpu else ("small",):
        ours = await _ours(step, size)
        if step.engine == "stub":
            step.note("the stub has no sleep of its own to compare with")
            continue
        stock = await _stock(step, size)
        step.figure(f"{size}_stock", stock)
        if step.on_gpu and size == "large":  # of smaller ones the fixed costs hide the copies
            _judge(step, ours, stock, limit)
    if not step.on_gpu:
        step.note("a dry run: vLLM's own sleep does nothing on a CPU")


def _judge(step: Step, ours: dict[str, Any], stock: dict[str, Any], limit: float) -> None:
    faster = stock["suspend_s"]["median"] / ours["suspend_s"]["median"]
    step.check("repeated suspends 5 times as fast as vLLM's", faster >= 5, f"{faster:.1f} times")
    share = ours["resume_gb_s"] / limit
    step.check("wake at 85 % of the link", share >= 0.85, f"{share:.1%} of {limit} GB/s")


async def _ours(step: Step, size: str) -> dict[str, Any]:
    """Through the node first, then on the worker's socket, as vLLM's own is asked."""
    kind = step.models.random if size == "small" else step.models.made_up
    async with step.node({size: kind(size)}) as node:
        start_s = await timed(node.set_residency(size, Residency.DEVICE))
        before, bytes_before = await answers(node, size), await checksum(step, node, size)
        used = step.device_bytes()
        through_node = await _cycles(
            step,
            lambda: node.set_residency(size, Residency.HOST),
            lambda: node.set_residency(size, Residency.DEVICE),
        )
        step.figure(f"{size}_through_the_node", through_node)
        async with http_of(await worker_of(node, size)) as http:
            cycles = await _cycles(
                step, lambda: _moved(http, "host"), lambda: _moved(http, "device")
            )
        same = await answers(node, size) == before
        same_bytes = await checksum(step, node, size) == bytes_before
        grown = step.device_bytes() - used
        weights = (await told_by(node, size))["weights"]
    step.check(f"{size}: the same answers afterwards", same, shown(before))
    if step.on_gpu:
        step.check(f"{size}: the same bytes afterwards", same_bytes, bytes_before[:16])
        holds = abs(grown) < 0.02 * used
        step.check(f"{size}: no memory is lost", holds, f"{grown >> 20} MiB of {used >> 20}")
    rate = weights["device_bytes"] / cycles["resume_s"]["median"] / 1e9
    ours = {
        "start_s": round(start_s, 1),
        "weights_bytes": weights["device_bytes"],
        "host_bytes": weights["host_bytes"],
        **cycles,
        "resume_gb_s": round(rate, 2),
    }
    step.figure(f"{size}_ours", ours)
    return ours


async def _moved(http: httpx.AsyncClient, tier: str) -> None:
    (await http.post("/maestro/residency", json={"residency": tier})).raise_for_status()


async def _stock(step: Step, size: str) -> dict[str, Any]:
    async with _stock_server(step, size) as http:
        return await _cycles(
            step,
            lambda: _posted(http, "/sleep?level=1"),
            lambda: _posted(http, "/wake_up"),
        )


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
            *command, *flags, env=environment, stdout=sys.stderr
        )  # in this step's process group: it ends with the step, however that ends
        transport = httpx.AsyncHTTPTransport(uds=socket)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://stock", timeout=None
            ) as http:
                await _until_up(http, server)
                yield http
        finally:
            _kill_all(server.pid)
            await server.wait()


def _kill_all(pid: int) -> None:
    """A process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (*root.children(recursive=True), root):
            with suppress(psutil.NoSuchProcess):
                process.kill()


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
