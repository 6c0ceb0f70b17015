"""The KV cache of an engine core in bytes: its limit, and what holds it.

On a CPU the limit is ours (`_blocks`, `_kv_memory`). On a GPU it is kvcached's where that runs,
else the cache has one size; not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

from ._blocks import Blocks
from ._kvcached import ElasticKv, FixedKv, kv_of


class KvCache:
    """One engine core's cache. `total_bytes` were built on each device; `releasable` is what the
    worker can give back of it: single `blocks`, the `whole` or nothing ("")."""

    def __init__(self, core: Any, blocks: Blocks, total_bytes: int, releasable: str) -> None:
        self._core = core
        self.blocks = blocks
        self.block_bytes = total_bytes // blocks.built
        self._asked = blocks.built * self.block_bytes
        self._whole: ElasticKv | FixedKv | None = None
        if releasable != "blocks":
            self._whole = kv_of(
                core,
                floor_blocks=blocks.floor,
                built_bytes=total_bytes,
                release=self._release_whole if releasable else lambda: False,
            )
        if isinstance(self._whole, ElasticKv):
            self.block_bytes = self._whole.block_bytes

    @property
    def elastic(self) -> bool:
        """Whether the limit can be moved."""
        return self._whole is None or self._whole.elastic

    def state(self) -> dict[str, Any]:
        """Sizes in bytes: block, built, floor, limit, held, used (by requests), cached, pinned;
        on a GPU resident too, the device memory behind it. And the groups of layers that take
        blocks: `block_tokens` in a block, `most_blocks` of a longest request."""
        blocks, size = self.blocks, self.block_bytes
        pinned, cached = blocks.pinned, blocks.cached
        whole = self._whole
        used = blocks.held - 1 - blocks.free - pinned
        if isinstance(whole, ElasticKv):  # free is what can be had: not what others hold
            used = whole.allocated_blocks - 1 - cached - pinned
        resident = {"resident_bytes": whole.resident_bytes()} if whole else {}
        return {
            **resident,
            "elastic": self.elastic,
            "groups": blocks.groups,
            "block_bytes": size,
            "built_bytes": whole.max_bytes if whole else blocks.built * size,
            "floor_bytes": whole.floor_bytes if whole else blocks.floor * size,
            "limit_bytes": whole.limit_bytes if whole else self._asked,
            "held_bytes": whole.held_bytes() if whole else self._held(),
            "used_bytes": used * size,
            "cached_bytes": cached * size,
            "pinned_bytes": pinned * size,
        }

    def _held(self) -> int:
        blocks, size = self.blocks, self.block_bytes
        if blocks.away:
            return blocks.held * size if blocks.held > 1 else 0  # not for the null block alone
        # A limit is what was asked for, though only whole blocks of it can be used.
        return blocks.held * size if blocks.held > blocks.limit else self._asked

    def set_limit(self, limit_bytes: int) -> None:
        """Let it hold so much; what is free goes back at once, blocks in use when they are free.

        While the weights are away, it is in force when they are back.

        Raises:
            ValueError: less than one longest request takes, more than was built, or one size only.
        """
        if self._whole is not None:
            self._whole.set_limit(limit_bytes)
            self._settle_whole()
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
            self._settle_whole()
        else:
            self._release(self.blocks.enforce())

    def _settle_whole(self) -> None:
        """Kept prefixes give way to a limit at last, the one that ends soonest first."""
        whole = self._whole
        assert whole is not None
        if not isinstance(whole, ElasticKv) or whole.away:
            whole.settle()
            return
        self.blocks.bound(whole.limit_blocks)
        state = whole.settle()
        while self.blocks.kept and state.status == "deferred":
            self.blocks.drop_soonest()
            state = whole.settle()

    def waits(self) -> bool:
        """Whether a shrink waits for blocks in use."""
        if self._whole is not None:
            return self._whole.held_bytes() > self._whole.limit_bytes
        return self.blocks.held > self.blocks.limit

    def trim(self) -> None:
        """The weights have left: give back all that no request and no kept prefix holds.

        Raises:
            OSError: it is all still held.
        """
        if self._whole is not None:
            self._whole.trim()
            return
        try:
            self._release(self.blocks.leave())
        except BaseException:
            self.blocks.back()
            raise

    def restored(self) -> None:
        """The weights are back, and the limit is in force again."""
        if self._whole is not None:
            self._whole.restored()
            self._settle_whole()
        else:
            self._release(self.blocks.back())

    def _release_whole(self) -> bool:
        """Unless a call or a kept prefix has KV in it; what waits or is cached only has none."""
        if self.blocks.held - 1 > self.blocks.free or not self._core.scheduler.reset_prefix_cache():
            return False
        return all(self._core.model_executor.collective_rpc("maestro_release_kv"))

    def _release(self, blocks: list[int]) -> None:
        """In one go with the change: a block that is given back meanwhile must not be wiped."""
        if blocks:
            self._core.model_executor.collective_rpc("maestro_release_blocks", args=(blocks,))
