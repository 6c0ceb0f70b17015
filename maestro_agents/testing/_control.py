"""The control API of a Maestro worker, as the stub serves it under `/maestro/`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from ._call import Body, parse_chat
from ._engine import Engine
from ._errors import RefusedError
from ._lease import Lease
from ._reply import compose
from ._weights import TIERS

Handler = Callable[[Body], Coroutine[Any, Any, Body]]

_LOWEST_PRIORITY = 2**31 - 1


class Control:
    """What can be asked of a stub beside calls. Moves of the weights go one after the other."""

    def __init__(self, engine: Engine, lease: Lease | None) -> None:
        self._engine = engine
        self._lease = lease
        self._turn = asyncio.Lock()
        self._failures = engine.settings.fail_resume
        self.routes: Mapping[tuple[str, str], Handler] = {
            ("GET", "/maestro/worker"): self._worker,
            ("GET", "/maestro/progress"): self._progress,
            ("POST", "/maestro/residency"): self._residency,
            ("DELETE", "/maestro/host-copy"): self._drop_copy,
            ("POST", "/maestro/kv"): self._limit_kv,
            ("POST", "/maestro/prefix/keep"): self._keep,
            ("POST", "/maestro/prefix/drop"): self._drop,
            ("POST", "/maestro/prefix/warm"): self._warm,
            ("POST", "/maestro/lease"): self._renew,
        }

    async def _worker(self, body: Body) -> Body:
        weights = self._engine.weights
        return {
            "residency": weights.residency,
            "tiers": list(TIERS),
            "elastic": self._engine.settings.elastic,
            "kv": self._kv(),
            "weights": {
                "device_bytes": weights.size,
                "host_bytes": weights.host_bytes,
                "host_copy_bytes": weights.size,
            },
            "requests": len(self._engine.kv.live),
        }

    def _kv(self) -> dict[str, Any]:
        kv, block = self._engine.kv, self._block_bytes
        names = ("built", "floor", "limit", "held", "used", "cached", "pinned")
        groups = [{"block_tokens": self._engine.settings.block_size, "most_blocks": kv.floor}]
        told = {f"{n}_bytes": getattr(kv, n) * block for n in names}
        return {"block_bytes": block, "groups": groups, **told}

    @property
    def _block_bytes(self) -> int:
        settings = self._engine.settings
        return settings.block_size * settings.kv_bytes_per_token

    async def _progress(self, body: Body) -> Body:
        kv = self._engine.kv
        calls = [
            {
                "call": call.id,
                "computed_tokens": call.computed,
                "generated_tokens": call.generated,
                "kv_bytes": kv.blocks(call.computed) * self._block_bytes,
                "running": call.running,
            }
            for call in kv.live
        ]
        return {"requests": calls}

    async def _residency(self, body: Body) -> Body:
        wanted, loop = body.get("residency"), asyncio.get_running_loop()
        if wanted not in TIERS:
            raise RefusedError(422, f"no tier {wanted!r} (tiers: {', '.join(TIERS)})")
        async with self._turn:
            began = loop.time()
            freed = 0
            if body.get("kv_limit_bytes") is not None:
                self._set_limit(body["kv_limit_bytes"])
            if wanted != self._engine.weights.residency:
                freed = await self._move(wanted, body.get("host_budget_bytes"))
            seconds = loop.time() - began
        return {**await self._worker({}), "seconds": seconds, "freed_bytes": freed}

    async def _move(self, wanted: str, budget: int | None) -> int:
        engine, weights = self._engine, self._engine.weights
        copies = wanted == "host" and not weights.host_bytes
        if copies and budget is not None and weights.size > budget:
            raise RefusedError(422, f"a copy takes {weights.size} of {budget} bytes of host memory")
        engine.resident.clear()
        engine.moving = True
        try:
            resumes = wanted == "device"
            await asyncio.sleep(engine.settings.resume_s if resumes else engine.settings.suspend_s)
            await engine.open.wait()
            if resumes and self._failures:
                self._failures -= 1
                raise RefusedError(409, "planned failure of a resume")
            freed = weights.bring(wanted)
            if resumes:
                engine.kv.back()
            else:
                engine.kv.leave(whole=not engine.settings.elastic)
            return freed
        finally:
            engine.moving = False
            if weights.residency == "device":
                engine.resident.set()

    async def _drop_copy(self, body: Body) -> Body:
        async with self._turn:
            if self._engine.weights.residency == "host":
                raise RefusedError(409, "the weights are nowhere else in memory; move to parked")
            self._engine.weights.drop_copy()
        return {}

    async def _limit_kv(self, body: Body) -> Body:
        self._set_limit(body["limit_bytes"])
        return {"kv": self._kv()}

    def _set_limit(self, limit_bytes: Any) -> None:
        if not self._engine.settings.elastic:
            raise RefusedError(422, "the KV cache of this engine has one size")
        self._engine.kv.set_limit(int(limit_bytes) // self._block_bytes)

    async def _keep(self, body: Body) -> Body:
        kept = self._engine.kv.keep(str(body["call"]), float(body["seconds"]))
        return {"pinned_bytes": kept * self._block_bytes}

    async def _drop(self, body: Body) -> Body:
        self._engine.kv.drop(str(body["call"]))
        return {}

    async def _warm(self, body: Body) -> Body:
        chat = {
            "messages": body.get("messages"),
            "max_tokens": 1,
            "priority": _LOWEST_PRIORITY,
        }
        engine = self._engine
        call = engine.checked(parse_chat(chat, engine.settings.models, auto_tools=False))
        async with engine.computing(call, compose(call, 1, None), str(body["call"]), None) as steps:
            async for _ in steps:
                pass
        return await self._keep(body)

    async def _renew(self, body: Body) -> Body:
        if self._lease is None:
            raise RefusedError(409, "a stub inside another process has no lease")
        self._lease.renew(float(body["seconds"]))
        return {}
