"""Weights off a GPU and on again, on a fake GPU: what is copied when, what a failure leaves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from node.gpus import FakeGpu

from maestro_backend.workers.vllm_plugin._pinned import HostBudgetError, PinnedWeights

WEIGHTS = (b"embedding" * 20, b"layer one" * 30, b"layer two" * 30, b"head" * 10)
SIZE = sum(map(len, WEIGHTS))


@pytest.fixture
def gpu() -> FakeGpu:
    """Four weights, and a KV cache that is no weight."""
    gpu = FakeGpu()
    for content in WEIGHTS:
        gpu.allocate("weights", content)
    gpu.allocate("kv_cache", b"prefix" * 50)
    return gpu


@pytest.fixture
def weights(gpu: FakeGpu) -> PinnedWeights:
    return PinnedWeights(gpu.pointer_to_data, gpu)


def suspend(weights: PinnedWeights) -> int:
    weights.keep_copy()
    return weights.unmap(("weights",))


def test_weights_leave_and_come_back_and_the_kv_cache_stays(
    gpu: FakeGpu, weights: PinnedWeights
) -> None:
    before, kv, used = gpu.contents(), gpu.contents("kv_cache"), gpu.used
    assert suspend(weights) == SIZE == used - gpu.used
    assert weights.weights_away
    assert gpu.contents() == {}
    assert gpu.contents("kv_cache") == kv
    weights.remap(["weights"])
    assert not weights.away
    assert gpu.contents() == before
    assert gpu.contents("kv_cache") == kv
    assert gpu.used == used


def test_only_the_first_suspend_copies(gpu: FakeGpu, weights: PinnedWeights) -> None:
    before = gpu.contents()
    suspend(weights)
    assert sum(size for *_, size in gpu.copies) == SIZE
    for _ in range(3):
        weights.remap()
        gpu.copies.clear()
        assert suspend(weights) == SIZE
        assert gpu.copies == []
    weights.remap()
    assert gpu.contents() == before
    assert weights.host_bytes == gpu.pinned_bytes == SIZE


def test_a_dropped_copy_is_made_again_of_what_is_there_then(
    gpu: FakeGpu, weights: PinnedWeights
) -> None:
    suspend(weights)
    weights.remap()
    first = next(iter(gpu.pointer_to_data))
    gpu.write(first, b"NEW")
    weights.drop_copy()
    assert gpu.pinned_bytes == 0
    before = gpu.contents()
    suspend(weights)
    weights.remap()
    assert gpu.contents() == before


@pytest.mark.parametrize("change", ["grow", "shrink", "replace"])
def test_other_allocations_make_another_copy(
    gpu: FakeGpu, weights: PinnedWeights, change: str
) -> None:
    suspend(weights)
    weights.remap()
    if change != "grow":
        gpu.free(next(iter(gpu.pointer_to_data)))
    if change != "shrink":
        gpu.allocate("weights", b"adapter" * 9)
    before = gpu.contents()
    suspend(weights)
    weights.remap()
    assert gpu.contents() == before
    assert weights.host_bytes == gpu.pinned_bytes == sum(map(len, before.values()))


def test_an_address_that_is_used_again_is_not_taken_for_the_old_one(
    gpu: FakeGpu, weights: PinnedWeights
) -> None:
    suspend(weights)
    weights.remap()
    first = next(iter(gpu.pointer_to_data))
    old = gpu.pointer_to_data[first]
    gpu.pointer_to_data[first] = type(old)(old.handle, old.tag)
    assert not weights.copy_is_whole


def test_a_copy_over_the_budget_is_refused_and_the_model_runs_on(
    gpu: FakeGpu, weights: PinnedWeights
) -> None:
    weights.set_budget(SIZE - 1)
    before = gpu.contents()
    with pytest.raises(HostBudgetError, match=rf"{SIZE} bytes .* {SIZE - 1} are granted"):
        weights.keep_copy()
    assert (gpu.contents(), gpu.pinned_bytes, weights.away) == (before, 0, False)
    weights.set_budget(SIZE)
    weights.keep_copy()
    assert gpu.pinned_bytes == SIZE


def test_a_smaller_budget_drops_a_copy_that_is_not_needed(
    gpu: FakeGpu, weights: PinnedWeights
) -> None:
    weights.keep_copy()
    weights.set_budget(SIZE - 1)
    assert gpu.pinned_bytes == 0


def test_a_smaller_budget_never_loses_weights_that_are_away(
    gpu: FakeGpu, weights: PinnedWeights
) -> None:
    before = gpu.contents()
    suspend(weights)
    with pytest.raises(HostBudgetError):
        weights.set_budget(SIZE - 1)
    weights.remap()
    assert gpu.contents() == before


@pytest.mark.parametrize("failure", ["pin", "copy"])
def test_a_copy_that_fails_leaves_everything_as_it_was(
    gpu: FakeGpu, weights: PinnedWeights, failure: str
) -> None:
    before = gpu.contents()
    if failure == "pin":
        gpu.host = SIZE - 1
    else:
        gpu.fail["copy"] = 3
    with pytest.raises(MemoryError if failure == "pin" else RuntimeError):
        weights.keep_copy()
    assert (gpu.contents(), gpu.pinned_bytes, weights.host_bytes) == (before, 0, 0)


@pytest.mark.parametrize(
    ("what", "nth"), [(what, n) for what in ("map", "copy") for n in range(1, 5)]
)
def test_a_failed_return_is_rolled_back_and_can_be_tried_again(
    gpu: FakeGpu, weights: PinnedWeights, what: str, nth: int
) -> None:
    before, kv = gpu.contents(), gpu.contents("kv_cache")
    suspend(weights)
    away = dict(gpu.mapped)
    gpu.fail[what] = nth
    with pytest.raises(RuntimeError, match="CUD"):
        weights.remap(["weights"])
    assert gpu.mapped == away
    assert weights.weights_away
    assert all(d.is_asleep for d in gpu.pointer_to_data.values() if d.tag == "weights")
    weights.remap(["weights"])
    assert (gpu.contents(), gpu.contents("kv_cache")) == (before, kv)


def test_no_room_for_all_of_it_takes_none_of_it(gpu: FakeGpu, weights: PinnedWeights) -> None:
    before = gpu.contents()
    suspend(weights)
    gpu.capacity = gpu.used + SIZE - 1
    with pytest.raises(RuntimeError, match="out of memory"):
        weights.remap()
    assert gpu.used == gpu.capacity - (SIZE - 1)
    gpu.capacity += 1
    weights.remap()
    assert gpu.contents() == before


def test_a_suspend_that_fails_half_way_can_be_brought_back(
    gpu: FakeGpu, weights: PinnedWeights
) -> None:
    before = gpu.contents()
    weights.keep_copy()
    gpu.fail["unmap"] = 3
    with pytest.raises(RuntimeError, match="illegal memory access"):
        weights.unmap(("weights",))
    assert weights.weights_away
    weights.remap()
    assert gpu.contents() == before


def test_the_kv_cache_leaves_when_asked_and_comes_back_empty(
    gpu: FakeGpu, weights: PinnedWeights
) -> None:
    before = gpu.contents()
    weights.keep_copy()
    weights.unmap(("weights", "kv_cache"))
    assert gpu.used == 0
    weights.remap(["weights"])
    assert gpu.contents() == before
    assert weights.away
    assert not weights.weights_away
    weights.remap(["kv_cache"])
    assert not weights.away


def test_what_the_copy_says_of_an_address(gpu: FakeGpu, weights: PinnedWeights) -> None:
    first = next(iter(gpu.pointer_to_data))
    assert weights.read(first, 4) is None
    suspend(weights)
    assert weights.read(first + 2, 6) == b"beddin"
    assert weights.read(first, len(WEIGHTS[0]) + 1) is None


class Life(RuleBasedStateMachine):
    """Any order of moves, failures and writes: no byte is lost, no memory leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.gpu = FakeGpu(capacity=2000, host=1500)
        for content in WEIGHTS:
            self.gpu.allocate("weights", content)
        self.gpu.allocate("kv_cache", b"kv" * 50)
        self.weights = PinnedWeights(self.gpu.pointer_to_data, self.gpu)
        self.model = self.gpu.contents()
        self.budget: int | None = None
        self.parked = False

    @rule(fail=st.sampled_from([{}, {"copy": 1}, {"copy": 4}]))
    @precondition(lambda self: not self.weights.weights_away)
    def to_host(self, fail: dict[str, int]) -> None:
        current = self.weights.copy_is_whole
        self.gpu.copies.clear()
        self.gpu.fail = dict(fail)
        try:
            self.weights.keep_copy()
        except (MemoryError, RuntimeError):
            assert not current, "a repeated suspend neither copies nor allocates"
            return
        finally:
            self.gpu.fail = {}
        assert not current or self.gpu.copies == []
        self.weights.unmap(("weights",))

    @rule()
    @precondition(lambda self: not self.weights.weights_away)
    def park(self) -> None:
        self.weights.unmap(("weights",))
        self.weights.drop_copy()
        self.parked = True

    @rule(fail=st.sampled_from([{}, {"map": 1}, {"map": 4}, {"copy": 2}]), room=st.booleans())
    def resume(self, fail: dict[str, int], room: bool) -> None:
        away = self.weights.weights_away
        self.gpu.capacity = 2000 if room else self.gpu.used + SIZE - 1
        self.gpu.fail = dict(fail)
        try:
            self.weights.remap(["weights"])
        except RuntimeError:
            assert away and self.weights.weights_away
            return
        finally:
            self.gpu.fail, self.gpu.capacity = {}, 2000
        assert not self.weights.weights_away
        if self.parked:  # as `reload_weights` does
            for pointer, content in self.model.items():
                self.gpu.write(pointer, content)
            self.parked = False

    @rule(content=st.binary(min_size=1, max_size=40))
    @precondition(lambda self: not self.weights.weights_away)
    def train(self, content: bytes) -> None:
        self.gpu.write(next(iter(self.model)), content)
        self.model = self.gpu.contents()
        self.weights.drop_copy()

    @rule(size=st.sampled_from([None, 0, SIZE - 1, SIZE, 10 * SIZE]))
    def grant(self, size: int | None) -> None:
        try:
            self.weights.set_budget(size)
        except HostBudgetError:
            assert self.weights.weights_away
            return
        self.budget = size

    @invariant()
    def nothing_is_lost(self) -> None:
        if not self.weights.weights_away:
            assert self.gpu.contents() == self.model
        assert self.gpu.contents("kv_cache") != {}

    @invariant()
    def nothing_leaks(self) -> None:
        awake = [d for d in self.gpu.pointer_to_data.values() if not d.is_asleep]
        assert self.gpu.used == sum(data.handle[1] for data in awake)
        assert self.gpu.pinned_bytes == self.weights.host_bytes
        assert self.budget is None or self.weights.host_bytes <= self.budget


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLife: Any = Life.TestCase
