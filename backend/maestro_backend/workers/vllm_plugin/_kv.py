"""The KV cache of an engine core in bytes: its limit, and what holds it.

On a CPU the limit is ours (`_blocks`, `_kv_memory`). On a GPU it is kvcached's where that runs,
else the cache has one size; not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

from ._blocks import Blocks
from ._kvcached import ElasticKv, FixedKv, kv_of


class KvCache:
    """One engine core's cache. `total_bytes` were built on each device; `releasable` says that the
    worker can give single blocks back."""

    def __init__(self, core: Any, blocks: Blocks, total_bytes: int, releasable: bool) -> None:
        self._core = core
        self.blocks = blocks
        self.block_bytes = total_bytes // blocks.built
        self._asked = blocks.built * self.block_bytes
        self._whole: ElasticKv | FixedKv | None = None
        if not releasable:
            floor = blocks.floor * self.block_bytes
            self._whole = kv_of(
                core, floor_bytes=floor, built_bytes=total_bytes, release=_never, restore=_never
            )

    @property
    def elastic(self) -> bool:
        """Whether the limit can be moved."""
        return self._whole is None or self._whole.elastic

    def state(self) -> dict[str, Any]:
        """Sizes in bytes: block, built, floor, limit, held, used (by requests), cached, pinned."""
        blocks, size = self.blocks, self.block_bytes
        pinned = blocks.pinned
        whole = self._whole
        # A limit is what was asked for, though only whole blocks of it can be used.
        held = blocks.held * size if blocks.held > blocks.limit else self._asked
        return {
            "elastic": self.elastic,
            "block_bytes": size,
            "built_bytes": whole.max_bytes if whole else blocks.built * size,
            "floor_bytes": whole.floor_bytes if whole else blocks.floor * size,
            "limit_bytes": whole.limit_bytes if whole else self._asked,
            "held_bytes": whole.held_bytes() if whole else held,
            "used_bytes": (blocks.held - 1 - blocks.free - pinned) * size,
            "cached_bytes": blocks.cached * size,
            "pinned_bytes": pinned * size,
        }

    def set_limit(self, limit_bytes: int) -> None:
        """Let it hold so much; what is free goes back at once, blocks in use when they are free.

        Raises:
            ValueError: less than one longest request takes, more than was built, or one size only.
        """
        if self._whole is not None:
            self._whole.set_limit(limit_bytes)
            return
        now = self.state()
        if not now["floor_bytes"] <= limit_bytes <= now["built_bytes"]:
            raise ValueError(
                f"a KV limit of {limit_bytes} bytes is refused: one request of max_model_len takes"
                f" {now['floor_bytes']}, and the cache was built with {now['built_bytes']}"
            )
        self._asked = limit_bytes
        self._release(self.blocks.set_limit(limit_bytes // self.block_bytes))

    def settle(self) -> None:
        """What time brings: kept prefixes expire, a waiting shrink takes what became free."""
        self.blocks.expire()
        if self._whole is not None:
            self._whole.settle()
        else:
            self._release(self.blocks.enforce())

    def trim(self) -> None:
        """Give back what is mapped and unused, before the weights leave."""
        if self._whole is not None:
            self._whole.trim()

    def _release(self, blocks: list[int]) -> None:
        """In one go with the change: a block that is given back meanwhile must not be wiped."""
        if blocks:
            self._core.model_executor.collective_rpc("maestro_release_blocks", args=(blocks,))


def _never() -> None:
    """A cache of one size stays: calls that wait while the weights are away have their KV in it."""
    raise ValueError("the KV cache of this engine has one size")
