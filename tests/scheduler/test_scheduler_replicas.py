"""Several workers of one model: which a call goes to, when there is another, who makes room."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from scheduler.scenes import dispatched, ready, stopped

from maestro_backend.scheduler import (
    CallArrived,
    CallFinished,
    Command,
    CommandApplied,
    DeviceInfo,
    Dispatch,
    Event,
    ForecastCall,
    ForecastChanged,
    Length,
    NodeInfo,
    NodeJoined,
    Reject,
    Residency,
    Scheduler,
    SetResidency,
    Settings,
    Tick,
    WorkerChanged,
    WorkerInfo,
    WorkerState,
)
from maestro_backend.scheduler.policies import policy

DEVICE, DISK = Residency.DEVICE, Residency.DISK
READY, STOPPED = WorkerState.READY, WorkerState.STOPPED
START_S = 5.0


def on(
    device: int, model: str, state: WorkerState = READY, *, window: int = 1, kv: int = 100
) -> WorkerInfo:
    """A worker that takes 1,000 bytes of weights of its device, and is back in five seconds."""
    name = f"n/d{device}/{model}"
    at = DEVICE if state is READY else DISK
    back = {DISK: START_S}
    return WorkerInfo(
        name, "n", f"d{device}", model, state, at, 1000, kv, max_inflight=window, activation_s=back
    )


def cluster(
    *workers: WorkerInfo, capacity: int = 1100, rule: str = "fcfs", settings: Settings | None = None
) -> Scheduler:
    devices = tuple(DeviceInfo(f"d{i}", capacity) for i in range(4))
    core = Scheduler(policy(rule), settings)
    core.handle(NodeJoined(NodeInfo("n", devices, workers)), 0.0)
    core.validate()
    return core


def arrival(
    call: str, run: str = "r", model: str = "m", *, kv: int = 10, service_s: float = 1.0
) -> CallArrived:
    return CallArrived(call, run, "s", model, Length(8, 16), kv, service_s)


def moves(commands: list[Command]) -> list[tuple[str, Residency]]:
    return [(c.worker, c.residency) for c in commands if isinstance(c, SetResidency)]


def places(commands: list[Command]) -> list[str]:
    return [c.worker for c in commands if isinstance(c, Dispatch)]


def done(core: Scheduler, command: Command, info: WorkerInfo, now: float) -> list[Command]:
    commands = core.handle(WorkerChanged(info), now)
    commands += core.handle(CommandApplied(command.id), now)
    core.validate()
    return commands


# --- where a call goes --------------------------------------------------------------------------


def test_a_call_goes_where_the_fewest_are_in_flight() -> None:
    core = cluster(on(0, "m", window=4), on(1, "m", window=2))
    assert places(core.handle(arrival("a", service_s=4), 1.0)) == ["n/d0/m"]
    assert places(core.handle(arrival("b", service_s=2), 1.0)) == ["n/d1/m"]
    assert places(core.handle(arrival("c", service_s=1), 1.0)) == ["n/d0/m"]
    core.handle(CallFinished("b"), 2.0)
    assert places(core.handle(arrival("d", service_s=2), 2.0)) == ["n/d1/m"]


def test_a_call_that_does_not_fit_the_least_loaded_goes_to_the_next() -> None:
    core = cluster(on(0, "m", window=9), on(1, "m", window=9))
    core.handle(arrival("a", kv=90, service_s=1), 1.0)
    core.handle(arrival("b", kv=30, service_s=2), 1.0)
    assert places(core.handle(arrival("c", kv=60), 1.0)) == ["n/d1/m"]
    assert places(core.handle(arrival("d", kv=20), 1.0)) == []
    assert places(core.handle(arrival("e", kv=5), 1.0)) == [], "nothing smaller overtakes"
    assert places(core.handle(CallFinished("a"), 1.1)) == ["n/d0/m", "n/d0/m"]
    core.validate()


def test_a_smaller_call_finds_the_room_that_was_too_small_for_another() -> None:
    core = cluster(on(0, "m", window=9), on(1, "m", window=9), rule="maestro")
    core.handle(arrival("a", "r1", kv=90), 1.0)
    core.handle(arrival("b", "r2", kv=80), 1.0)
    assert places(core.handle(arrival("c", "r3", kv=60, service_s=9), 1.0)) == []
    assert places(core.handle(arrival("d", "r4", kv=15, service_s=1), 1.0)) == ["n/d1/m"]
    core.validate()


def test_with_affinity_a_run_comes_back_to_its_worker_unless_that_is_much_busier() -> None:
    infos = [on(i, "m", window=4) for i in range(2)]
    core = cluster(*infos, settings=Settings(placement="affinity"))
    assert places(core.handle(arrival("a", "r1"), 1.0)) == ["n/d0/m"]
    assert places(core.handle(arrival("b", "r2"), 1.0)) == ["n/d1/m"]
    core.handle(CallFinished("b"), 2.0)
    assert places(core.handle(arrival("c", "r2"), 2.0)) == ["n/d1/m"]
    assert places(core.handle(arrival("d", "r2"), 2.0)) == ["n/d1/m"]
    assert places(core.handle(arrival("e", "r2"), 2.0)) == ["n/d1/m"], "two in flight: 1.5 + 1"
    assert places(core.handle(arrival("f", "r2"), 2.0)) == ["n/d0/m"], "three are too many"


def test_with_affinity_a_new_run_goes_where_the_fewest_places_are_taken_then_the_least_kv() -> None:
    core = cluster(
        on(0, "m", window=4), on(1, "m", window=2), settings=Settings(placement="affinity")
    )
    assert places(core.handle(arrival("a", "r1", kv=50), 1.0)) == ["n/d0/m"]
    assert places(core.handle(arrival("b", "r2", kv=5), 1.0)) == ["n/d1/m"]
    assert places(core.handle(arrival("c", "r3"), 1.0)) == ["n/d0/m"], "a quarter and a half"
    assert places(core.handle(arrival("d", "r4"), 1.0)) == ["n/d1/m"], "halves: less KV"


# --- another worker -----------------------------------------------------------------------------


def test_a_full_model_gets_another_worker_once_calls_have_waited_as_long_as_that_takes() -> None:
    further = on(1, "m", STOPPED)
    core = cluster(on(0, "m"), further)
    core.handle(arrival("a"), 1.0)
    assert core.handle(arrival("b"), 2.0) == []
    assert core.handle(Tick(), 1.0 + START_S) == []
    [bring] = core.handle(Tick(), 2.0 + START_S)
    assert moves([bring]) == [("n/d1/m", DEVICE)]
    assert core.handle(Tick(), 20.0) == [], "its place will do"
    assert places(done(core, bring, ready(further), 21.0)) == ["n/d1/m"]


def test_there_is_no_other_while_a_place_is_free_or_calls_wait_for_a_join() -> None:
    core = cluster(on(0, "m", window=2), on(1, "m", STOPPED))
    core.handle(arrival("a"), 1.0)
    held = replace(arrival("join"), stage="t", waits_for=("s",))
    core.handle(held, 2.0)
    assert core.handle(Tick(), 100.0) == []


def test_a_worker_without_kv_memory_is_full_too() -> None:
    core = cluster(on(0, "m", window=9), on(1, "m", STOPPED, window=9))
    core.handle(arrival("a", kv=90), 1.0)
    assert core.handle(arrival("b", kv=50), 2.0) == []
    assert moves(core.handle(Tick(), 10.0)) == [("n/d1/m", DEVICE)]


def test_a_further_worker_takes_the_place_of_what_is_idle_and_not_expected() -> None:
    core = cluster(on(0, "m"), on(1, "m", STOPPED), on(1, "x"))
    soon = ForecastCall("s", "", "x", 1.0, 500.0, 10, Length(8, 16), 1.0)
    core.handle(ForecastChanged("other", (soon,)), 0.5)
    core.handle(arrival("a"), 10.0)
    core.handle(arrival("b"), 10.0)
    assert core.handle(Tick(), 20.0) == []
    core.handle(ForecastChanged("other", ()), 20.5)
    [away] = core.handle(Tick(), 22.0)
    assert moves([away]) == [("n/d1/x", DISK)]
    assert moves(done(core, away, stopped(on(1, "x")), 24.0)) == [("n/d1/m", DEVICE)]


def test_a_further_worker_drives_nobody_busy_out() -> None:
    core = cluster(on(0, "m"), on(1, "m", STOPPED), on(1, "x"))
    core.handle(arrival("x1", "other", "x"), 1.0)
    core.handle(arrival("a"), 10.0)
    core.handle(arrival("b"), 10.0)
    assert core.handle(Tick(), 1000.0) == []
    assert dispatched(core.handle(arrival("x2", "other", "x"), 1001.0)) == []
    assert dispatched(core.handle(CallFinished("x1"), 1002.0)) == ["x2"], "nor made to drain"


def test_idle_further_workers_go_first() -> None:
    """x was used less lately, but it is the only one of its model."""
    core = cluster(on(0, "x"), on(0, "m"), on(0, "y", STOPPED), on(2, "m"), capacity=2200)
    core.handle(arrival("b", model="m"), 1.0)
    core.handle(CallFinished("b"), 2.0)
    assert moves(core.handle(arrival("c", model="y"), 30.0)) == [("n/d0/m", DISK)]


def test_a_further_worker_stays_for_as_long_as_it_took_to_come() -> None:
    spare, wanted = on(1, "m", STOPPED), on(1, "y", STOPPED)
    core = cluster(on(0, "m"), spare, wanted)
    core.handle(arrival("a"), 1.0)
    core.handle(arrival("b"), 1.0)
    [bring] = core.handle(Tick(), 10.0)
    done(core, bring, ready(spare), 11.0)
    core.handle(CallFinished("b"), 12.0)
    assert core.handle(arrival("c", model="y"), 12.1) == []
    assert moves(core.handle(Tick(), 10.9 + START_S + 0.2)) == [("n/d1/m", DISK)]


def test_every_move_names_its_worker() -> None:
    core = cluster(on(0, "m", STOPPED), on(1, "m", STOPPED))
    [bring] = core.handle(arrival("a"), 1.0)
    assert isinstance(bring, SetResidency)
    assert (bring.model, bring.worker) == ("m", "n/d0/m")


def test_with_one_worker_per_model_nobody_is_doubled() -> None:
    core = cluster(on(0, "m"), on(1, "x"))
    for i in range(10):
        core.handle(arrival(f"c{i}"), 1.0)
    assert moves(core.handle(Tick(), 100.0)) == []


@pytest.mark.parametrize("look_ahead", ["none", "likely"])
def test_without_look_ahead_the_least_recently_used_goes_whoever_expects_it(
    look_ahead: str,
) -> None:
    settings = replace(Settings(), look_ahead=look_ahead)
    models = [on(0, m) for m in "abc"]
    core = cluster(*models, on(0, "d", STOPPED), capacity=3300, settings=settings)
    for at, model in enumerate("bca"):
        core.handle(arrival(f"{model}1", model, model), float(at))
        core.handle(CallFinished(f"{model}1"), at + 0.5)
    soon = ForecastCall("s", "", "b", 1.0, 1.0, 10, Length(8, 16), 1.0)
    core.handle(ForecastChanged("b", (soon,)), 4.0)
    gone = "n/d0/b" if look_ahead == "none" else "n/d0/c"
    assert moves(core.handle(arrival("d1", "d", "d"), 5.0)) == [(gone, DISK)]


# --- anything, in any order ---------------------------------------------------------------------

MODELS = ("a", "b", "c")


class Storm:
    """Four devices with room for two of three models each, and a node that does as it is told."""

    def __init__(self, rule: str, placement: str, seed: int) -> None:
        self.dice = Random(seed)
        settings = replace(Settings(), placement=placement)  # type: ignore[arg-type]
        infos = [on(d, m, STOPPED, window=2) for d in range(4) for m in MODELS]
        self.infos = {info.worker: info for info in infos}
        self.core = cluster(*self.infos.values(), capacity=2200, rule=rule, settings=settings)
        self.now, self.calls, self.most = 0.0, 0, 0
        self.running: set[str] = set()
        self.pending: list[SetResidency] = []

    def feed(self, event: Event) -> None:
        for command in self.core.handle(event, self.now):
            assert not isinstance(command, Reject)
            if isinstance(command, Dispatch):
                self.running.add(command.call)
            elif isinstance(command, SetResidency):
                self.pending.append(command)
        self.core.validate()
        self.check_nothing_waits_that_could_go()
        for model in MODELS:
            there = [w for w in self.core.workers.values() if w.model == model]
            self.most = max(self.most, sum(w.state is READY for w in there))

    def check_nothing_waits_that_could_go(self) -> None:
        """First come, first served: the head of each queue has found every door shut."""
        core = self.core
        moving = {command.worker for command in self.pending}
        for model in MODELS if core.policy.name == "fcfs" else ():
            need = next((c.request.kv_tokens for c in core.calls.queued(model).values()), None)
            for info in core.workers.values() if need is not None else ():
                if info.model == model and info.state is READY and info.worker not in moving:
                    full = len(core.calls.on_worker(info.worker)) == info.max_inflight
                    drains = info.worker in core._world.draining
                    assert full or drains or core.ledger.claims[info.worker].kv_free < need

    def step(self, arrivals: float) -> None:
        dice = self.dice
        self.now += dice.choice((0.01, 0.3, 2.0))
        if dice.random() < arrivals:
            self.calls += 1
            model = dice.choices(MODELS, (6, 2, 1))[0]
            run, kv = f"r{dice.randrange(8)}", dice.choice((10, 60, 90))
            self.feed(arrival(f"c{self.calls}", run, model, kv=kv, service_s=dice.random()))
        elif self.running and dice.random() < 0.4:
            call = dice.choice(sorted(self.running))
            self.running.discard(call)
            self.feed(CallFinished(call, 5, 5))
        elif self.pending:
            command = self.pending.pop(dice.randrange(len(self.pending)))
            info = self.infos[command.worker]
            new = ready(info) if command.residency is DEVICE else stopped(info)
            self.feed(WorkerChanged(new))
            self.feed(CommandApplied(command.id))
        else:
            self.feed(Tick())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("placement", ["load", "affinity"])
@pytest.mark.parametrize("rule", ["fcfs", "maestro"])
def test_with_several_workers_per_model_the_books_balance_and_all_is_served(
    rule: str, placement: str, seed: int
) -> None:
    storm = Storm(rule, placement, seed)
    for _ in range(300):
        storm.step(arrivals=0.4)
    for _ in range(3000):
        if not storm.core.calls.by_id:
            break
        storm.step(arrivals=0.0)
    assert not storm.core.calls.by_id, "never answered"
    assert storm.most > 1, "there were further workers"
