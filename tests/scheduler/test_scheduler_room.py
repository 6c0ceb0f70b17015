"""Room that does not come as planned: nobody waits for ever, and nothing is done twice."""

from __future__ import annotations

from dataclasses import replace

from scheduler.scenes import (
    ALIVE,
    FLOOR,
    MOST,
    RESIDUAL,
    WEIGHTS,
    arrival,
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
    DropPrefix,
    ForecastCall,
    ForecastChanged,
    KeepPrefix,
    Length,
    NodeJoined,
    Residency,
    RunEnded,
    Scheduler,
    SetKvLimit,
    SetResidency,
    Tick,
    WorkerChanged,
    WorkerState,
)
from maestro_backend.scheduler.policies import policy

HOST, PARKED, DISK = Residency.HOST, Residency.PARKED, Residency.DISK
ASIDE = RESIDUAL


def moves(commands: list[Command]) -> list[tuple[str, Residency]]:
    return [(c.model, c.residency) for c in commands if isinstance(c, SetResidency)]


def test_a_shrink_that_never_works_is_followed_by_a_stop() -> None:
    rich, wanted = tiered("a", kv=MOST, tiers=()), tiered("b", state=WorkerState.STOPPED)
    core = scheduler(rich, wanted, capacity=2 * ALIVE + MOST - FLOOR - 100)
    [shrink] = core.handle(arrival("x", model="b"), 0.0)
    assert isinstance(shrink, SetKvLimit)
    assert moves(core.handle(CommandFailed(shrink.id, "no"), 1.0)) == [("a", DISK)]


def test_a_host_budget_for_one_copy_holds_nobody_up() -> None:
    """Neither of two can be parked, and only one can go to the host: the other is stopped."""
    a, b = (tiered(name, tiers=(HOST,)) for name in "ab")
    wanted = replace(tiered("c", state=WorkerState.STOPPED), weights_bytes=2 * WEIGHTS)
    core = scheduler(a, b, wanted, capacity=2 * ALIVE + ASIDE, host=WEIGHTS)
    asked = moves(core.handle(arrival("x", model="c"), 0.0))
    assert DISK in {residency for _, residency in asked}


def test_a_copy_that_is_being_given_up_is_waited_for() -> None:
    a, b = tiered("a"), tiered("b", state=WorkerState.STOPPED)
    old = suspended(tiered("o"))
    core = scheduler(a, b, old, capacity=2 * ALIVE + ASIDE - WEIGHTS + FLOOR, host=WEIGHTS)
    [drop] = core.handle(arrival("x", model="b"), 1.0)
    assert moves([drop]) == [("o", PARKED)]
    assert core.handle(Tick(), 1.1) == [], "not parked as well: the room is on its way"
    after = core.handle(WorkerChanged(suspended(old, PARKED)), 1.2)
    after += core.handle(CommandApplied(drop.id), 1.2)
    assert moves(after) == [("a", HOST)]


def test_a_preload_from_elsewhere_is_fetched_and_then_started() -> None:
    elsewhere = replace(
        stopped(tiered("r")), residency=Residency.REMOTE, tiers=(*tiered("r").tiers, DISK)
    )
    core = Scheduler(policy("fcfs"))
    [fetch] = core.handle(NodeJoined(node(elsewhere), ("r",)), 0.0)
    assert moves([fetch]) == [("r", DISK)]
    here = core.handle(WorkerChanged(replace(elsewhere, residency=DISK)), 1.0)
    here += core.handle(CommandApplied(fetch.id), 1.0)
    assert moves(here) == [("r", Residency.DEVICE)]


def test_prefixes_that_later_calls_took_over_are_dropped_too() -> None:
    core = scheduler(ready(tiered("m", kv=MOST)), capacity=2 * ALIVE + MOST)
    soon = ForecastCall("s", "", "m", 1.0, 1.0, 10, Length(8, 16), 1.0)
    kept, dropped = set(), set()
    for number in range(3):
        commands = core.handle(arrival(f"c{number}"), float(number))
        commands += core.handle(ForecastChanged("r", (soon,)), number + 0.3)
        commands += core.handle(CallFinished(f"c{number}", 10, 10), number + 0.5)
        kept |= {c.call for c in commands if isinstance(c, KeepPrefix)}
        dropped |= {c.call for c in commands if isinstance(c, DropPrefix)}
        core.validate()
    dropped |= {c.call for c in core.handle(RunEnded("r"), 9.0) if isinstance(c, DropPrefix)}
    assert kept == dropped == {"c0", "c1", "c2"}
