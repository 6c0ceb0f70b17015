"""The weights of a GPU worker in their tiers: real code of ours on a fake GPU and a fake vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from node.fake_vllm import (
    LAYER,
    SCALES,
    FakeVllm,
    GpuWeights,
    OldWorker,
    Worker,
    fake_vllm,
    register,
    worker_of,
)

torch = pytest.importorskip("torch", reason="torch comes with the engine (make setup)")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    yield from fake_vllm(monkeypatch)


@pytest.fixture
def worker(vllm: FakeVllm) -> Worker:
    return worker_of(vllm)


@pytest.fixture
def weights(worker: Worker) -> Any:
    return GpuWeights(worker)


SIZE = len(LAYER) + len(SCALES)


def test_host_and_back(vllm: FakeVllm, worker: Worker, weights: Any) -> None:
    before = vllm.gpu.contents()
    assert weights.tiers == ("device", "host", "parked")
    assert (weights.device_bytes, weights.host_copy_bytes, weights.host_bytes) == (SIZE, SIZE, 0)
    weights.keep_copy(SIZE)
    assert weights.suspend() == SIZE
    assert not weights.on_device
    assert weights.suspend() == 0
    weights.resume()
    assert weights.on_device
    assert vllm.gpu.contents() == before
    assert worker.reloads == 0
    assert weights.host_bytes == SIZE


def test_the_backend_is_had_of_an_older_worker_too(vllm: FakeVllm) -> None:
    weights = GpuWeights(OldWorker(vllm))
    assert weights.tiers == ("device", "host", "parked")


def test_a_model_with_a_draft_model_is_never_parked(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    before = vllm.gpu.contents()
    worker.draft = torch.nn.Module()
    assert weights.tiers == ("device", "host")
    for copied in (False, True):
        if copied:
            weights.keep_copy(None)
            weights.suspend()
        with pytest.raises(RuntimeError, match="cannot reload a draft model"):
            weights.drop_copy() if copied else weights.suspend()
        weights.resume()
        assert weights.on_device and vllm.gpu.contents() == before


@pytest.mark.parametrize("copied", [True, False])
def test_what_vllm_keeps_beside_the_kv_cache_is_made_anew(
    vllm: FakeVllm, worker: Worker, weights: Any, copied: bool
) -> None:
    """vLLM 0.26 has tables of pointers in the cache's memory and a method that renews them."""
    before, _ = vllm.gpu.contents(), vllm.gpu.allocate("kv_cache", b"kv" * 50)
    renewed = []

    def renew() -> None:
        renewed.append(vllm.gpu.used)
        if len(renewed) == 1:
            raise RuntimeError("out of memory")

    worker.model_runner.post_kv_cache_wake_up = renew
    if copied:
        weights.keep_copy(None)
    weights.suspend()
    weights.resume()
    assert renewed == [], "the cache has not been away"
    weights.suspend()
    weights.release_kv()
    with pytest.raises(RuntimeError, match="out of memory"):
        weights.resume()
    assert (weights.on_device, vllm.gpu.used) == (False, 0)
    weights.resume()
    assert renewed == [SIZE + 100, SIZE + 100]
    assert vllm.gpu.contents().items() >= before.items()
    weights.suspend()
    weights.resume()
    assert len(renewed) == 2


def test_parked_weights_are_reloaded_and_buffers_survive(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    before = vllm.gpu.contents()
    assert weights.suspend() == SIZE
    assert (vllm.gpu.used, vllm.gpu.pinned_bytes) == (0, 0)
    weights.resume()
    assert worker.reloads == 1
    assert vllm.gpu.contents() == before
    weights.suspend()
    weights.resume()
    assert (worker.reloads, vllm.gpu.contents()) == (2, before)


@pytest.mark.parametrize("first", ["host", "device"])
def test_dropping_the_copy_parks(vllm: FakeVllm, worker: Worker, weights: Any, first: str) -> None:
    before = vllm.gpu.contents()
    weights.keep_copy(None)
    if first == "host":  # the device may hold another model by now: buffers come from the copy
        weights.suspend()
        weights.resume()
    weights.suspend()
    weights.drop_copy()
    weights.drop_copy()
    assert vllm.gpu.pinned_bytes == 0
    with pytest.raises(MemoryError, match="resume them first"):
        weights.keep_copy(None)
    weights.resume()
    assert (worker.reloads, vllm.gpu.contents()) == (1, before)
    weights.keep_copy(None)


def test_a_model_without_buffers_is_reloaded_too(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    worker.model = torch.nn.Module()
    weights.suspend()
    weights.resume()
    assert worker.reloads == 1


def test_a_failed_reload_is_parked_again(vllm: FakeVllm, worker: Worker, weights: Any) -> None:
    before = vllm.gpu.contents()
    weights.suspend()
    worker.fail_reload = True
    with pytest.raises(OSError, match="disk is gone"):
        weights.resume()
    assert not weights.on_device
    assert vllm.gpu.used == 0
    assert vllm.abandoned == [SIZE]
    worker.fail_reload = False
    weights.resume()
    assert vllm.gpu.contents() == before


@pytest.mark.parametrize("copied", [True, False])
def test_the_kv_cache_leaves_after_the_weights_and_comes_back_with_them(
    vllm: FakeVllm, worker: Worker, weights: Any, copied: bool
) -> None:
    before, kv = vllm.gpu.contents(), vllm.gpu.allocate("kv_cache", b"kv" * 50)
    assert weights.takes_kv_along and weights.release_kv() == 0, "the model needs it"
    if copied:
        weights.keep_copy(None)
    weights.suspend()
    assert [weights.release_kv(), weights.release_kv(), vllm.gpu.used] == [100, 0, 0]
    vllm.gpu.fail["map"] = 3  # the cache is the last
    worker.fail_reload = not copied
    for words in ("out of memory",) if copied else ("out of memory", "disk is gone"):
        with pytest.raises((RuntimeError, OSError), match=words):
            weights.resume()
        assert vllm.gpu.used == 0
    worker.fail_reload = False
    weights.resume()
    assert vllm.gpu.contents() == before and kv in vllm.gpu.mapped
    weights.suspend()
    assert vllm.gpu.used == 100, "it leaves only when asked for"


def test_a_failed_return_stays_where_it_was(vllm: FakeVllm, weights: Any) -> None:
    before = vllm.gpu.contents()
    weights.keep_copy(None)
    weights.suspend()
    vllm.gpu.fail["map"] = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        weights.resume()
    assert not weights.on_device
    weights.resume()
    assert vllm.gpu.contents() == before


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_suspend_that_fails_brings_everything_back(
    vllm: FakeVllm, weights: Any, copied: bool, nth: int
) -> None:
    before = vllm.gpu.contents()
    if copied:
        weights.keep_copy(None)
    vllm.gpu.fail["unmap"] = nth
    with pytest.raises(RuntimeError, match="illegal memory access"):
        weights.suspend()
    assert weights.on_device
    assert vllm.gpu.contents() == before
    assert weights.suspend() == SIZE


def test_over_the_budget_nothing_moves(vllm: FakeVllm, weights: Any) -> None:
    with pytest.raises(MemoryError, match="granted"):
        weights.keep_copy(SIZE - 1)
    assert weights.on_device
    assert (vllm.gpu.used, vllm.gpu.pinned_bytes) == (SIZE, 0)


def test_new_weights_make_the_copy_stale(vllm: FakeVllm, worker: Worker, weights: Any) -> None:
    weights.keep_copy(None)
    worker.update_weights(b"trained")
    assert weights.host_bytes == vllm.gpu.pinned_bytes == 0
    before = vllm.gpu.contents()
    weights.keep_copy(None)
    weights.suspend()
    weights.resume()
    assert vllm.gpu.contents() == before


def test_a_write_that_cannot_be_does_not_cost_the_only_copy(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    before = vllm.gpu.contents()
    weights.keep_copy(None)
    weights.suspend()
    with pytest.raises(AssertionError, match="without memory"):
        worker.update_weights(b"trained")
    weights.resume()
    assert vllm.gpu.contents() == before


@pytest.mark.parametrize("changing", [{"lora": object()}, {"eplb": True}])
def test_weights_that_change_by_themselves_are_copied_every_time(
    vllm: FakeVllm, changing: dict[str, Any]
) -> None:
    worker = worker_of(vllm, **changing)
    weights = GpuWeights(worker)
    weights.keep_copy(None)
    weights.suspend()
    assert weights.host_bytes == SIZE
    weights.resume()
    assert vllm.gpu.pinned_bytes == 0


def test_without_sleep_mode_the_weights_cannot_leave(vllm: FakeVllm) -> None:
    register()
    worker = worker_of(vllm)
    for data in vllm.gpu.pointer_to_data.values():
        data.tag = "default"
    weights = GpuWeights(worker)
    assert weights.tiers == ("device",)
    with pytest.raises(RuntimeError, match="--enable-sleep-mode"):
        weights.suspend()


@pytest.mark.parametrize("copied", [True, False])
def test_a_suspend_that_fails_before_anything_left_changes_nothing(
    vllm: FakeVllm, worker: Worker, weights: Any, copied: bool
) -> None:
    """Good weights are not loaded again: their file may be gone."""
    before = vllm.gpu.contents()
    if copied:
        weights.keep_copy(None)
    vllm.gpu.fail["synchronize"] = 1
    with pytest.raises(RuntimeError, match="illegal"):
        weights.suspend()
    assert weights.on_device and worker.reloads == 0
    assert vllm.gpu.contents() == before
    weights.suspend()
    weights.resume()
    assert (worker.reloads, vllm.gpu.contents()) == (0 if copied else 1, before)


def test_a_checksum_tells_changed_and_swapped_weights(
    vllm: FakeVllm, worker: Worker, weights: Any
) -> None:
    told = weights.checksum()
    assert told == weights.checksum()
    weights.suspend()
    with pytest.raises(RuntimeError, match="not on the device"):
        weights.checksum()
    weights.resume()
    assert weights.checksum() == told
    seen = {told}
    for change in (SCALES[1:] + SCALES[:1], bytes([*SCALES[2:4], *SCALES[:2], *SCALES[4:]])):
        vllm.gpu.write(worker.scales, change)
        seen.add(weights.checksum())
    assert len(seen) == 3
