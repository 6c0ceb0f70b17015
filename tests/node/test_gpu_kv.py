"""The KV cache of a GPU engine core as a whole: our count of blocks beside kvcached's of pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from maestro_backend.workers.vllm_plugin import _kv, _kv_memory
from maestro_backend.workers.vllm_plugin._blocks import BelowFloorError, Blocks, Kept
from maestro_backend.workers.vllm_plugin._kvcached import ElasticKv, KvState

BLOCK = 1000
BUILT, FLOOR = 64, 8


class ElasticPool:
    """kvcached's block pool as vLLM sees it: there is no queue of free blocks."""

    def __init__(self) -> None:
        self.blocks = [
            SimpleNamespace(block_id=i, ref_cnt=0, block_hash=None) for i in range(BUILT)
        ]
        self._evictable_blocks: dict[int, Any] = {}
        self.evicted: set[int] = set()

    def get_num_free_blocks(self) -> int:
        return 3  # what a neighbour has left

    def touch(self, blocks: list[Any]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt -= 1

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted |= blocks


class Whole(ElasticKv):
    """A limit that settles once enough was evicted."""

    def __init__(self, pool: ElasticPool) -> None:
        self._blocks = pool
        self.block_bytes, self.floor_bytes, self.max_bytes = BLOCK, FLOOR * BLOCK, BUILT * BLOCK
        self.limit_bytes = self.max_bytes
        self.waits_for = 0

    def set_limit(self, size: int) -> KvState:
        self.limit_bytes = size
        return self.settle()

    def settle(self) -> KvState:
        waits = len(self._blocks.evicted) < self.waits_for
        held = self.max_bytes if waits else self.limit_bytes
        return KvState("deferred" if waits else "applied", self.limit_bytes, held, 7 * BLOCK)

    _state = settle

    def held_bytes(self) -> int:
        return self.settle().held_bytes

    @property
    def limit_blocks(self) -> int:
        return self.limit_bytes // BLOCK

    @property
    def allocated_blocks(self) -> int:
        return 21


@pytest.fixture
def pool() -> ElasticPool:
    return ElasticPool()


@pytest.fixture
def whole(pool: ElasticPool) -> Whole:
    return Whole(pool)


@pytest.fixture
def kv(pool: ElasticPool, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> _kv.KvCache:
    spec = SimpleNamespace(
        page_size_bytes=1024, max_memory_usage_bytes=lambda config: (FLOOR - 1) * 1024
    )
    single = SimpleNamespace(block_size=16, kv_cache_spec=spec)
    manager = SimpleNamespace(
        block_pool=pool, coordinator=SimpleNamespace(single_type_managers=[single])
    )
    blocks = Blocks(SimpleNamespace(kv_cache_manager=manager, vllm_config=None))
    monkeypatch.setattr(_kv, "kv_of", lambda core, **_: whole)
    return _kv.KvCache(SimpleNamespace(), blocks, 139 * 1024**3, "whole")


def keep(kv: _kv.KvCache, call: str, blocks: range, expires: float) -> None:
    held = [kv.blocks._pool.blocks[i] for i in blocks]
    kv.blocks._pool.touch(held)
    kv.blocks.kept[call] = Kept(held, expires)


def test_sizes_are_in_kvcacheds_blocks(kv: _kv.KvCache, pool: ElasticPool) -> None:
    """Not in parts of the tensors, which span the whole GPU; and what others hold is not used."""
    pool._evictable_blocks = dict.fromkeys(range(5))
    keep(kv, "a", range(10, 14), 1)
    assert kv.state() == {
        "resident_bytes": 7 * BLOCK,
        "elastic": True,
        "groups": [{"block_tokens": 16, "most_blocks": FLOOR - 1}],
        "block_bytes": BLOCK,
        "built_bytes": BUILT * BLOCK,
        "floor_bytes": FLOOR * BLOCK,
        "limit_bytes": BUILT * BLOCK,
        "held_bytes": BUILT * BLOCK,
        "used_bytes": (21 - 1 - 5 - 4) * BLOCK,
        "cached_bytes": 5 * BLOCK,
        "pinned_bytes": 4 * BLOCK,
    }


def test_what_is_kept_leaves_a_longest_request_its_room(kv: _kv.KvCache, pool: ElasticPool) -> None:
    keep(kv, "late", range(10, 20), 9)
    keep(kv, "soon", range(20, 30), 1)
    kv.set_limit(28 * BLOCK)
    assert sorted(kv.blocks.kept) == ["late", "soon"]
    kv.set_limit(27 * BLOCK)
    assert sorted(kv.blocks.kept) == ["late"]
    assert pool.evicted == set(range(20, 30))
    kv.set_limit(FLOOR * BLOCK)
    assert kv.blocks.kept == {} and kv.blocks.pinned == 0


def test_no_more_is_kept_than_the_limit_allows(kv: _kv.KvCache) -> None:
    kv.set_limit(FLOOR * BLOCK)
    kv.blocks.remember("a", ())
    kv.blocks._cached_prefix = lambda hashes: iter(kv.blocks._pool.blocks[1:3])  # type: ignore[method-assign]
    with pytest.raises(BelowFloorError, match="less than one longest request"):
        kv.blocks.keep("a", 9)


def test_a_shrink_that_waits_has_kept_prefixes_at_last(
    kv: _kv.KvCache, whole: Whole, pool: ElasticPool
) -> None:
    keep(kv, "late", range(10, 20), 9)
    keep(kv, "soon", range(20, 30), 1)
    whole.waits_for = 5
    kv.set_limit(60 * BLOCK)
    assert list(kv.blocks.kept) == ["late"]
    assert not kv.waits()
    whole.waits_for = 99
    assert kv.waits()
    kv.settle()
    assert kv.blocks.kept == {} and kv.waits(), "requests hold the rest"


def test_kept_prefixes_stay_while_the_weights_are_away(
    kv: _kv.KvCache, whole: Whole, pool: ElasticPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way back they leave a longest request its room again."""
    keep(kv, "late", range(10, 20), 1e12)
    keep(kv, "soon", range(20, 30), 1e11)
    monkeypatch.setattr(whole, "trim", lambda: setattr(whole, "away", True))
    whole.waits_for = 5
    kv.trim()
    kv.set_limit((FLOOR + 10) * BLOCK)
    kv.settle()
    assert sorted(kv.blocks.kept) == ["late", "soon"]
    kv.restored()
    assert sorted(kv.blocks.kept) == ["late"]


class Tensor:
    """As much of one as is looked at."""

    def __init__(self, address: int, size: int) -> None:
        self.device = SimpleNamespace(type="cuda")
        self._storage = SimpleNamespace(data_ptr=lambda: address, nbytes=lambda: size)

    def untyped_storage(self) -> Any:
        return self._storage


def test_a_hybrid_models_caches_are_counted_each_once() -> None:
    """vLLM 0.26 has several tensors in a list for one layer; layers may share memory."""
    caches = [Tensor(1, 100), [Tensor(2, 30), Tensor(3, 4)], Tensor(1, 100)]
    assert _kv_memory.total_bytes(caches) == 134
    assert not _kv_memory.is_releasable(caches)
    assert _kv_memory.resident_bytes(caches) == 0
