"""The prefix cache: what is found, what is shared, what goes first."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from maestro_backend.simulator._engine import Engine
from maestro_backend.simulator._prefixes import Prefixes
from maestro_backend.simulator._requests import Request
from maestro_backend.simulator._steps import StepCosts

COSTS = StepCosts(fixed_s=1.0, weights_s=1.0, context_s=0.0, token_s=1e-3)


@pytest.fixture
def engine() -> Engine:
    return Engine(COSTS, 100, 4, 8, 8192)


def call(
    name: str, prompt: int, output: int = 1, prefix: Hashable = None, shared: int = 1000
) -> Request:
    return Request(name, prompt, output, prefix=prefix, prefix_tokens=shared, leaves=name)


def passing(blocks: int) -> Request:
    """A call that fills so many blocks and leaves nothing."""
    return Request("passing", blocks * 4, 1)


def serve(engine: Engine, *requests: Request) -> None:
    now = engine.next_at() if engine.running else 1000.0 * engine._arrivals
    for request in requests:
        engine.add(request, now)
    while engine.running:
        engine.advance(engine.next_at())


def test_whole_blocks_of_prompt_and_answer_are_found(engine: Engine) -> None:
    serve(engine, call("a", 10, 5))  # 14 tokens in the cache: the last one's was never computed
    assert engine.cached_tokens("a") == 12
    follower = call("b", 40, prefix="a")
    serve(engine, follower)
    assert follower.cached_tokens == 12


@pytest.mark.parametrize(
    ("prompt", "shared", "cached"), [(40, 12, 12), (40, 11, 8), (12, 99, 8), (13, 99, 12)]
)
def test_a_hit_is_whole_blocks_and_leaves_a_token(
    engine: Engine, prompt: int, shared: int, cached: int
) -> None:
    serve(engine, call("a", 10, 5))
    follower = call("b", prompt, prefix="a", shared=shared)
    serve(engine, follower)
    assert follower.cached_tokens == cached


def test_siblings_share_the_blocks_of_their_parent(engine: Engine) -> None:
    serve(engine, call("parent", 40))
    siblings = [call(f"s{i}", 48, prefix="parent") for i in range(3)]
    for sibling in siblings:
        engine.add(sibling, 500.0)
    assert engine.blocks_in_use == 10 + 3 * 2
    while engine.running:
        engine.advance(engine.next_at())
    assert [sibling.cached_tokens for sibling in siblings] == [40, 40, 40]
    assert engine.cached_blocks == 10 + 3 * 2
    assert engine.blocks_in_use == 0


def test_one_after_the_other_shares_too(engine: Engine) -> None:
    serve(engine, call("parent", 40))
    for i in range(3):
        sibling = call(f"s{i}", 48, prefix="parent")
        serve(engine, sibling)
        assert sibling.cached_tokens == 40
    assert engine.cached_blocks == 10 + 3 * 2


def test_a_branch_holds_only_what_it_shares(engine: Engine) -> None:
    serve(engine, call("parent", 40))
    engine.add(call("branch", 48, prefix="parent", shared=8), 500.0)
    assert engine.blocks_in_use == 12
    assert engine.cached_blocks == 8


def test_the_end_of_the_least_recently_used_goes_first(engine: Engine) -> None:
    serve(engine, call("old", 40))
    serve(engine, call("new", 40))
    serve(engine, passing(88))
    # 80 blocks were free; 8 of the older's 10 had to go.
    assert engine.cached_tokens("old") == 2 * 4
    assert engine.cached_tokens("new") == 40


def test_a_use_makes_it_recent(engine: Engine) -> None:
    serve(engine, call("old", 40))
    serve(engine, call("new", 40))
    serve(engine, call("user", 41, prefix="old"))
    serve(engine, passing(88))
    assert engine.cached_tokens("old") == 40
    assert engine.cached_tokens("new") == 2 * 4


def test_what_is_left_of_a_beginning_is_found(engine: Engine) -> None:
    serve(engine, call("a", 40))
    serve(engine, call("b", 80, prefix="a"))
    serve(engine, passing(85))
    assert engine.cached_tokens("b") == 15 * 4
    serve(engine, passing(94))
    assert engine.cached_tokens("b") == engine.cached_tokens("a") == 6 * 4
    serve(engine, passing(100))
    assert engine.cached_tokens("b") == engine.cached_tokens("a") == 0


def test_pinned_entries_stay_until_their_time(engine: Engine) -> None:
    serve(engine, call("old", 40))
    engine.pin("old", 1e6)
    serve(engine, call("new", 40))
    serve(engine, passing(88))
    assert engine.cached_tokens("old") == 40
    engine.unpin("old")
    serve(engine, passing(96))
    # Still the older one.
    assert (engine.cached_tokens("old"), engine.cached_tokens("new")) == (8, 8)


def test_a_pin_can_come_before_its_entry(engine: Engine) -> None:
    engine.pin("a", 1e6)
    serve(engine, call("a", 40))
    assert (engine.blocks_in_use, engine.cached_blocks) == (10, 0)


def test_a_pins_end_admits_the_queue(engine: Engine) -> None:
    serve(engine, call("kept", 60 * 4))
    engine.pin("kept", 1020.5)
    engine.add(call("a", 4, 100), 1000.0)
    engine.add(call("b", 50 * 4), 1000.0)
    assert engine.waiting == 1
    while engine.waiting:
        now = engine.next_at()
        assert engine.advance(now) == []
    # Steps take 2 s, the first a little more for its prompt.
    assert now == pytest.approx(1022.0, abs=0.1)


def test_a_shrink_takes_cached_entries_and_pinned_ones_last(engine: Engine) -> None:
    serve(engine, call("old", 40))
    serve(engine, call("new", 40))
    engine.pin("old", 1e6)
    engine.set_blocks(12, 5000.0)
    assert engine.settled()
    assert (engine.cached_tokens("old"), engine.cached_tokens("new")) == (40, 8)
    engine.set_blocks(4, 5001.0)
    assert engine.settled()
    assert (engine.cached_tokens("old"), engine.cached_tokens("new")) == (16, 0)


def test_nothing_is_left_when_the_weights_go(engine: Engine) -> None:
    serve(engine, call("a", 40), call("b", 40))
    engine.pin("a", 1e6)
    engine.clear_cache()
    assert engine.blocks_in_use == engine.cached_blocks == engine.cached_tokens("a") == 0


def test_keys_of_evicted_entries_are_forgotten() -> None:
    cache = Prefixes()
    for i in range(1000):
        parent = cache.take(i - 1, 10**6)
        cache.leave(i, parent.depth + 2 if parent and i % 10 else 2, parent if i % 10 else None)
        if parent is not None:
            cache.release(parent)
        cache.evict(max(0, cache.total - 100))
    assert cache.total == 100
    assert cache.held == 0
    assert len(cache._entries) <= 70
