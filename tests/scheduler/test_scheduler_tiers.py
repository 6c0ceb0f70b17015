"""Weights between device, host memory and disk: who makes room, how far it goes, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler.scenes import (
    ALIVE,
    FLOOR,
    MOST,
    RESIDUAL,
    WEIGHTS,
    arrival,
    dispatched,
    node,
    ready,
    scheduler,
    stopped,
    suspended,
    tiered,
)

from maestro_backend.scheduler import (
    CallFinished,
    Command,
    CommandApplied,
    CommandFailed,
    ForecastCall,
    ForecastChanged,
    Length,
    NodeJoined,
    NodeLost,
    Residency,
    Scheduler,
    SetKvLimit,
    SetResidency,
    Settings,
    Tick,
    WorkerChanged,
    WorkerInfo,
    WorkerState,
)
from maestro_backend.scheduler.policies import policy

DEVICE, HOST, PARKED, DISK, REMOTE = Residency
ASIDE = RESIDUAL
"""What a suspended worker still takes of the device."""
STOPPED, SUSPENDED = WorkerState.STOPPED, WorkerState.SUSPENDED


def moves(commands: list[Command]) -> list[tuple[str, Residency]]:
    return [(c.model, c.residency) for c in commands if isinstance(c, SetResidency)]


def expects(*models: str, start: float = 0.0, run: str = "r") -> ForecastChanged:
    calls = [ForecastCall("s", "", m, 1.0, start, 10, Length(8, 16), 1.0) for m in models]
    return ForecastChanged(run, tuple(calls))


def done(core: Scheduler, command: Command, info: WorkerInfo, now: float) -> list[Command]:
    """The shell's way to answer: the worker as it is now, then the command."""
    commands = core.handle(WorkerChanged(info), now)
    commands += core.handle(CommandApplied(command.id), now)
    core.validate()
    return commands


def test_weights_leave_only_as_far_as_they_must_and_come_back_from_there() -> None:
    a, b = tiered("a"), tiered("b", state=SUSPENDED)
    core = scheduler(a, b, capacity=ALIVE + ASIDE, host=2 * WEIGHTS)
    [away] = core.handle(arrival("x", model="b"), 1.0)
    assert moves([away]) == [("a", HOST)]
    assert core.ledger.host_free("n") == 0, "its copy is promised before it is made"
    [bring] = done(core, away, suspended(a), 2.0)
    assert moves([bring]) == [("b", DEVICE)]
    assert core.ledger.free("n/cpu") == 0, "its weights are promised before they move"
    assert dispatched(done(core, bring, ready(b), 3.0)) == ["x"]


def test_a_suspend_holds_the_weights_until_it_is_done() -> None:
    a, b = tiered("a"), tiered("b", state=SUSPENDED)
    core = scheduler(a, b, capacity=ALIVE + ASIDE, host=2 * WEIGHTS)
    core.handle(arrival("x", model="b"), 1.0)
    assert core.handle(WorkerChanged(replace(a, state=WorkerState.SUSPENDING)), 2.0) == []
    assert core.ledger.free("n/cpu") == 0


def test_while_room_is_on_its_way_nobody_else_has_to_make_any() -> None:
    a, b, c = tiered("a"), tiered("b"), tiered("c", state=SUSPENDED)
    core = scheduler(a, b, c, capacity=2 * ALIVE + ASIDE, host=4 * WEIGHTS)
    assert moves(core.handle(arrival("x", model="c"), 1.0)) == [("a", HOST)]
    assert core.handle(Tick(), 2.0) == []


def test_the_room_of_an_older_call_is_not_given_to_a_younger() -> None:
    rich, c = tiered("a", kv=MOST), tiered("c", state=SUSPENDED, kv=MOST)
    small = replace(tiered("d", state=STOPPED), weights_bytes=50)
    pinned = Settings(pinned=("a",))
    capacity = 2 * ALIVE + MOST - FLOOR + 200
    core = scheduler(rich, c, small, capacity=capacity, host=WEIGHTS, settings=pinned)
    core.handle(arrival("busy", model="a", kv=MOST), 0.5)
    [resume] = core.handle(arrival("x", model="c"), 1.0)
    assert moves([resume]) == [("c", DEVICE)]
    assert core.handle(arrival("y", model="d"), 2.0) == []


def limits_of(commands: list[Command]) -> list[tuple[str, int]]:
    return [(c.worker, c.limit_bytes) for c in commands if isinstance(c, SetKvLimit)]


def test_a_harder_step_spares_the_gentler_ones_that_it_makes_needless() -> None:
    idle = [tiered(m, kv=MOST) for m in "abc"]
    wanted = replace(tiered("d", state=STOPPED), weights_bytes=3 * (MOST - FLOOR))
    held = 3 * (WEIGHTS + MOST + RESIDUAL)
    core = scheduler(*idle, wanted, capacity=held, host=4 * WEIGHTS)
    commands = core.handle(arrival("x", model="d"), 1.0)
    assert moves(commands) == [("a", HOST)]
    assert limits_of(commands) == [("n/c", FLOOR)], "b may keep its KV"


@pytest.mark.parametrize(
    ("host", "tiers", "tier"),
    [
        (WEIGHTS, (HOST, PARKED), HOST),
        (WEIGHTS - 1, (HOST, PARKED), PARKED),
        (WEIGHTS - 1, (HOST,), DISK),
        (WEIGHTS, (PARKED,), PARKED),
        (WEIGHTS, (), DISK),
    ],
)
def test_the_nearest_tier_with_room_is_taken(
    host: int, tiers: tuple[Residency, ...], tier: Residency
) -> None:
    idle, wanted = tiered("a", tiers=tiers), tiered("b", state=STOPPED)
    core = scheduler(idle, wanted, capacity=ALIVE + ASIDE, host=host)
    assert moves(core.handle(arrival("x", model="b"), 1.0)) == [("a", tier)]


def test_an_older_copy_in_host_memory_makes_room_for_a_newer() -> None:
    a, b, c = tiered("a"), tiered("b", state=SUSPENDED), tiered("c", state=STOPPED)
    core = scheduler(a, b, c, capacity=ALIVE + 2 * ASIDE, host=WEIGHTS)
    core.handle(arrival("x", model="a"), 0.5)
    core.handle(CallFinished("x"), 0.6)
    [drop] = core.handle(arrival("y", model="c"), 1.0)
    assert moves([drop]) == [("b", PARKED)]
    [away] = done(core, drop, suspended(b, PARKED), 2.0)
    assert moves([away]) == [("a", HOST)]


def test_a_process_is_stopped_only_where_its_residual_is_needed() -> None:
    back_s = {HOST: 1.0, DISK: 30.0}
    a, b = tiered("a", activation_s=back_s), tiered("b", state=SUSPENDED, activation_s=back_s)
    core = scheduler(
        a, b, tiered("c", state=STOPPED), capacity=ALIVE + 2 * ASIDE - 1, host=4 * WEIGHTS
    )
    assert moves(core.handle(arrival("x", model="c"), 1.0)) == [("a", HOST), ("b", DISK)]
    core.validate()


def test_no_process_is_stopped_where_the_weights_of_a_busy_one_will_do_later() -> None:
    """A stop would cost a cold start; the call that runs now ends sooner."""
    a, c = tiered("a"), tiered("c", state=SUSPENDED)
    heavy = replace(tiered("b", state=SUSPENDED), residual_bytes=2 * WEIGHTS)
    capacity = ALIVE + FLOOR + 2 * WEIGHTS + ASIDE
    core = scheduler(a, heavy, c, capacity=capacity, host=4 * WEIGHTS)
    core.handle(arrival("busy", model="a"), 0.5)
    assert moves(core.handle(arrival("x", model="c"), 1.0)) == []
    assert moves(core.handle(CallFinished("busy"), 2.0)) == [("a", HOST)]


def test_a_limit_that_was_rounded_down_keeps_nobody_from_making_room() -> None:
    a, b = tiered("a"), tiered("b", state=SUSPENDED)
    core = scheduler(a, b, capacity=ALIVE + ASIDE + 200, host=4 * WEIGHTS)
    [grow] = core.handle(arrival("x", model="a", kv=FLOOR + 50), 1.0)
    assert isinstance(grow, SetKvLimit)
    given = replace(a, kv_limit_bytes=grow.limit_bytes - 5)
    assert dispatched(done(core, grow, given, 1.5)) == ["x"]
    core.handle(CallFinished("x"), 2.0)
    assert moves(core.handle(arrival("y", model="b"), 2.1)) == [("a", HOST)]


def test_idle_kv_shrinks_before_weights_leave() -> None:
    rich, wanted = tiered("a", kv=MOST), tiered("b", state=STOPPED)
    core = scheduler(rich, wanted, capacity=2 * ALIVE, host=4 * WEIGHTS)
    [shrink] = core.handle(arrival("x", model="b"), 1.0)
    assert isinstance(shrink, SetKvLimit)
    assert (shrink.worker, shrink.limit_bytes) == ("n/a", FLOOR)
    core.validate()
    [bring] = done(core, shrink, replace(rich, kv_limit_bytes=FLOOR), 2.0)
    assert isinstance(bring, SetResidency)
    assert (bring.model, bring.kv_limit_bytes) == ("b", FLOOR), "less than the most"


def test_with_room_for_it_a_start_takes_the_most() -> None:
    core = scheduler(tiered(state=STOPPED, kv=MOST))
    [bring] = core.handle(arrival("x"), 1.0)
    assert isinstance(bring, SetResidency) and bring.kv_limit_bytes is None


def test_preload_starts_what_fits_beside_the_others_with_less_kv_if_need_be() -> None:
    core = Scheduler(policy("fcfs"))
    workers = [tiered(m, state=STOPPED, kv=MOST) for m in "abc"]
    capacity = WEIGHTS + MOST + RESIDUAL + ALIVE + 50
    commands = core.handle(NodeJoined(node(*workers, capacity=capacity), ("a", "b", "c")), 0.0)
    limits = [(c.model, c.kv_limit_bytes) for c in commands if isinstance(c, SetResidency)]
    assert limits == [("a", None), ("b", FLOOR + 50)]
    core.validate()


def test_what_is_expected_sooner_is_not_put_away_for_what_comes_later() -> None:
    a = tiered("a", activation_s={HOST: 2.0})
    b = tiered("b", state=SUSPENDED, activation_s={HOST: 2.0})
    core = scheduler(a, b, capacity=ALIVE + ASIDE, host=4 * WEIGHTS)
    core.handle(expects("a", start=5.0, run="r1"), 1.0)
    assert core.handle(expects("b", start=4.0, run="r2"), 1.0) == [], "no time to be back"
    assert moves(core.handle(expects("b", start=1.0, run="r2"), 1.0)) == [("a", HOST)]


def test_a_waiting_call_takes_the_unexpected_first() -> None:
    a, b, c = tiered("a"), tiered("b"), tiered("c", state=SUSPENDED)
    core = scheduler(a, b, c, capacity=2 * ALIVE + ASIDE, host=4 * WEIGHTS)
    core.handle(arrival("x", model="b"), 1.0)
    core.handle(CallFinished("x"), 1.5)
    core.handle(expects("a", start=50.0), 2.0)
    assert moves(core.handle(arrival("y", model="c"), 3.0)) == [("b", HOST)]


def test_a_put_away_that_failed_is_not_asked_again_at_once_and_then_goes_farther() -> None:
    a, b = tiered("a"), tiered("b", state=SUSPENDED)
    core = scheduler(a, b, capacity=ALIVE + ASIDE, host=4 * WEIGHTS, settings=Settings(rest_s=5))
    [away] = core.handle(arrival("x", model="b"), 1.0)
    assert core.handle(CommandFailed(away.id, "no"), 2.0) == []
    assert core.handle(Tick(), 6.9) == []
    assert moves(core.handle(Tick(), 7.1)) == [("a", PARKED)]


def test_a_resume_that_fails_stops_the_process_and_starts_it_anew() -> None:
    asleep = tiered(state=SUSPENDED)
    core = scheduler(asleep, host=WEIGHTS)
    [resume] = core.handle(arrival("x"), 1.0)
    [stop] = core.handle(CommandFailed(resume.id, "mapping failed"), 2.0)
    assert moves([stop]) == [("m", DISK)]
    [start] = done(core, stop, stopped(asleep), 3.0)
    assert moves([start]) == [("m", DEVICE)]
    assert dispatched(done(core, start, ready(asleep), 4.0)) == ["x"]


def test_a_resume_takes_the_kv_memory_that_is_left() -> None:
    asleep, full = tiered("a", state=SUSPENDED), tiered("b")
    core = scheduler(
        asleep, full, capacity=2 * ALIVE + 50, host=WEIGHTS, settings=Settings(pinned=("b",))
    )
    assert core.ledger.claims["n/a"].total == RESIDUAL, "asleep it has none"
    [resume] = core.handle(arrival("x", model="a"), 1.0)
    assert isinstance(resume, SetResidency) and resume.residency is DEVICE
    assert resume.kv_limit_bytes == FLOOR + 50
    core.validate()


def test_without_look_ahead_or_tiers_models_take_turns_when_called() -> None:
    plain = Settings(look_ahead="none", tiers=(DEVICE, DISK))
    a, b = tiered("a"), tiered("b", state=STOPPED)
    core = scheduler(a, b, capacity=ALIVE + ASIDE, host=WEIGHTS, settings=plain)
    assert core.handle(expects("b"), 1.0) == []
    assert moves(core.handle(arrival("x", model="b"), 2.0)) == [("a", DISK)]


def test_all_of_a_forecast_may_count_as_expected() -> None:
    unlikely = ForecastCall("s", "", "b", 0.1, 0.0, 10, Length(8, 16), 1.0)
    for look_ahead, wanted in (("likely", []), ("all", [("b", DEVICE)])):
        settings = replace(Settings(), look_ahead=look_ahead)
        core = scheduler(tiered("a"), tiered("b", state=STOPPED), settings=settings)
        assert moves(core.handle(ForecastChanged("r", (unlikely,)), 1.0)) == wanted


def test_a_model_elsewhere_is_fetched_first() -> None:
    remote = replace(tiered(state=STOPPED), residency=REMOTE)
    core = scheduler(remote)
    [fetch] = core.handle(expects("m"), 1.0)
    assert moves([fetch]) == [("m", DISK)]
    assert moves(done(core, fetch, stopped(remote), 2.0)) == [("m", DEVICE)]


def test_a_node_that_returns_keeps_its_calls_and_its_suspended_workers() -> None:
    a, b = tiered("a", kv=MOST), tiered("b", state=SUSPENDED)
    core = scheduler(a, b, capacity=10 * ALIVE, host=WEIGHTS)
    core.handle(arrival("x", model="a", kv=300), 1.0)
    core.handle(NodeLost("n"), 2.0)
    core.handle(NodeJoined(node(a, b, capacity=10 * ALIVE, host=WEIGHTS)), 3.0)
    core.validate()
    assert core.ledger.claims["n/a"].reservations == {"x": 300}
    assert core.ledger.claims["n/b"].total == ASIDE
    assert core.ledger.host_free("n") == 0
    [resume] = core.handle(arrival("y", model="b"), 4.0)
    assert moves([resume]) == [("b", DEVICE)]


def test_a_call_in_a_suspended_worker_brings_it_back() -> None:
    a = tiered("a")
    core = scheduler(a, capacity=ALIVE, host=WEIGHTS)
    core.handle(arrival("x", model="a", kv=50), 1.0)
    [resume] = core.handle(WorkerChanged(suspended(a)), 2.0)
    assert moves([resume]) == [("a", DEVICE)]


def test_a_suspended_model_with_younger_calls_gives_way_too() -> None:
    """It holds KV that the oldest call's model needs, and could itself not come before it."""
    a, c = tiered("a", state=STOPPED), tiered("c")
    d = tiered("d", state=SUSPENDED, kv=MOST)
    capacity = ALIVE + MOST + RESIDUAL
    core = scheduler(
        a, c, replace(d, elastic=False, kv_limit_bytes=MOST), capacity=capacity, host=WEIGHTS
    )
    core.handle(arrival("busy", "r0", model="c"), 0.5)
    core.handle(arrival("oldest", "r", stage="first", model="a", kv=FLOOR), 1.0)
    core.handle(arrival("join", "r", model="c", waits_for=("first",)), 2.0)
    core.handle(arrival("young", model="d"), 3.0)
    assert core.handle(CallFinished("busy"), 4.0) == []
    assert sorted(moves(core.handle(Tick(), 20.0))) == [("c", PARKED), ("d", DISK)]


def test_caches_of_one_size_take_turns_with_their_weights() -> None:
    """The device has room for one of the two with its KV, and the residuals of both."""
    a, b = (replace(tiered(m, kv=MOST), elastic=False) for m in "ab")
    b = replace(suspended(b), kv_limit_bytes=0)
    core = scheduler(a, b, capacity=WEIGHTS + MOST + 2 * RESIDUAL, host=2 * WEIGHTS)
    assert core.ledger.claims["n/b"].total == RESIDUAL
    [away] = core.handle(arrival("x", model="b"), 1.0)
    assert moves([away]) == [("a", HOST)]
    [back] = done(core, away, replace(suspended(a), kv_limit_bytes=0), 2.0)
    assert moves([back]) == [("b", DEVICE)] and back.kv_limit_bytes is None
    assert core.ledger.claims["n/b"].total == WEIGHTS + MOST + RESIDUAL
    assert dispatched(done(core, back, replace(ready(b), kv_limit_bytes=MOST), 3.0)) == ["x"]


def test_a_cache_of_one_size_stays_with_its_calls() -> None:
    """Their KV is in it: what the weights leave is not enough, and nobody believes it is."""
    a, b = (replace(tiered(m, kv=MOST), elastic=False) for m in "ab")
    b = replace(suspended(b), kv_limit_bytes=0)
    core = scheduler(a, b, capacity=WEIGHTS + MOST + 2 * RESIDUAL, host=2 * WEIGHTS)
    core.handle(arrival("x", model="a"), 1.0)
    assert core.handle(arrival("y", model="b"), 2.0) == []
    assert moves(core.handle(CallFinished("x"), 3.0)) == [("a", HOST)]


def test_a_kept_prefix_in_a_cache_of_one_size_is_no_reason_to_wait() -> None:
    """It keeps the cache on the device; only the end of its worker makes room."""
    a = replace(tiered("a", kv=MOST), elastic=False)
    b = replace(tiered("b", state=STOPPED, kv=MOST), elastic=False)
    core = scheduler(a, b, capacity=WEIGHTS + MOST + 2 * RESIDUAL, host=2 * WEIGHTS)
    core.handle(expects("a", start=100.0), 0.5)
    core.handle(arrival("x", model="a", kv=50), 1.0)
    core.handle(CallFinished("x", 30, 20), 2.0)
    assert list(core.ledger.claims["n/a"].kept) == ["x"]
    assert moves(core.handle(arrival("y", run="other", model="b"), 2.5)) == [("a", DISK)]


def test_a_call_that_came_into_a_suspended_worker_gets_its_kv_with_the_weights() -> None:
    a = replace(tiered("a", kv=MOST), elastic=False)
    core = scheduler(a, capacity=WEIGHTS + MOST + RESIDUAL, host=WEIGHTS)
    core.handle(arrival("x", model="a", kv=50), 1.0)
    [back] = core.handle(WorkerChanged(replace(suspended(a), kv_limit_bytes=0)), 2.0)
    assert core.ledger.claims["n/a"].reservations == {"x": 50}
    done(core, back, a, 3.0)
    assert core.ledger.claims["n/a"].reservations == {"x": 50}


def test_a_worker_that_dies_while_it_resumes_holds_no_more_than_before() -> None:
    asleep = tiered("a", state=SUSPENDED)
    core = scheduler(asleep, capacity=ALIVE, host=WEIGHTS)
    [resume] = core.handle(arrival("x", model="a"), 1.0)
    assert isinstance(resume, SetResidency) and resume.kv_limit_bytes == FLOOR
    core.handle(WorkerChanged(replace(stopped(asleep), kv_limit_bytes=MOST, host_bytes=0)), 2.0)
    core.validate()


def test_a_start_that_learns_its_size_only_now_is_promised_that() -> None:
    unknown = replace(tiered(state=STOPPED, kv=0), weights_bytes=0, kv_max_bytes=0, elastic=False)
    core = scheduler(unknown)
    core.handle(arrival("x"), 1.0)
    core.handle(WorkerChanged(tiered(state=WorkerState.STARTING, kv=MOST)), 2.0)
    assert core.ledger.claims["n/m"].total == WEIGHTS + MOST + RESIDUAL


def test_actions_are_counted() -> None:
    a, b = tiered("a"), tiered("b", state=STOPPED)
    core = scheduler(a, b, capacity=ALIVE + ASIDE, host=WEIGHTS)
    [away] = core.handle(arrival("x", model="b"), 1.0)
    done(core, away, suspended(a), 2.0)
    assert (core.counts["suspend"], core.counts["start"], core.counts["resume"]) == (1, 1, 0)
