"""The engine-core half of elastic KV: how many blocks of the pool may be used, and kept prefixes.

A limit is set by taking free blocks out of vLLM's pool (quarantine); blocks in use are never
touched, so a shrink may have to wait for them. A kept prefix holds references to cached blocks
until it expires. All of it runs between two steps of the engine, in its own thread.
Ours; the pool is vLLM's `BlockPool` (checked on 0.30).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_REMEMBERED = 2048
"""So many ended calls can still be kept; the hashes of one take 32 bytes per block."""


class BelowFloorError(ValueError):
    """The limit, or what keeping a prefix would leave of it, cannot hold one longest request."""


@dataclass(slots=True)
class Kept:
    """Blocks that are held for a call until `expires` (seconds, monotonic)."""

    blocks: list[Any]
    expires: float


class Blocks:
    """A limit on one scheduler's block pool, in blocks (the null block counts too).

    While the weights are `away` it is what comes back with them: nothing that is free is held.
    """

    def __init__(self, scheduler: Any) -> None:
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self.built: int = len(self._pool.blocks)
        self.limit: int = self.built
        self.groups: list[dict[str, int]] = _groups(self._manager, scheduler.vllm_config)
        longest = sum(group["most_blocks"] for group in self.groups)
        self.floor: int = min(self.built, longest + 1)
        self.away = False
        self._quarantine: list[Any] = []
        self._ended: OrderedDict[str, Any] = OrderedDict()
        self.kept: dict[str, Kept] = {}

    @property
    def held(self) -> int:
        """Blocks that may be occupied now; more than the limit while a shrink waits, and those in
        use while the weights are away."""
        return self.built - len(self._quarantine)

    @property
    def free(self) -> int:
        return int(self._pool.get_num_free_blocks())

    @property
    def pinned(self) -> int:
        """Blocks that only a kept prefix holds."""
        mine: dict[int, int] = {}
        for block in (b for kept in self.kept.values() for b in kept.blocks):
            mine[block.block_id] = mine.get(block.block_id, 0) + 1
        return sum(self._pool.blocks[i].ref_cnt == count for i, count in mine.items())

    @property
    def cached(self) -> int:
        """Free blocks whose content may still be found as a prefix."""
        evictable = getattr(self._pool, "_evictable_blocks", None)  # kvcached's pool has no queue
        if evictable is not None:
            return len(evictable)
        return sum(b.block_hash is not None for b in self._free_blocks())

    def set_limit(self, limit: int) -> list[int]:
        """Take or give back blocks; if any were taken now, the ids of all that are.

        Raises:
            BelowFloorError: one request of the longest length would never fit.
        """
        if not self.floor <= limit <= self.built:
            raise BelowFloorError(
                f"{limit} blocks: the limit must be between {self.floor} blocks (one request of"
                f" max_model_len) and the {self.built} that were built"
            )
        self.limit = limit
        return self._settle()

    def leave(self) -> list[int]:
        """The weights have left: until `back` only requests and kept prefixes hold blocks. The ids
        of all that are taken, as `set_limit` tells them."""
        self.away = True
        return self.enforce()

    def back(self) -> list[int]:
        """The weights are back: the limit is in force again, also one that was set meanwhile."""
        self.away = False
        return self._settle()

    def _settle(self) -> list[int]:
        while not self.away and self._quarantine and self.held < self.limit:
            self._give(self._quarantine.pop())
        return self.enforce()

    def enforce(self) -> list[int]:
        """Take what is free while more than the limit is held: unhashed blocks first, then the
        least recently used prefixes, at last the kept ones that end soonest. What is kept always
        leaves a longest request its room. While the weights are away, take all that is free."""
        if self.away:
            taken = self._take(self.free)
        else:
            taken = self._take(self.held - self.limit)
            while self.kept and (self.held > self.limit or self.limit - self.pinned < self.floor):
                self.drop_soonest()
                taken += self._take(self.held - self.limit)
        idle = self._pool.blocks if self.held == 1 else self._quarantine  # the null block too
        return [block.block_id for block in idle] if taken else []

    def bound(self, limit: int) -> None:
        """Of a pool that kvcached limits: what is kept leaves a longest request its room."""
        self.limit = limit
        while self.kept and limit - self.pinned < self.floor:
            self.drop_soonest()

    def _take(self, count: int) -> list[Any]:
        if count <= 0:
            return []
        free = self._free_blocks()
        chosen = [b for b in free if b.block_hash is None][:count]
        if len(chosen) < count:
            chosen += [b for b in free if b.block_hash is not None][: count - len(chosen)]
        for block in chosen:
            self._pool.free_block_queue.remove(block)
            self._pool._maybe_evict_cached_block(block)
            self._pool.num_gpu_blocks -= 1  # or reset_prefix_cache would count it as used
        self._quarantine += chosen
        return chosen

    def _give(self, block: Any) -> None:
        self._pool.num_gpu_blocks += 1
        self._pool.free_block_queue.append(block)

    def _free_blocks(self) -> list[Any]:
        """In vLLM's order of reuse."""
        blocks: list[Any] = self._pool.free_block_queue.get_all_free_blocks()
        return blocks

    # --- kept prefixes --------------------------------------------------------------------------

    def remember(self, call: str, hashes: Iterable[Any]) -> None:
        """A call ended: its prefix can be kept from now on."""
        self._ended[call] = tuple(hashes)
        self._ended.move_to_end(call)
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def keep(self, call: str, seconds: float) -> int:
        """Hold the cached blocks of an ended call; how many blocks that are.

        Raises:
            KeyError: no such call ended here lately.
            BelowFloorError: too little would be left for requests.
        """
        blocks = list(self._cached_prefix(self._ended[call]))
        before = self.kept.get(call)
        newly = sum(block.ref_cnt == 0 for block in blocks)
        if self.limit - self.pinned - newly < self.floor:
            raise BelowFloorError(
                f"keeping {len(blocks)} blocks would leave less than one longest request"
                f" ({self.floor} blocks) of the limit of {self.limit}"
            )
        self._pool.touch(blocks)
        self.kept[call] = Kept(blocks, time.monotonic() + seconds)
        if before is not None:
            self._pool.free_blocks(reversed(before.blocks))
        return len(blocks)

    def drop(self, call: str, *, evict: bool = False) -> None:
        """Let go of a kept prefix; `evict`: its blocks leave the prefix cache too."""
        kept = self.kept.pop(call, None)
        if kept is None:
            return
        self._pool.free_blocks(reversed(kept.blocks))
        if evict:
            idle = [b for b in kept.blocks if b.ref_cnt == 0]
            self._pool.evict_blocks({block.block_id for block in idle})

    def drop_soonest(self) -> None:
        """Let go of the kept prefix that ends first."""
        self.drop(min(self.kept, key=lambda call: self.kept[call].expires), evict=True)

    def expire(self) -> None:
        """Let go of what was kept long enough."""
        now = time.monotonic()
        for call in [c for c, kept in self.kept.items() if kept.expires <= now]:
            self.drop(call)

    def _cached_prefix(self, hashes: tuple[Any, ...]) -> Iterator[Any]:
        """The blocks of a call that are still cached, in each group of layers.

        With full attention from its start to the first that is missing. Other layers need only the
        last ones, and their first go first.
        """
        from vllm.v1.core.kv_cache_utils import resolve_block_hashes
        from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

        for group, manager in enumerate(self._manager.coordinator.single_type_managers):
            sized = resolve_block_hashes(
                list(hashes), self._pool.hash_block_size, manager.block_size
            )
            for block_hash in sized:
                found = self._pool.get_cached_block(block_hash, [group])
                if found:
                    yield from found
                elif isinstance(manager, FullAttentionManager):
                    break


def _groups(manager: Any, vllm_config: Any) -> list[dict[str, int]]:
    """Per group of layers: tokens in a block, and blocks of a request of `max_model_len` tokens.

    The latter as vLLM counts them when it starts: layers that look back over a window are bounded.
    """
    return [
        {
            "block_tokens": single.block_size,
            "most_blocks": -(
                -single.kv_cache_spec.max_memory_usage_bytes(vllm_config)
                // single.kv_cache_spec.page_size_bytes
            ),
        }
        for single in manager.coordinator.single_type_managers
    ]
