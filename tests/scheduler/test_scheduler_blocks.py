"""What calls hold of a worker's KV cache is whole blocks, bounded as its layers are."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from scheduler.scenes import MOST, arrival, dispatched, node, scheduler, tiered, worker

from maestro_backend.scheduler import (
    CallFinished,
    CallPredicted,
    CallProgress,
    ForecastCall,
    ForecastChanged,
    KeepPrefix,
    KvGeometry,
    KvGroup,
    Length,
    NodeJoined,
    Scheduler,
    decode_event,
    encode,
    one_group,
)

ONE = one_group(32, 16)
WINDOWED = KvGeometry(10, (KvGroup(16), KvGroup(16, 3), KvGroup(16, 3)))
"""One group that looks back over everything, two that hold three blocks at most."""

geometries = st.builds(
    KvGeometry,
    st.integers(1, 10**9),
    st.lists(
        st.builds(KvGroup, st.integers(1, 512), st.none() | st.integers(1, 9)), min_size=1
    ).map(tuple),
)


def reserved(core: Scheduler) -> dict[str, int]:
    return dict(core.ledger.claims["n/m"].reservations)


def test_a_request_holds_whole_blocks() -> None:
    assert [ONE.blocks(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert ONE.bytes_of(17) == 64
    assert (ONE.token_bytes, WINDOWED.token_bytes) == (2, 2)  # 30/16 rounded up


def test_layers_with_a_window_stop_to_grow() -> None:
    assert [WINDOWED.blocks(tokens) for tokens in (16, 48, 49, 480)] == [3, 9, 10, 36]
    assert WINDOWED.kept_bytes_of(95) == 3 * 5 * 10, "full blocks, also those behind the window"


@given(geometries, st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_tokens_never_hold_less(geometry: KvGeometry, some: int, more: int) -> None:
    assert geometry.blocks(some) <= geometry.blocks(some + more)
    assert geometry.bytes_of(some) % geometry.block_bytes == 0
    assert geometry.kept_bytes_of(some) <= geometry.kept_bytes_of(some + more)


def test_a_reservation_is_in_blocks_and_never_more_than_the_worker_can_have() -> None:
    core = scheduler(tiered(kv=MOST, kv_geometry=ONE))
    core.handle(arrival("a", kv=17), 1.0)
    core.handle(arrival("b", kv=16), 1.0)
    assert reserved(core) == {"a": 64, "b": 32}
    core = scheduler(tiered(kv=MOST, kv_geometry=ONE))
    assert dispatched(core.handle(arrival("a", kv=10 * MOST), 1.0)) == ["a"]
    assert reserved(core) == {"a": MOST}


def test_a_reservation_is_bounded_by_the_window() -> None:
    core = scheduler(tiered(kv=MOST, kv_geometry=WINDOWED))
    core.handle(arrival("a", kv=480), 1.0)
    assert reserved(core) == {"a": 360}
    core.handle(arrival("b", kv=16), 1.0)
    core.handle(CallProgress("b", 40, 60), 2.0)
    assert reserved(core) == {"a": 360, "b": 130}, "it grew as its blocks did"
    core.validate()


def test_a_kept_prefix_counts_its_full_blocks() -> None:
    core = scheduler(tiered(kv=MOST, kv_geometry=ONE))
    again = ForecastCall("s", "", "m", 0.9, 0.0, 10, Length(8, 16), 1.0)
    core.handle(arrival("a", kv=50), 1.0)
    core.handle(ForecastChanged("r", (again,)), 1.0)
    commands = core.handle(CallFinished("a", 40, 10), 2.0)
    assert [c.call for c in commands if isinstance(c, KeepPrefix)] == ["a"]
    assert core.ledger.claims["n/m"].kv_kept == 3 * 32
    core.validate()


def test_geometry_travels_in_recordings_and_older_ones_have_none() -> None:
    event = NodeJoined(node(tiered(kv_geometry=WINDOWED)))
    written = json.loads(json.dumps(encode(event)))
    assert decode_event(written) == event
    del written["info"]["workers"][0]["kv_geometry"]
    assert decode_event(written) == NodeJoined(node(tiered()))


def test_each_choice_holds_blocks_of_its_own() -> None:
    """Eight choices of 4,000 tokens on a prompt of 1,000, of 8,192 tokens at most each."""
    geometry = KvGeometry(1, (KvGroup(16, 512),))
    assert geometry.blocks(1000 + 8 * 4000, 8) >= 2063
    assert geometry.blocks(100_000) == 512
    assert geometry.blocks(10**6, 8) == 8 * 512


def test_a_better_prediction_raises_the_reservation_of_a_running_call() -> None:
    world = scheduler(worker())
    world.handle(arrival("c", kv=100), 1.0)
    claim = world.ledger.claims["n/m"]
    held = claim.reservations["c"]
    world.handle(CallPredicted("c", Length(50, 200), 250, 1.0), 1.1)
    assert claim.reservations["c"] == 250 > held
    world.handle(CallPredicted("c", Length(5, 10), 20, 1.0), 1.2)
    assert claim.reservations["c"] == 250, "it never shrinks"
    world.validate()
