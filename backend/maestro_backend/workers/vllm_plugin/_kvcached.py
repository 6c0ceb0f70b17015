"""Elastic KV on a GPU: kvcached maps memory behind the cache as blocks are used, up to a limit.

Runs in vLLM's engine core, where kvcached keeps its pools. Without kvcached the cache has one size.
Written from the source of kvcached 0.1.6 and vLLM 0.30; run on fakes, not yet on a GPU.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KVCACHED = "0.1.6"
"""The version whose source this follows."""

_TRIES = 3
_ON = ("true", "1")


class KvLimitError(ValueError):
    """A KV limit that cannot be; the one before is still in force."""


@dataclass(frozen=True, slots=True)
class KvState:
    """Where a limit stands. Bytes per process of the engine.

    `status` is `applied`, `deferred` while blocks in use hold more than the limit, or `rejected`
    where a shrink that waited can no longer be. `held_bytes` may be occupied now, `mapped_bytes` of
    device memory are.
    """

    status: str
    limit_bytes: int
    held_bytes: int
    mapped_bytes: int


def kvcached_refusal(
    vllm: str | None,
    kvcached: str | None,
    *,
    device: str = "cuda:0",
    kv_events: bool = False,
    speculative: bool = False,
) -> str:
    """Why a worker cannot have elastic KV, or "". Versions are those installed, None where not.

    The vLLM versions are those that kvcached itself stops at, with an error, when the engine
    starts; pre-releases are taken for the release.
    """
    if not device.startswith("cuda"):
        return "kvcached needs a GPU"
    if kvcached is None:
        return (
            "kvcached is not installed: pip install --no-build-isolation"
            f" setuptools wheel kvcached=={KVCACHED}"
        )
    if kvcached != KVCACHED:
        return f"kvcached {kvcached} is not {KVCACHED}, the one this is written for"
    if vllm is None:
        return "vllm (the GPU build) is not installed"
    if not (0, 26) <= _minor(vllm) < (0, 31):
        return f"kvcached {KVCACHED} runs on vLLM 0.26 to 0.30, not {vllm}"
    if kv_events:
        return "kvcached cannot publish KV events: leave kv_events_config out of engine_args"
    if speculative:
        return "kvcached and speculative decoding do not go together in every vLLM: it is left out"
    return ""


def kvcached_environment(model: str, instance: str, *, vllm: str = "0.30.0") -> dict[str, str]:
    """What a launch of `model` adds to its environment for kvcached; a pure function.

    `instance` is different for every worker on this host (the path of its socket): kvcached keeps
    its counters in shared memory under a name made of it.
    """
    unique = hashlib.sha256(f"{model}\n{instance}".encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9_-]", "-", model)[:24]
    runner = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if _minor(vllm) < (0, 28) else {}
    return {
        "ENABLE_KVCACHED": "true",
        "KVCACHED_AUTOPATCH": "1",
        "KVCACHED_IPC_NAME": f"maestro-{name}-{unique}",
        # Pages kept mapped though unused, each 2 MiB x layers: the ledger pays for them.
        "KVCACHED_MIN_RESERVED_PAGES": "1",
        "KVCACHED_MAX_RESERVED_PAGES": "2",
        # It would keep 5 % of the whole GPU free; what may be used is the ledger's business.
        "KVCACHED_GPU_UTILIZATION": "0.99",
        # Cached prefixes are bounded by the KV limit, and evicted here when it shrinks.
        "KVCACHED_MAX_CACHED_TOKENS": "-1",
        **runner,
    }


def kv_of(
    core: Any, *, floor_blocks: int, built_bytes: int, release: Callable[[], bool]
) -> ElasticKv | FixedKv:
    """The KV memory of an engine core: elastic where kvcached runs in it, else of one size.

    `floor_blocks` are those of one longest request, the null block included.
    """
    if os.environ.get("ENABLE_KVCACHED", "").lower() in _ON:
        try:
            from kvcached.pool_registry import get_registered_kv_cache_pools
        except ImportError:
            return FixedKv(built_bytes, release)
        if get_registered_kv_cache_pools():
            return ElasticKv(core, floor_blocks)
    return FixedKv(built_bytes, release)


class FixedKv:
    """A cache of one size: all of it or, while its model is suspended without calls, nothing.

    `release` gives its memory back, where that can be and no call or kept prefix has KV in it, and
    says whether it did. What was cached is lost then.
    """

    elastic = False

    def __init__(self, built_bytes: int, release: Callable[[], bool]) -> None:
        self.floor_bytes = self.max_bytes = self.limit_bytes = built_bytes
        self._release = release
        self._away = False

    def set_limit(self, size: int) -> KvState:
        """Only what was built.

        Raises:
            KvLimitError: anything else.
        """
        if size != self.max_bytes:
            raise KvLimitError(
                f"a KV limit of {size} bytes is refused: without kvcached the cache has"
                f" {self.max_bytes} bytes or, while the model is suspended, none"
            )
        return self.settle()

    def settle(self) -> KvState:
        """Where the limit stands."""
        held = self.held_bytes()
        return KvState("applied", self.limit_bytes, held, held)

    def held_bytes(self) -> int:
        """What may be occupied now."""
        return 0 if self._away else self.max_bytes

    def resident_bytes(self) -> int:
        """Device memory behind it now."""
        return self.held_bytes()

    def trim(self) -> None:
        """The weights have left: it goes too, if it may."""
        self._away = self._away or self._release()

    def restored(self) -> None:
        """It has come back with the weights, empty."""
        self._away = False


class ElasticKv:
    """A cache whose limit moves between one longest request and all the addresses reserved.

    While the weights are `away` it holds the pages that are in use; the limit comes back with them.
    """

    elastic = True
    away = False

    def __init__(self, core: Any, floor_blocks: int) -> None:
        self._core = core
        self._revision = 0
        # vLLM's tensors are no measure: kvcached lets them span addresses of the whole GPU.
        self.block_bytes = sum(_block_bytes(pool) for pool in _pools())
        # kvcached rounds a limit down to whole pages; a request must fit all the same.
        self.floor_bytes = sum(
            -(-floor_blocks // _blocks_per_page(pool)) * _bundle_bytes(pool) for pool in _pools()
        )
        self.max_bytes = sum(_capacity_bytes(pool) for pool in _pools())
        self.limit_bytes = self.max_bytes

    def set_limit(self, size: int) -> KvState:
        """Ask for a limit in bytes. Cached prefixes give way; blocks in use are waited for.

        Raises:
            KvLimitError: outside floor and ceiling, or kvcached would not.
        """
        if not self.floor_bytes <= size <= self.max_bytes:
            raise KvLimitError(
                f"a KV limit of {size} bytes is refused: it must be between {self.floor_bytes}"
                f" (one request of max_model_len) and {self.max_bytes}"
            )
        self._ask(size)
        self.limit_bytes = size
        return self.settle()

    def settle(self) -> KvState:
        """Where the limit stands, after what waits and can be freed has been freed."""
        if self.away:
            self.trim()
            return self._state()
        state = self._state()
        if state.status == "deferred":
            self._drain()
            state = self._state()
        while state.status == "deferred" and self._evict(state.held_bytes - state.limit_bytes):
            self._drain()
            state = self._state()
        return state

    def resident_bytes(self) -> int:
        """Device memory behind it now."""
        return self._state().mapped_bytes

    def held_bytes(self) -> int:
        """What may be occupied now: the limit, more while a shrink waits, what is mapped while the
        weights are away."""
        return self._state().held_bytes

    @property
    def limit_blocks(self) -> int:
        """Blocks that the limit has room for."""
        share = self.limit_bytes // len(_pools())
        return min(share // _bundle_bytes(pool) * _blocks_per_page(pool) for pool in _pools())

    @property
    def allocated_blocks(self) -> int:
        """Blocks of requests and of cached prefixes, the null block too."""
        return sum(int(pool.observability_snapshot().allocated_blocks) for pool in _pools())

    def trim(self) -> None:
        """The weights have left: give back cached prefixes, and what is held in reserve."""
        self._evict(self.max_bytes)
        self._drain()
        for pool in _pools():
            pool.trim()
        self.away = True

    def restored(self) -> None:
        """The weights are back: what the cache needs is mapped as it is used."""
        self.away = False

    def _ask(self, size: int) -> None:
        from kvcached.control import set_instance_memory_limit

        for _ in range(_TRIES):
            self._revision += 1
            try:
                answer = set_instance_memory_limit(size, revision=self._revision)
            except ValueError as error:  # a pool with quarantined pages says so by this
                raise KvLimitError(f"kvcached refused a limit of {size} bytes: {error}") from error
            status = answer["status"]
            if status in ("applied", "deferred"):
                return
            if status not in ("stale", "conflict"):
                break
            # Somebody else has set a limit here: ours comes after theirs.
            self._revision = max(int(pool["revision"]) for pool in answer["pools"])
        why = answer["reason"] or "it does not say why"
        raise KvLimitError(f"kvcached refused a limit of {size} bytes: {status}, {why}")

    def _state(self) -> KvState:
        states = [pool.memory_limit_state() for pool in _pools()]
        told = {state["status"] for state in states}
        mapped = sum(int(state["mapped_bytes"]) for state in states)
        return KvState(
            next((status for status in ("rejected", "deferred") if status in told), "applied"),
            self.limit_bytes,
            mapped if self.away else sum(map(_held_bytes, states)),
            mapped,
        )

    def _evict(self, size: int) -> int:
        """Evict cached prefixes worth `size` bytes, or what there is; the number of blocks."""
        pool = self._core.scheduler.kv_cache_manager.block_pool
        evict = getattr(pool, "_evict_blocks_from_pool", None)
        if evict is None:
            return 0
        block = min(_block_bytes(manager) for manager in _pools())
        return int(evict(max(1, -(-size // block))))

    def _drain(self) -> None:
        """Unmap what was freed, now: kvcached itself waits for the steps that may still read it."""
        for pool in _pools():
            pool.release_retired_pages_through(pool.capture_physical_release_marker())


def _pools() -> list[Any]:
    from kvcached.pool_registry import get_registered_kv_cache_pools

    pools: Iterable[tuple[Any, Any]] = get_registered_kv_cache_pools()
    return [pool for pool, _ in pools]


def _held_bytes(state: Mapping[str, Any]) -> int:
    effective = state["effective_limit_bytes"]
    if effective is None or state["status"] == "rejected":
        return int(state["current_capacity_bytes"])
    return max(int(effective), int(state["mapped_bytes"]))


def _bundle_bytes(pool: Any) -> int:
    return int(pool.page_size * pool.num_layers * pool.num_kv_buffers)


def _block_bytes(pool: Any) -> int:
    return int(pool.block_mem_size * pool.num_layers * pool.num_kv_buffers)


def _blocks_per_page(pool: Any) -> int:
    """Blocks that lie in one page: a block that straddles two is never used."""
    whole, rest = divmod(pool.page_size, pool.block_mem_size)
    return int(max(1, whole - bool(rest)))


def _capacity_bytes(pool: Any) -> int:
    return int(pool.mem_size * pool.num_layers * pool.num_kv_buffers)


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
