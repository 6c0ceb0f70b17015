"""Elastic KV limits, the order of measures in a shortage, preemption, kept prefixes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler.scenes import (
    ALIVE,
    FLOOR,
    MOST,
    arrival,
    dispatched,
    scheduler,
    tiered,
)

from maestro_backend.scheduler import (
    CallFinished,
    CallProgress,
    Command,
    CommandApplied,
    CommandFailed,
    DropPrefix,
    ForecastCall,
    ForecastChanged,
    InvariantError,
    KeepPrefix,
    Length,
    MemoryMeasured,
    NodeLost,
    Preempt,
    RunEnded,
    RunStarted,
    Scheduler,
    SetKvLimit,
    Settings,
    Tick,
    WorkerChanged,
    WorkerInfo,
)

STEP = MOST // 8


def again(model: str = "m", p: float = 0.9, start: float = 0.0, run: str = "r") -> ForecastChanged:
    call = ForecastCall("s", "", model, p, start, 10, Length(8, 16), 1.0)
    return ForecastChanged(run, (call,))


def limits(commands: list[Command]) -> list[tuple[str, int]]:
    return [(c.worker, c.limit_bytes) for c in commands if isinstance(c, SetKvLimit)]


def obeyed(core: Scheduler, command: Command, info: WorkerInfo, now: float) -> list[Command]:
    assert isinstance(command, SetKvLimit)
    info = replace(info, kv_limit_bytes=command.limit_bytes)
    commands = core.handle(WorkerChanged(info), now)
    commands += core.handle(CommandApplied(command.id), now)
    core.validate()
    return commands


# --- limits -------------------------------------------------------------------------------------


def test_a_limit_grows_in_steps_for_the_call_that_needs_it() -> None:
    core = scheduler(tiered(kv=FLOOR))
    [grow] = core.handle(arrival("a", kv=FLOOR + 50), 1.0)
    assert limits([grow]) == [("n/m", 2 * STEP)]
    assert core.ledger.claims["n/m"].kv_limit == 2 * STEP, "promised before it is so"
    assert core.ledger.claims["n/m"].kv_usable == FLOOR, "and not used before"
    assert dispatched(obeyed(core, grow, tiered(), 2.0)) == ["a"]
    assert dispatched(core.handle(arrival("b", kv=50), 3.0)) == ["b"], "no growth for every call"


def test_a_limit_grows_before_a_running_call_outgrows_it() -> None:
    core = scheduler(tiered(kv=2 * STEP))
    core.handle(arrival("a", kv=STEP), 1.0)
    assert core.handle(CallProgress("a", 50, 10), 2.0) == []
    [grow] = core.handle(CallProgress("a", 50, 2 * STEP - 50), 3.0)
    assert limits([grow]) == [("n/m", 3 * STEP)]
    assert core.handle(CallProgress("a", 50, 2 * STEP - 50), 3.1) == [], "asked once"
    obeyed(core, grow, tiered(), 4.0)
    core.handle(CallProgress("a", 50, 2 * STEP), 5.0)
    assert core.ledger.claims["n/m"].reservations == {"a": 2 * STEP + 50}


def test_a_limit_never_grows_beyond_what_was_built_or_what_is_free() -> None:
    core = scheduler(tiered(kv=FLOOR), capacity=ALIVE + 130)
    assert limits(core.handle(arrival("a", kv=FLOOR + 110), 1.0)) == [("n/m", FLOOR + 130)]
    core = scheduler(tiered(kv=MOST), capacity=10 * ALIVE)
    core.handle(arrival("a", kv=10 * MOST), 1.0)
    assert core.handle(CallProgress("a", 10 * MOST, 0), 2.0) == []


def test_a_growth_that_fails_lets_the_call_run_alone_with_what_there_is() -> None:
    core = scheduler(tiered(kv=FLOOR))
    [grow] = core.handle(arrival("a", kv=MOST), 1.0)
    assert dispatched(core.handle(CommandFailed(grow.id, "no"), 2.0)) == ["a"]
    core.validate()


def test_a_shrink_that_waits_for_blocks_holds_its_bytes_and_is_asked_once() -> None:
    idle, busy = tiered("a", kv=MOST), tiered("b", kv=FLOOR)
    core = scheduler(idle, busy, capacity=2 * ALIVE + MOST - FLOOR)
    [shrink] = core.handle(arrival("x", model="b", kv=2 * FLOOR), 1.0)
    assert limits([shrink]) == [("n/a", FLOOR)]
    assert core.handle(CommandApplied(shrink.id), 2.0) == []
    assert core.ledger.free("n/cpu") == 0
    core.validate()
    [grow] = core.handle(WorkerChanged(replace(idle, kv_limit_bytes=FLOOR)), 3.0)
    assert limits([grow]) == [("n/b", 2 * STEP)]
    core.validate()


def test_validate_notices_a_limit_below_what_is_held() -> None:
    core = scheduler(tiered(kv=MOST))
    core.handle(arrival("a", kv=500), 1.0)
    core.ledger.claims["n/m"].kv_usable = 499
    with pytest.raises(InvariantError, match="499"):
        core.validate()


# --- the order of measures ----------------------------------------------------------------------


def test_idle_kv_goes_before_that_of_the_busy_and_delay_comes_last() -> None:
    idle, busy, mine = tiered("a", kv=2 * STEP), tiered("b", kv=MOST), tiered("c")
    core = scheduler(idle, busy, mine, capacity=3 * ALIVE + STEP + MOST - FLOOR)
    core.handle(arrival("x", model="b", kv=STEP), 0.5)
    [shrink] = core.handle(arrival("y", model="c", kv=2 * STEP), 1.0)
    assert limits([shrink]) == [("n/a", FLOOR)]
    [grow] = obeyed(core, shrink, idle, 2.0)
    assert core.handle(arrival("z", model="c", kv=2 * STEP), 3.0) == []
    commands = obeyed(core, grow, mine, 4.0)
    assert dispatched(commands) == ["y"]
    assert limits(commands) == [("n/b", 2 * STEP)], "a step above what is in use"
    assert (core.counts["prefix_eviction"], core.counts["delay"]) == (1, 2)


def full(rule: str = "maestro", **settings: float) -> Scheduler:
    """A worker whose KV is full with a long call that has just begun and comes too late anyway,
    and a short one waiting."""
    chosen = replace(Settings(preempt_patience_s=10), **settings)  # type: ignore[arg-type]
    core = scheduler(tiered(kv=MOST), rule=rule, settings=chosen)
    core.handle(RunStarted("r1", deadline_s=20.0), 0.5)
    core.handle(arrival("long", "r1", kv=MOST, service_s=500.0), 1.0)
    assert core.handle(arrival("short", "r2", kv=100, service_s=1.0), 2.0) == []
    return core


def test_a_less_urgent_call_gives_way_after_a_while_and_keeps_its_place() -> None:
    core = full()
    assert core.handle(Tick(), 11.9) == []
    [preempt] = core.handle(Tick(), 12.0)
    assert isinstance(preempt, Preempt) and (preempt.call, preempt.worker) == ("long", "n/m")
    assert core.handle(Tick(), 12.1) == [], "asked once"
    core.validate()
    assert dispatched(core.handle(CommandApplied(preempt.id), 12.2)) == ["short"]
    core.validate()
    assert dispatched(core.handle(CallFinished("short"), 13.0)) == ["long"]
    assert core.calls.by_id["long"].attempts == 1, "the try that was taken back does not count"


def test_first_come_first_served_takes_nothing_from_a_call_that_came_before() -> None:
    core = full("fcfs")
    assert core.handle(Tick(), 1000.0) == []


def test_a_call_is_not_taken_off_its_worker_again_and_again() -> None:
    core = full(max_preemptions=1)
    [preempt] = core.handle(Tick(), 12.0)
    core.handle(CommandApplied(preempt.id), 12.2)
    assert dispatched(core.handle(CallFinished("short"), 13.0)) == ["long"]
    core.handle(arrival("short2", "r3", kv=100, service_s=1.0), 15.0)
    assert core.handle(Tick(), 30.0) == []


def test_a_call_whose_client_has_seen_a_byte_stays_and_the_next_least_urgent_goes() -> None:
    core = scheduler(tiered(kv=MOST), rule="maestro", settings=Settings(preempt_patience_s=10))
    for run in ("r1", "r2"):
        core.handle(RunStarted(run, deadline_s=20.0), 0.5)
    core.handle(arrival("a", "r1", kv=MOST // 2, service_s=500.0), 1.0)
    core.handle(arrival("b", "r2", kv=MOST // 2, service_s=400.0), 1.0)
    core.handle(arrival("short", "r3", kv=100, service_s=1.0), 2.0)
    [first] = core.handle(Tick(), 12.0)
    assert isinstance(first, Preempt) and first.call == "a"
    [second] = core.handle(CommandFailed(first.id, "streaming"), 12.1)
    assert isinstance(second, Preempt) and second.call == "b"


def test_a_call_that_ended_before_it_could_be_taken_back_is_over() -> None:
    core = full()
    [preempt] = core.handle(Tick(), 12.0)
    assert dispatched(core.handle(CallFinished("long"), 12.1)) == ["short"]
    assert core.handle(CommandApplied(preempt.id), 12.2) == []
    core.validate()


# --- kept prefixes ------------------------------------------------------------------------------


def kept(kv: int = MOST, **settings: float) -> tuple[Scheduler, list[Command]]:
    """A call of a run that will call the model again has just ended, after 150 tokens."""
    core = scheduler(tiered(kv=kv), settings=replace(Settings(), **settings))  # type: ignore[arg-type]
    core.handle(arrival("a", kv=FLOOR), 1.0)
    core.handle(again(start=20.0), 2.0)
    return core, core.handle(CallFinished("a", 140, 10), 3.0)


def test_a_prefix_is_kept_for_a_call_that_will_likely_come() -> None:
    core, [keep] = kept(keep_grace_s=60)
    assert isinstance(keep, KeepPrefix) and (keep.worker, keep.call) == ("n/m", "a")
    assert keep.seconds == pytest.approx(19 + 60)
    assert core.ledger.claims["n/m"].kv_free == MOST - 150
    core.validate()


@pytest.mark.parametrize("change", [again(p=0.4), again("other"), again(start=1e4)])
def test_it_is_dropped_when_the_forecast_changes(change: ForecastChanged) -> None:
    core, _ = kept()
    [drop] = core.handle(change, 4.0)
    assert isinstance(drop, DropPrefix) and drop.call == "a"
    assert core.ledger.claims["n/m"].kv_free == MOST


def test_a_forecast_that_comes_just_after_the_end_keeps_it_too() -> None:
    core = scheduler(tiered(kv=MOST))
    core.handle(arrival("a", kv=FLOOR), 1.0)
    assert core.handle(CallFinished("a", 140, 10), 2.0) == []
    [keep] = core.handle(again(), 2.1)
    assert isinstance(keep, KeepPrefix)
    core.handle(RunEnded("r"), 3.0)


def test_it_is_dropped_with_its_run_and_expires_by_itself() -> None:
    core, _ = kept()
    assert [type(c) for c in core.handle(RunEnded("r"), 4.0)] == [DropPrefix]
    core, [keep] = kept()
    assert isinstance(keep, KeepPrefix)
    assert core.handle(Tick(), 3.0 + keep.seconds) == []
    assert core.ledger.claims["n/m"].kept == {}


def test_a_prefix_that_the_engine_has_lost_is_not_held() -> None:
    core, [keep] = kept()
    core.handle(CommandFailed(keep.id, "404"), 4.0)
    assert core.ledger.claims["n/m"].kv_free == MOST


def test_nothing_is_kept_of_what_a_longest_request_needs() -> None:
    _, commands = kept(kv=FLOOR + 149)
    assert commands == []


def test_the_next_call_of_the_run_takes_the_kept_bytes_over() -> None:
    core, _ = kept()
    core.handle(arrival("b", kv=FLOOR + 160), 5.0)
    assert core.ledger.claims["n/m"].kv_used == FLOOR + 160
    core.validate()


def test_a_next_call_that_has_to_wait_leaves_the_prefix_kept() -> None:
    core, _ = kept()
    core.handle(arrival("other", "r2", kv=MOST - 150), 4.0)
    assert core.handle(arrival("b", kv=FLOOR + 160), 5.0) == []
    assert core.ledger.claims["n/m"].kv_kept == 150


def test_for_lack_of_memory_the_prefix_of_an_idle_run_goes() -> None:
    core, _ = kept()
    commands = core.handle(arrival("b", "r2", kv=MOST), 5.0)
    assert [type(c).__name__ for c in commands] == ["DropPrefix", "Dispatch"]
    assert core.counts["prefix_eviction"] == 1
    core.validate()


def test_a_lost_node_has_no_prefixes() -> None:
    core, _ = kept()
    core.handle(NodeLost("n"), 5.0)
    assert core.handle(RunEnded("r"), 6.0) == []
    core.validate()


def test_measured_memory_stands_beside_the_promise() -> None:
    core = scheduler(tiered())
    assert core.handle(MemoryMeasured("n/cpu", 12345), 1.0) == []
    assert core.ledger.measured == {"n/cpu": 12345}
    assert core.ledger.free("n/cpu") > 12345
