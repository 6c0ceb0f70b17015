"""Elastic KV on a GPU, on a kvcached of plain numbers: limits, refusals, what a launch needs."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from maestro_backend.workers.vllm_plugin._kvcached import (
    ElasticKv,
    FixedKv,
    KvLimitError,
    KvState,
    kv_of,
    kvcached_environment,
    kvcached_refusal,
)

PAGE = 2 * 1024**2
LAYERS, BUFFERS, BLOCKS_PER_PAGE = 4, 2, 4
BUNDLE = PAGE * LAYERS * BUFFERS
PAGES = 16


class Pool:
    """As kvcached's `KVCacheManager` behaves: pages of blocks under a revisioned limit.

    A page is mapped while one of its blocks is used, or while it is held in reserve. A limit below
    what is used waits. With `defer` set, freed pages stay mapped until the engine says so.
    """

    def __init__(self, name: str = "block_pool", pages: int = PAGES) -> None:
        self.pool_name, self.group_id = name, 0
        self.page_size, self.num_layers, self.num_kv_buffers = PAGE, LAYERS, BUFFERS
        self.block_mem_size = PAGE // BLOCKS_PER_PAGE
        self.mem_size = pages * PAGE
        self.pages = self.capacity = pages
        self.used: set[int] = set()
        self.reserved = 0
        self.defer = False
        self.quarantined = False
        self.rejected = False
        self.waiting: int | None = None
        self.limit: tuple[int, int] | None = None
        self.revision = -1
        self._retired: set[int] = set()

    def set_memory_limit(self, limit_bytes: int, *, revision: int) -> dict[str, Any]:
        if revision < self.revision:
            return self._told("stale")
        if revision == self.revision:
            same = self.limit is not None and self.limit[0] == limit_bytes
            return self.memory_limit_state() if same else self._told("conflict")
        target = min(limit_bytes // BUNDLE, self.pages)
        if self.quarantined:
            raise ValueError("pool has quarantined pages")
        self.revision, self.limit = revision, (limit_bytes, target * BUNDLE)
        self.rejected, self.waiting = False, target
        self._shrink()
        return self.memory_limit_state()

    def memory_limit_state(self) -> dict[str, Any]:
        waiting = "deferred" if self.waiting is not None else "applied"
        return self._told("rejected" if self.rejected else waiting)

    def trim(self) -> None:
        self.reserved = 0

    def observability_snapshot(self) -> Any:
        return SimpleNamespace(allocated_blocks=len(self.used) + 1)

    def capture_physical_release_marker(self) -> int:
        return 7

    def release_retired_pages_through(self, marker: int) -> None:
        assert marker == 7
        self._retired.clear()
        self._shrink()

    def free(self, blocks: set[int]) -> None:
        before = self._in_use()
        self.used -= blocks
        if self.defer:
            self._retired |= before - self._in_use()
        self._shrink()

    def _shrink(self) -> None:
        if self.waiting is None:
            return
        if self.quarantined:
            self.waiting, self.rejected = None, True
        elif len(self._in_use() | self._retired) <= self.waiting:
            self.capacity, self.waiting = self.waiting, None
            self.reserved = max(0, min(self.reserved, self.capacity - len(self._in_use())))

    def _in_use(self) -> set[int]:
        return {block // BLOCKS_PER_PAGE for block in self.used}

    def _told(self, status: str) -> dict[str, Any]:
        mapped = (len(self._in_use() | self._retired) + self.reserved) * BUNDLE
        limit = self.limit
        return {
            "status": status,
            "limit_bytes": limit and limit[0],
            "effective_limit_bytes": limit and limit[1],
            "current_capacity_bytes": self.capacity * BUNDLE,
            "revision": self.revision,
            "mapped_bytes": mapped,
            "reason": f"because it is {status}",
        }


class BlockPool:
    """kvcached's block pool in vLLM: blocks of requests and, evictable, of cached prefixes."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.evictable: list[int] = []

    def use(self, blocks: range, *, cached: bool = False) -> None:
        self._pool.used |= set(blocks)
        if cached:
            self.evictable += blocks

    def _evict_blocks_from_pool(self, num_to_evict: int) -> int:
        gone, self.evictable = self.evictable[:num_to_evict], self.evictable[num_to_evict:]
        self._pool.free(set(gone))
        return len(gone)


class Engine:
    """An engine core with kvcached in it."""

    def __init__(self, *pools: Pool) -> None:
        self.pools = pools or (Pool(),)
        self.block_pool = BlockPool(self.pools[0])
        manager = SimpleNamespace(block_pool=self.block_pool)
        self.scheduler = SimpleNamespace(kv_cache_manager=manager)
        self.batch_queue: list[int] = []

    def set_instance_memory_limit(self, limit_bytes: int, *, revision: int) -> dict[str, Any]:
        if not self.pools:
            return {"status": "unavailable", "reason": "no_registered_kv_cache_pool", "pools": []}
        share = limit_bytes // len(self.pools)
        told = [pool.set_memory_limit(share, revision=revision) for pool in self.pools]
        found = {state["status"] for state in told}
        order = ("conflict", "stale", "rejected", "deferred", "applied")
        status = next(status for status in order if status in found)
        return {"status": status, "reason": f"because it is {status}", "pools": told}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    registry, control = ModuleType("kvcached.pool_registry"), ModuleType("kvcached.control")
    registry.get_registered_kv_cache_pools = lambda: [(p, "vllm") for p in engine.pools]  # type: ignore[attr-defined]
    control.set_instance_memory_limit = engine.set_instance_memory_limit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvcached", ModuleType("kvcached"))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.setitem(sys.modules, control.__name__, control)
    monkeypatch.setenv("ENABLE_KVCACHED", "true")
    return engine


def never() -> bool:
    raise AssertionError("not asked for")


def connect(engine: Any, floor: int = BLOCKS_PER_PAGE, built: int = PAGES * BUNDLE) -> Any:
    return kv_of(engine, floor_blocks=floor, built_bytes=built, release=never)


# --- a limit, its answers ------------------------------------------------------------------------


def test_a_limit_that_fits_is_applied(engine: Engine) -> None:
    kv = connect(engine)
    assert isinstance(kv, ElasticKv)
    assert kv.elastic
    assert (kv.floor_bytes, kv.max_bytes, kv.held_bytes()) == (BUNDLE, 16 * BUNDLE, 16 * BUNDLE)
    engine.block_pool.use(range(8))
    assert kv.set_limit(4 * BUNDLE) == KvState("applied", 4 * BUNDLE, 4 * BUNDLE, 2 * BUNDLE)
    assert kv.set_limit(9 * BUNDLE).held_bytes == kv.held_bytes() == 9 * BUNDLE
    assert kv.limit_bytes == 9 * BUNDLE


def test_a_limit_is_rounded_down_to_pages_but_never_below_the_floor(engine: Engine) -> None:
    kv = connect(engine, floor=BLOCKS_PER_PAGE + 1)
    assert kv.floor_bytes == 2 * BUNDLE
    assert kv.set_limit(3 * BUNDLE - 1).held_bytes == 2 * BUNDLE


@pytest.mark.parametrize("limit", [0, BUNDLE - 1, 16 * BUNDLE + 1])
def test_a_limit_outside_floor_and_ceiling_is_refused(engine: Engine, limit: int) -> None:
    kv = connect(engine)
    with pytest.raises(KvLimitError, match=f"between {BUNDLE} .* and {16 * BUNDLE}"):
        kv.set_limit(limit)
    assert engine.pools[0].revision == -1
    assert kv.limit_bytes == 16 * BUNDLE


def test_blocks_in_use_are_waited_for(engine: Engine) -> None:
    kv = connect(engine)
    engine.block_pool.use(range(6 * BLOCKS_PER_PAGE))
    assert kv.set_limit(2 * BUNDLE) == KvState("deferred", 2 * BUNDLE, 6 * BUNDLE, 6 * BUNDLE)
    engine.pools[0].free(set(range(2 * BLOCKS_PER_PAGE)))
    assert kv.settle() == KvState("deferred", 2 * BUNDLE, 4 * BUNDLE, 4 * BUNDLE)
    engine.pools[0].free(set(range(5 * BLOCKS_PER_PAGE)))
    assert kv.settle() == KvState("applied", 2 * BUNDLE, 2 * BUNDLE, BUNDLE)


def test_cached_prefixes_give_way_and_no_more_than_needed(engine: Engine) -> None:
    kv = connect(engine)
    engine.block_pool.use(range(BLOCKS_PER_PAGE))
    engine.block_pool.use(range(BLOCKS_PER_PAGE, 6 * BLOCKS_PER_PAGE), cached=True)
    assert kv.set_limit(3 * BUNDLE).status == "applied"
    assert len(engine.block_pool.evictable) == 2 * BLOCKS_PER_PAGE
    assert engine.pools[0].used >= set(range(BLOCKS_PER_PAGE))


def test_what_an_idle_engine_freed_is_unmapped_at_once(engine: Engine) -> None:
    engine.pools[0].defer = True
    kv = connect(engine)
    engine.block_pool.use(range(6 * BLOCKS_PER_PAGE), cached=True)
    assert kv.set_limit(2 * BUNDLE).status == "applied"


def test_no_more_is_evicted_than_needed_while_a_step_is_under_way(engine: Engine) -> None:
    """kvcached waits for the step itself before it unmaps what that may read."""
    engine.pools[0].defer = True
    engine.batch_queue = [1]
    kv = connect(engine)
    engine.block_pool.use(range(6 * BLOCKS_PER_PAGE), cached=True)
    assert kv.set_limit(2 * BUNDLE).status == "applied"
    assert len(engine.block_pool.evictable) == 2 * BLOCKS_PER_PAGE


def test_what_was_freed_before_a_settle_is_unmapped_without_an_eviction(engine: Engine) -> None:
    engine.pools[0].defer = True
    kv = connect(engine)
    engine.block_pool.use(range(6 * BLOCKS_PER_PAGE))
    assert kv.set_limit(2 * BUNDLE).status == "deferred"
    engine.pools[0].free(set(range(2 * BLOCKS_PER_PAGE, 6 * BLOCKS_PER_PAGE)))
    assert kv.settle().status == "applied"


def test_a_floor_counts_only_blocks_that_lie_in_one_page(engine: Engine) -> None:
    """Of blocks of 3 / 8 of a page two are usable; the third straddles the next page."""
    engine.pools[0].block_mem_size = PAGE * 3 // 8
    kv = connect(engine, floor=5)
    assert kv.floor_bytes == 5 * BUNDLE, "2 whole blocks, less one where pages do not tile"
    kv.set_limit(7 * BUNDLE)
    assert kv.limit_blocks == 7


def test_sizes_are_kvcacheds_and_not_those_of_vllms_tensors(engine: Engine) -> None:
    """Its tensors span addresses of the whole GPU."""
    kv = connect(engine, built=139 * 1024**3)
    assert kv.block_bytes == BUNDLE // BLOCKS_PER_PAGE
    assert (kv.max_bytes, kv.limit_blocks) == (16 * BUNDLE, 16 * BLOCKS_PER_PAGE)
    engine.block_pool.use(range(5))
    assert kv.allocated_blocks == 6, "the null block too"


def test_growing_ends_a_wait(engine: Engine) -> None:
    kv = connect(engine)
    engine.block_pool.use(range(6 * BLOCKS_PER_PAGE))
    kv.set_limit(2 * BUNDLE)
    assert kv.set_limit(8 * BUNDLE).status == "applied"


@pytest.mark.parametrize(("theirs", "status"), [(40, "stale"), (1, "conflict")])
def test_a_limit_that_somebody_else_set_is_overruled(
    engine: Engine, theirs: int, status: str
) -> None:
    engine.set_instance_memory_limit(5 * BUNDLE, revision=theirs)
    told = engine.set_instance_memory_limit(3 * BUNDLE, revision=1)
    assert told["status"] == status
    kv = connect(engine)
    assert kv.set_limit(3 * BUNDLE).held_bytes == 3 * BUNDLE
    assert engine.pools[0].revision == theirs + 1


def test_a_rival_that_never_rests_is_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rival(limit: int, *, revision: int) -> dict[str, Any]:
        return {"status": "stale", "reason": "", "pools": [{"revision": revision + 9}]}

    monkeypatch.setattr(sys.modules["kvcached.control"], "set_instance_memory_limit", rival)
    kv = connect(engine)
    with pytest.raises(KvLimitError, match="stale, it does not say why"):
        kv.set_limit(3 * BUNDLE)


def test_quarantined_pages_refuse_a_limit(engine: Engine) -> None:
    kv = connect(engine)
    kv.set_limit(8 * BUNDLE)
    engine.pools[0].quarantined = True
    with pytest.raises(KvLimitError, match="quarantined"):
        kv.set_limit(3 * BUNDLE)
    assert (kv.limit_bytes, kv.held_bytes()) == (8 * BUNDLE, 8 * BUNDLE)


def test_a_wait_that_ends_in_a_quarantine_is_told(engine: Engine) -> None:
    kv = connect(engine)
    engine.block_pool.use(range(6 * BLOCKS_PER_PAGE))
    kv.set_limit(2 * BUNDLE)
    engine.pools[0].quarantined = True
    engine.pools[0].free(set(range(5 * BLOCKS_PER_PAGE)))
    assert kv.settle() == KvState("rejected", 2 * BUNDLE, 16 * BUNDLE, BUNDLE)


@pytest.mark.parametrize("status", ["rejected", "unavailable", "brand_new"])
def test_any_other_answer_is_an_error_that_names_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    answer = {"status": status, "reason": "pages_are_odd", "pools": []}
    control = sys.modules["kvcached.control"]
    monkeypatch.setattr(control, "set_instance_memory_limit", lambda *_, **__: answer)
    with pytest.raises(KvLimitError, match=f"{status}, pages_are_odd"):
        connect(engine).set_limit(3 * BUNDLE)


def test_several_pools_share_a_limit(engine: Engine) -> None:
    engine.pools = (engine.pools[0], Pool("other"))
    kv = connect(engine)
    assert (kv.floor_bytes, kv.max_bytes) == (2 * BUNDLE, 32 * BUNDLE)
    assert kv.set_limit(8 * BUNDLE).held_bytes == 8 * BUNDLE
    assert [pool.capacity for pool in engine.pools] == [4, 4]


def test_reserved_pages_go_back_before_a_suspend(engine: Engine) -> None:
    kv = connect(engine)
    engine.block_pool.use(range(4))
    engine.pools[0].reserved = 2
    assert kv.settle().mapped_bytes == 3 * BUNDLE
    kv.trim()
    assert kv.settle().mapped_bytes == BUNDLE


def test_only_what_is_in_use_is_held_while_the_weights_are_away(engine: Engine) -> None:
    kv = connect(engine)
    engine.pools[0].defer = True
    kv.set_limit(12 * BUNDLE)
    engine.block_pool.use(range(2 * BLOCKS_PER_PAGE))
    engine.block_pool.use(range(2 * BLOCKS_PER_PAGE, 5 * BLOCKS_PER_PAGE), cached=True)
    engine.pools[0].reserved = 2
    kv.trim()
    assert kv.settle() == KvState("applied", 12 * BUNDLE, 2 * BUNDLE, 2 * BUNDLE)
    engine.pools[0].free(set(range(BLOCKS_PER_PAGE)))
    assert kv.settle().held_bytes == kv.held_bytes() == BUNDLE
    kv.restored()
    assert kv.settle() == KvState("applied", 12 * BUNDLE, 12 * BUNDLE, BUNDLE)


def test_a_limit_set_while_the_weights_are_away_comes_with_them(engine: Engine) -> None:
    kv = connect(engine)
    engine.block_pool.use(range(4 * BLOCKS_PER_PAGE))
    kv.trim()
    assert kv.set_limit(9 * BUNDLE).held_bytes == 4 * BUNDLE
    kv.restored()
    assert kv.held_bytes() == 9 * BUNDLE
    kv.trim()
    assert kv.set_limit(2 * BUNDLE).held_bytes == 4 * BUNDLE
    kv.restored()
    assert kv.settle() == KvState("deferred", 2 * BUNDLE, 4 * BUNDLE, 4 * BUNDLE)


def test_memory_that_cannot_be_given_back_is_still_the_limit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = connect(engine)
    monkeypatch.setattr(Pool, "trim", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kv.trim()
    assert kv.held_bytes() == 16 * BUNDLE


# --- one size -----------------------------------------------------------------------------------


def _without_kvcached(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setitem(sys.modules, "kvcached.pool_registry", None)


def _switched_off(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.delenv("ENABLE_KVCACHED")


def _not_patched_in(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    engine.pools = ()


@pytest.mark.parametrize("how", [_without_kvcached, _switched_off, _not_patched_in])
def test_without_kvcached_the_cache_is_there_or_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, how: Callable[..., None]
) -> None:
    how(monkeypatch, engine)
    idle = False
    kv = kv_of(engine, floor_blocks=BLOCKS_PER_PAGE, built_bytes=4 * BUNDLE, release=lambda: idle)
    assert isinstance(kv, FixedKv)
    assert not kv.elastic
    assert kv.floor_bytes == kv.max_bytes == kv.held_bytes() == 4 * BUNDLE
    for size in (0, 3 * BUNDLE):
        with pytest.raises(KvLimitError, match="without kvcached"):
            kv.set_limit(size)
    kv.trim()
    assert kv.held_bytes() == 4 * BUNDLE, "something is held in it"
    idle = True
    kv.trim()
    idle = False
    kv.trim()
    assert kv.settle() == KvState("applied", 4 * BUNDLE, 0, 0)
    kv.restored()
    assert kv.set_limit(4 * BUNDLE) == KvState("applied", 4 * BUNDLE, 4 * BUNDLE, 4 * BUNDLE)


# --- a launch -----------------------------------------------------------------------------------


def test_a_launch_switches_kvcached_on_under_a_name_of_its_own() -> None:
    first = kvcached_environment("org/Big Model", "/run/a.sock")
    assert first["ENABLE_KVCACHED"] == "true"
    assert first["KVCACHED_AUTOPATCH"] == "1"
    assert int(first["KVCACHED_MIN_RESERVED_PAGES"]) <= int(first["KVCACHED_MAX_RESERVED_PAGES"])
    assert int(first["KVCACHED_MAX_RESERVED_PAGES"]) < 10
    assert "VLLM_USE_V2_MODEL_RUNNER" not in first
    name = first["KVCACHED_IPC_NAME"]
    assert name == kvcached_environment("org/Big Model", "/run/a.sock")["KVCACHED_IPC_NAME"]
    others = [("org/Big Model", "/run/b.sock"), ("org/Big-Model", "/run/a.sock")]
    assert name not in [kvcached_environment(*o)["KVCACHED_IPC_NAME"] for o in others]


def test_a_name_is_one_that_kvcached_takes_as_it_is() -> None:
    name = kvcached_environment("a/" + "ü" * 200, "/run/a.sock")["KVCACHED_IPC_NAME"]
    assert len(name) <= 48  # its sockets lie in a folder of that name; paths have 108 bytes
    assert all(c.isascii() and (c.isalnum() or c in "_-") for c in name)


def test_an_older_vllm_runs_its_first_model_runner() -> None:
    assert kvcached_environment("m", "a", vllm="0.26.0")["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert "VLLM_USE_V2_MODEL_RUNNER" not in kvcached_environment("m", "a", vllm="0.28.0")


@pytest.mark.parametrize(
    ("vllm", "kvcached", "more", "words"),
    [
        ("0.30.0", "0.1.6", {}, ""),
        ("0.26.0", "0.1.6", {}, ""),
        ("0.30.0+cu130", "0.1.6", {}, ""),
        ("0.31.0", "0.1.6", {}, "0.26 to 0.30, not 0.31.0"),
        ("0.25.1", "0.1.6", {}, "0.26 to 0.30, not 0.25.1"),
        ("1.0", "0.1.6", {}, "not 1.0"),
        ("what", "0.1.6", {}, "not what"),
        (None, "0.1.6", {}, "GPU build"),
        ("0.30.0", None, {}, "--no-build-isolation setuptools wheel kvcached==0.1.6"),
        ("0.30.0", "0.1.6", {"speculative": True}, "speculative decoding"),
        ("0.30.0", "0.1.7", {}, "0.1.7 is not 0.1.6"),
        ("0.30.0", "0.1.6", {"device": "cpu"}, "needs a GPU"),
        ("0.30.0", "0.1.6", {"kv_events": True}, "kv_events_config"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(
    vllm: str | None, kvcached: str | None, more: dict[str, Any], words: str
) -> None:
    refusal = kvcached_refusal(vllm, kvcached, **more)
    assert bool(refusal) == bool(words)
    assert words in refusal


# --- the installed kvcached ----------------------------------------------------------------------


def test_the_installed_kvcached_is_the_one_that_this_was_written_for() -> None:
    spec = importlib.util.find_spec("kvcached")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("kvcached is not installed (it is built on a machine with CUDA)")
    root = Path(spec.submodule_search_locations[0])

    def signatures(path: str) -> dict[str, str]:
        found = ast.walk(ast.parse((root / path).read_text(encoding="utf-8")))
        return {n.name: ast.unparse(n.args) for n in found if isinstance(n, ast.FunctionDef)}

    control = signatures("control.py")
    assert control["set_instance_memory_limit"] == "limit_bytes: int, *, revision: int"
    manager = signatures("kv_cache_manager.py")
    assert manager["trim"] == manager["memory_limit_state"] == "self"
    assert manager["capture_physical_release_marker"] == "self"
    assert manager["release_retired_pages_through"] == "self, marker: int"
    pool = signatures("integration/vllm/patches.py")
    assert pool["_evict_blocks_from_pool"].startswith("self, num_to_evict: int")
    patches = (root / "integration/vllm/patches.py").read_text(encoding="utf-8")
    assert 'VLLM_MRV2_RANGE = ">=0.29.0,<0.31.0"' in patches
