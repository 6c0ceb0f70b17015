"""What we add to vLLM's engine core: methods reached by `call_utility_async("maestro_...")`.

Nothing of vLLM's is replaced but `Scheduler._free_blocks`, which also remembers the ended call.
"""

from __future__ import annotations

import re
from typing import Any

from ._blocks import Blocks

_CALL = re.compile(r"(?:\d+_)?(?:chatcmpl|cmpl|resp)[-_](.+?)(?:-\d+)?-[0-9a-f]{8}")


def call_of(request_id: str) -> str:
    """The `x-request-id` of the HTTP request behind an engine's request id.

    vLLM makes `[n_]chatcmpl-ID-RANDOM`, of a plain completion `cmpl-ID-INDEX-RANDOM`.
    """
    match = _CALL.fullmatch(request_id)
    return match[1] if match else request_id


def install() -> None:
    """Add our methods to vLLM's classes in this process; done once, cheap to repeat."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    if hasattr(EngineCore, "maestro_kv"):
        return
    for method in (
        maestro_kv,
        maestro_limit_kv,
        maestro_settle,
        maestro_progress,
        maestro_keep,
        maestro_drop,
    ):
        setattr(EngineCore, method.__name__, method)
    free_blocks = Scheduler._free_blocks

    def _free_blocks(self: Any, request: Any) -> None:
        _blocks_of(self).remember(call_of(request.request_id), request.block_hashes)
        free_blocks(self, request)

    Scheduler._free_blocks = _free_blocks


def _blocks_of(scheduler: Any) -> Blocks:
    blocks = getattr(scheduler, "_maestro_blocks", None)
    if blocks is None:
        blocks = scheduler._maestro_blocks = Blocks(scheduler)
    return blocks


def maestro_kv(self: Any) -> dict[str, int]:
    """Counts of blocks: built, floor, limit, held, used (by requests), cached, pinned."""
    blocks = _blocks_of(self.scheduler)
    pinned = blocks.pinned
    return {
        "built": blocks.built,
        "floor": blocks.floor,
        "limit": blocks.limit,
        "held": blocks.held,
        "used": blocks.held - 1 - blocks.free - pinned,
        "cached": blocks.cached,
        "pinned": pinned,
        "requests": len(self.scheduler.requests),
    }


def maestro_limit_kv(self: Any, limit: int) -> dict[str, int]:
    """Set the limit in blocks; memory of blocks that are free goes back at once."""
    _release(self, _blocks_of(self.scheduler).set_limit(limit))
    return maestro_kv(self)


def maestro_settle(self: Any) -> dict[str, int]:
    """What time brings: kept prefixes expire, a waiting shrink takes what became free."""
    blocks = _blocks_of(self.scheduler)
    blocks.expire()
    _release(self, blocks.enforce())
    return maestro_kv(self)


def _release(core: Any, blocks: list[int]) -> None:
    """In one go with the change: a block that is given back meanwhile must not be wiped."""
    if blocks:
        core.model_executor.collective_rpc("maestro_release_blocks", args=(blocks,))


def maestro_progress(self: Any) -> list[dict[str, Any]]:
    """One entry per live request: tokens computed (of the prompt too) and generated, blocks."""
    return [_progress(self.scheduler, request) for request in self.scheduler.requests.values()]


def _progress(scheduler: Any, request: Any) -> dict[str, Any]:
    groups = scheduler.kv_cache_manager.get_block_ids(request.request_id)
    return {
        "call": call_of(request.request_id),
        "computed_tokens": request.num_computed_tokens,
        "generated_tokens": request.num_output_tokens,
        "blocks": sum(map(len, groups)),
        "running": request.status.name == "RUNNING",
    }


def maestro_keep(self: Any, call: str, seconds: float) -> dict[str, Any]:
    """Hold an ended call's prefix; `error` where it is unknown or would leave too little."""
    try:
        return {"blocks": _blocks_of(self.scheduler).keep(call, seconds)}
    except KeyError:
        return {"error": f"no call {call!r} ended here lately", "status": 404}
    except ValueError as error:
        return {"error": str(error), "status": 409}


def maestro_drop(self: Any, call: str) -> None:
    """Let go of a kept prefix and of its place in the cache."""
    _blocks_of(self.scheduler).drop(call, evict=True)
