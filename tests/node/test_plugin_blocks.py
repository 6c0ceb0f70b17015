"""Our limit on vLLM's block pool while the weights are away, on a pool of plain numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from maestro_backend.workers.vllm_plugin._blocks import Blocks, Kept
from maestro_backend.workers.vllm_plugin._kv import KvCache

BLOCK = 1000
BUILT, FLOOR = 24, 5
ALL = set(range(BUILT))


class Pool:
    """As vLLM's `BlockPool`: the first block is the null block, the others begin free."""

    def __init__(self) -> None:
        self.blocks = [
            SimpleNamespace(block_id=i, ref_cnt=0, block_hash=None) for i in range(BUILT)
        ]
        self.null_block, self.num_gpu_blocks = self.blocks[0], BUILT
        self._free = self.blocks[1:]
        self.free_block_queue = SimpleNamespace(
            get_all_free_blocks=lambda: list(self._free),
            remove=self._free.remove,
            append=self._free.append,
        )

    def get_num_free_blocks(self) -> int:
        return len(self._free)

    def use(self, count: int) -> list[Any]:
        taken, self._free[:] = self._free[:count], self._free[count:]
        for block in taken:
            block.ref_cnt, block.block_hash = 1, f"prefix {block.block_id}"
        return taken

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            if not block.ref_cnt:
                self._free.append(block)

    def evict_blocks(self, blocks: set[int]) -> None:
        for i in blocks:
            self.blocks[i].block_hash = None

    def _maybe_evict_cached_block(self, block: Any) -> None:
        block.block_hash = None


class Executor:
    """The workers' side: the blocks whose memory was given back."""

    def __init__(self) -> None:
        self.released: list[set[int]] = []
        self.fails = False

    def collective_rpc(self, method: str, args: tuple[list[int]]) -> None:
        assert method == "maestro_release_blocks"
        if self.fails:
            raise OSError("the kernel refused")
        self.released.append(set(args[0]))


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def executor() -> Executor:
    return Executor()


@pytest.fixture
def kv(pool: Pool, executor: Executor) -> KvCache:
    spec = SimpleNamespace(
        page_size_bytes=1024, max_memory_usage_bytes=lambda config: (FLOOR - 1) * 1024
    )
    single = SimpleNamespace(block_size=16, kv_cache_spec=spec)
    manager = SimpleNamespace(
        block_pool=pool, coordinator=SimpleNamespace(single_type_managers=[single])
    )
    blocks = Blocks(SimpleNamespace(kv_cache_manager=manager, vllm_config=None))
    return KvCache(SimpleNamespace(model_executor=executor), blocks, BUILT * BLOCK, "blocks")


def keep(kv: KvCache, pool: Pool, call: str, count: int, expires: float = 1e12) -> set[int]:
    blocks = pool.use(count)
    kv.blocks.kept[call] = Kept(blocks, expires)
    return {block.block_id for block in blocks}


def sizes(kv: KvCache) -> tuple[int, ...]:
    """Limit, held, used, cached and pinned, in blocks."""
    names = ("limit", "held", "used", "cached", "pinned")
    return tuple(kv.state()[f"{name}_bytes"] // BLOCK for name in names)


def test_an_idle_cache_leaves_as_a_whole_and_comes_back_to_its_limit(
    kv: KvCache, pool: Pool, executor: Executor
) -> None:
    kv.set_limit(20 * BLOCK)
    pool.free_blocks(pool.use(3))
    assert sizes(kv) == (20, 20, 0, 3, 0)
    kv.trim()
    assert sizes(kv) == (20, 0, 0, 0, 0)
    assert executor.released[-1] == ALL, "the null block too: nobody reads it now"
    assert pool.num_gpu_blocks == 1 and not pool.get_num_free_blocks()
    kv.restored()
    assert sizes(kv) == (20, 20, 0, 0, 0)
    assert pool.num_gpu_blocks == 20 == pool.get_num_free_blocks() + 1


def test_calls_and_kept_prefixes_stay_in_it(kv: KvCache, pool: Pool, executor: Executor) -> None:
    call, kept = pool.use(6), keep(kv, pool, "kept", 4)
    mine = {0, *kept, *(block.block_id for block in call)}
    kv.trim()
    assert sizes(kv) == (BUILT, 1 + 6 + 4, 6, 0, 4), "the null block is one of them"
    assert executor.released == [ALL - mine]
    assert all(pool.blocks[i].block_hash for i in mine - {0})
    assert not kv.waits()
    kv.restored()
    assert sizes(kv) == (BUILT, BUILT, 6, 0, 4)


def test_what_is_freed_while_the_weights_are_away_leaves_too(
    kv: KvCache, pool: Pool, executor: Executor
) -> None:
    call = pool.use(6)
    keep(kv, pool, "dropped", 4)
    keep(kv, pool, "over", 2, expires=0)
    kv.trim()
    kv.settle()
    assert sizes(kv) == (BUILT, 11, 6, 0, 4), "the one that was over"
    pool.free_blocks(call)
    kv.settle()
    assert sizes(kv) == (BUILT, 5, 0, 0, 4)
    kv.blocks.drop("dropped", evict=True)
    kv.settle()
    assert sizes(kv) == (BUILT, 0, 0, 0, 0)
    assert executor.released[-1] == ALL


@pytest.mark.parametrize(("limit", "kept"), [(FLOOR + 4, True), (FLOOR + 3, False)])
def test_a_limit_that_is_set_meanwhile_comes_with_the_weights(
    kv: KvCache, pool: Pool, executor: Executor, limit: int, kept: bool
) -> None:
    """Then what is kept leaves a longest request its room again."""
    keep(kv, pool, "kept", 4)
    kv.trim()
    kv.set_limit(limit * BLOCK)
    assert sizes(kv) == (limit, 5, 0, 0, 4)
    assert len(executor.released) == 1, "it had gone back already"
    with pytest.raises(ValueError, match="one request of max_model_len"):
        kv.set_limit(0)
    kv.restored()
    assert sizes(kv) == (limit, limit, 0, 0, 4 if kept else 0)


def test_calls_beyond_the_limit_that_came_back_are_waited_for(kv: KvCache, pool: Pool) -> None:
    call = pool.use(9)
    kv.trim()
    kv.set_limit(FLOOR * BLOCK)
    assert sizes(kv) == (FLOOR, 10, 9, 0, 0)
    kv.restored()
    assert sizes(kv) == (FLOOR, 10, 9, 0, 0) and kv.waits()
    pool.free_blocks(call)
    kv.settle()
    assert sizes(kv) == (FLOOR, FLOOR, 0, 4, 0) and not kv.waits()


def test_memory_that_is_not_given_back_stays_held(
    kv: KvCache, pool: Pool, executor: Executor
) -> None:
    kv.set_limit(20 * BLOCK)
    pool.use(2)
    executor.fails = True
    with pytest.raises(OSError, match="refused"):
        kv.trim()
    assert sizes(kv) == (20, 20, 2, 0, 0)
    kv.restored()
    assert sizes(kv) == (20, 20, 2, 0, 0)
    executor.fails = False
    kv.trim()
    assert sizes(kv) == (20, 3, 2, 0, 0)
