"""What a worker can be told while it runs: residency, KV limit, kept prefixes, lease.

One object in the server process, over vLLM's `AsyncLLM`; `_routes` serves it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from typing import Any

from maestro_backend._tied import LEASE_VARIABLE

log = logging.getLogger("vllm.maestro")

_TIERS = ("device", "host", "parked")
_SETTLE_S = 0.1
_IDLE_SETTLE_S = 1.0
_LOWEST_PRIORITY = 2**31 - 1


class RefusedError(Exception):
    """It cannot be done; `status` is the HTTP status that says so."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Control:
    """The worker behind one engine client."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._moving = asyncio.Lock()
        self._tier = "device"
        self._lease: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Set the first limit and lease, and begin to look after both."""
        if limit := os.environ.get("MAESTRO_KV_LIMIT"):
            kv = await self._core("maestro_kv")
            # It was reckoned before the start; both ends are in whole blocks, or kvcached's pages.
            await self.limit_kv(min(max(int(limit), kv["floor_bytes"]), kv["built_bytes"]))
        if lease := os.environ.get(LEASE_VARIABLE):
            self.renew_lease(float(lease))
        self._tasks.append(asyncio.create_task(self._settle()))

    # --- what it is -----------------------------------------------------------------------------

    async def state(self) -> dict[str, Any]:
        """The worker as it is now; sizes in bytes."""
        tier = self._tier  # before the KV: on its way back it counts rather too early than too late
        kv = await self._core("maestro_kv")
        [memory, *_] = await self._workers("maestro_memory")
        memory.pop("on_device")
        return {
            "residency": tier,
            "requests": kv.pop("requests"),
            "elastic": kv.pop("elastic"),
            "kv": {"resident_bytes": memory.pop("kv_resident_bytes"), **kv},
            "tiers": memory.pop("tiers"),
            "weights": memory,
        }

    async def progress(self) -> list[dict[str, Any]]:
        """One entry per live call."""
        return list(await self._core("maestro_progress"))

    # --- weights --------------------------------------------------------------------------------

    async def move(
        self, tier: str, host_budget_bytes: int | None, kv_limit_bytes: int | None = None
    ) -> dict[str, Any]:
        """Bring the weights to `tier`; calls wait meanwhile.

        `kv_limit_bytes` is the KV limit to have on the device; None: the last one. Away from it
        the KV cache holds what requests and kept prefixes hold in it, where it is elastic.

        Raises:
            RefusedError: it failed; the worker is where `state` says.
        """
        if tier not in _TIERS:
            raise RefusedError(422, f"there is no tier {tier!r} here (tiers: {', '.join(_TIERS)})")
        async with self._moving:
            started = time.monotonic()
            if kv_limit_bytes is not None:
                await self.limit_kv(kv_limit_bytes)
            freed = await self._move(tier, host_budget_bytes) if tier != self._tier else 0
            seconds = time.monotonic() - started
        return {**await self.state(), "seconds": seconds, "freed_bytes": freed}

    async def _move(self, tier: str, host_budget_bytes: int | None) -> int:
        if tier == "device":
            self._all_checked(await self._workers("maestro_resume"))
            await self._core("maestro_restored")
            self._tier = tier
            await self._engine.resume_generation()
            return 0
        if self._tier == "device":
            await self._engine.pause_generation(mode="keep", clear_cache=False)
        try:
            done = self._all_checked(
                await self._workers("maestro_suspend", tier, host_budget_bytes)
            )
        except BaseException:
            await self._look_where_it_is()
            raise
        self._tier = tier
        try:
            await self._core("maestro_trim")
        except Exception:  # the weights have left all the same, and the state tells of the KV
            log.exception("the memory of the KV cache could not be given back")
        return sum(answer["freed_bytes"] for answer in done)

    async def _look_where_it_is(self) -> None:
        """After a move that failed: calls go on only where the weights are on the device."""
        memory = await self._workers("maestro_memory")
        if all(worker["on_device"] for worker in memory):
            self._tier = "device"
            await self._engine.resume_generation()
        elif self._tier == "device":
            self._tier = "host" if all(worker["host_bytes"] for worker in memory) else "parked"

    def _all_checked(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._checked(answer) for answer in answers]

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer:
            raise RefusedError(answer.get("status", 409), answer["error"])
        return answer

    async def checksum(self) -> str:
        """One text for all weights, to tell whether they came back as they went.

        Raises:
            RefusedError: they are not on the device, or cannot be read there (CPU).
        """
        async with self._moving:
            answers = self._all_checked(await self._workers("maestro_checksum"))
        return "-".join(str(answer["checksum"]) for answer in answers)

    async def drop_copy(self) -> None:
        """Give up the copy in host memory.

        Raises:
            RefusedError: it is the only one in memory.
        """
        async with self._moving:
            if self._tier == "host":
                raise RefusedError(409, "the copy is where the weights are: move to parked instead")
            await self._workers("maestro_drop_copy")

    # --- KV -------------------------------------------------------------------------------------

    async def limit_kv(self, limit_bytes: int) -> dict[str, int]:
        """Let the KV cache hold so many bytes; a shrink may wait for blocks in use.

        While the weights are away, it takes what it may hold only when they are back.

        Raises:
            RefusedError: the cache has one size, or the limit is too small or too large.
        """
        answer = self._checked(await self._core("maestro_limit_kv", limit_bytes))
        return {name: size for name, size in answer.items() if name.endswith("_bytes")}

    async def keep(self, call: str, seconds: float) -> int:
        """Hold the prefix of an ended call; the bytes it takes.

        Raises:
            RefusedError: the call is unknown, or too little would be left.
        """
        answer = self._checked(await self._core("maestro_keep", call, seconds))
        return int(answer["pinned_bytes"])

    async def drop(self, call: str) -> None:
        """Let go of a kept prefix."""
        await self._core("maestro_drop", call)

    async def warm(self, call: str, messages: list[dict[str, Any]], seconds: float) -> int:
        """Compute the prefix of a coming call behind everything else, and keep it."""
        from vllm import SamplingParams

        tokenizer = self._engine.get_tokenizer()
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=True)
        tokens = tokens["input_ids"] if hasattr(tokens, "keys") else tokens
        generated = self._engine.generate(
            {"prompt_token_ids": list(tokens)},
            SamplingParams(max_tokens=1),
            f"chatcmpl-{call}",
            priority=_LOWEST_PRIORITY,
        )
        async for _ in generated:
            pass
        return await self.keep(call, seconds)

    async def _settle(self) -> None:
        """Follow up on shrinks that wait and on kept prefixes that expire."""
        while True:
            waiting = False
            try:
                waiting = await self._core("maestro_settle")
            except Exception:  # an engine that died is told by /health
                log.debug("the KV cache could not be settled", exc_info=True)
            await asyncio.sleep(_SETTLE_S if waiting else _IDLE_SETTLE_S)

    # --- lease ----------------------------------------------------------------------------------

    def renew_lease(self, seconds: float) -> None:
        """End this worker unless it is told so again within `seconds`."""
        if self._lease is not None:
            self._lease.cancel()
        self._lease = asyncio.get_running_loop().call_later(seconds, self._expired, seconds)

    def _expired(self, seconds: float) -> None:
        log.error("no node agent for %g s: this worker ends", seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    # --- the engine -----------------------------------------------------------------------------

    async def _core(self, method: str, *arguments: Any) -> Any:
        return await self._engine.engine_core.call_utility_async(method, *arguments)

    async def _workers(self, method: str, *arguments: Any) -> list[Any]:
        answers: list[Any] = await self._engine.collective_rpc(method, args=arguments)
        return answers
