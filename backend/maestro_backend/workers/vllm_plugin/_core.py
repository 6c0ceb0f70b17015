"""What we add to vLLM's engine core: methods reached by `call_utility_async("maestro_...")`.

Nothing of vLLM's is replaced but `Scheduler._free_blocks`, which also remembers the ended call.
"""

from __future__ import annotations

import re
from typing import Any

from ._blocks import Blocks
from ._kv import KvCache

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
        maestro_trim,
        maestro_restored,
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


def _kv_of(core: Any) -> KvCache:
    kv = getattr(core, "_maestro_kv", None)
    if kv is None:
        [shape, *_] = core.model_executor.collective_rpc("maestro_kv_shape")
        kv = core._maestro_kv = KvCache(core, _blocks_of(core.scheduler), **shape)
    return kv


def maestro_kv(self: Any) -> dict[str, Any]:
    """Sizes of the KV cache in bytes, and the number of live requests."""
    return {**_kv_of(self).state(), "requests": len(self.scheduler.requests)}


def maestro_limit_kv(self: Any, limit_bytes: int) -> dict[str, Any]:
    """Set the limit; `error` tells why not."""
    try:
        _kv_of(self).set_limit(limit_bytes)
    except ValueError as error:
        return {"error": str(error), "status": 422}
    return maestro_kv(self)


def maestro_settle(self: Any) -> bool:
    """What time brings to limit and kept prefixes; whether a shrink still waits."""
    kv = _kv_of(self)
    kv.settle()
    return kv.waits()


def maestro_trim(self: Any) -> None:
    """Give back the KV memory that nothing is held in: the weights have left."""
    _kv_of(self).trim()


def maestro_restored(self: Any) -> None:
    """The weights are back, and the KV limit is in force again."""
    _kv_of(self).restored()


def maestro_progress(self: Any) -> list[dict[str, Any]]:
    """One entry per live request: tokens computed (of the prompt too) and generated, KV bytes."""
    size = _kv_of(self).block_bytes
    requests = self.scheduler.requests.values()
    return [_progress(self.scheduler, request, size) for request in requests]


def _progress(scheduler: Any, request: Any, block_bytes: int) -> dict[str, Any]:
    """The null block stands where a window has left a block behind: nothing is held there."""
    manager = scheduler.kv_cache_manager
    groups, null = manager.get_block_ids(request.request_id), manager.block_pool.null_block.block_id
    held = sum(block != null for group in groups for block in group)
    return {
        "call": call_of(request.request_id),
        "computed_tokens": request.num_computed_tokens,
        "generated_tokens": request.num_output_tokens,
        "kv_bytes": held * block_bytes,
        "running": request.status.name == "RUNNING",
    }


def maestro_keep(self: Any, call: str, seconds: float) -> dict[str, Any]:
    """Hold an ended call's prefix; `error` where it is unknown or would leave too little."""
    try:
        kv = _kv_of(self)
        return {"pinned_bytes": kv.blocks.keep(call, seconds) * kv.block_bytes}
    except KeyError:
        return {"error": f"no call {call!r} ended here lately", "status": 404}
    except ValueError as error:
        return {"error": str(error), "status": 409}


def maestro_drop(self: Any, call: str) -> None:
    """Let go of a kept prefix and of its place in the cache."""
    kv = _kv_of(self)
    kv.blocks.drop(call, evict=True)
    kv.settle()
