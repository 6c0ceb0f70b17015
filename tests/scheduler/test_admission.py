"""Which calls find no room in the queue, and whether they find it when they come again."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from maestro_backend.scheduler import (
    CallArrived,
    CallFinished,
    Dispatch,
    Event,
    NodeJoined,
    Reject,
    RejectReason,
    RunStarted,
    Scheduler,
    Settings,
)
from maestro_backend.scheduler.policies import Maestro, policy
from tests.scheduler.scenes import arrival, dispatched, node, scheduler, worker

# --- clients that come back ---------------------------------------------------------------------


@dataclass
class Clients:
    """A fixed number of them, each one call at a time. Who is refused comes back when told, or
    after `every_s` seconds; `back`: whether those that came back found room."""

    seed: int
    number: int
    queue: int
    window: int
    think_s: float
    error: float = 1.0
    named: bool = True
    every_s: float | None = None
    back: list[bool] = field(default_factory=list)
    served_s: float = 0.0
    agenda: list[tuple[float, int, int, Event]] = field(default_factory=list)

    def until(self, end: float) -> None:
        """The first third, in which they get into step, does not count."""
        draw = random.Random(self.seed)
        core = Scheduler(policy("fcfs"), Settings(max_queued=self.queue))
        core.handle(NodeJoined(node(worker(window=self.window, kv=10**9))), 0.0)
        real_s: dict[str, float] = {}
        clients: dict[str, int] = {}
        for client in range(self.number):
            self._call(draw.uniform(0.0, 10.0), client, draw)
        while self.agenda[0][0] < end:
            now, number, client, event = heapq.heappop(self.agenda)
            came_back = number < 0
            if isinstance(event, CallArrived):
                real_s[event.call] = event.service_s * self.error * draw.uniform(0.7, 1.3)
                clients[event.call] = client
            else:
                self._call(now + draw.expovariate(1 / self.think_s), client, draw)
            commands = core.handle(event, now)
            refused = [command for command in commands if isinstance(command, Reject)]
            for call in dispatched(commands):
                self.served_s += real_s[call]
                over = now + real_s[call]
                heapq.heappush(self.agenda, (over, len(clients), clients[call], CallFinished(call)))
            if came_back and now > end / 3:
                self.back.append(not refused)
            for command in refused:
                assert command.retry_after_s is not None and 1 <= command.retry_after_s <= 600
                again = replace(event, call=f"{command.call}+")  # type: ignore[type-var]
                if not self.named:
                    again = replace(again, run=again.call)  # type: ignore[type-var]
                at = now + (self.every_s or command.retry_after_s)
                heapq.heappush(self.agenda, (at, -len(clients), client, again))

    def _call(self, at: float, client: int, draw: random.Random) -> None:
        number = draw.randrange(10**12)
        call = f"c{number}"
        run = f"run{number}" if self.named else call
        event = arrival(call, run, service_s=draw.expovariate(0.5))
        heapq.heappush(self.agenda, (at, number, client, event))

    @property
    def found_room(self) -> float:
        return sum(self.back) / len(self.back)


@hypothesis(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    number=st.sampled_from((60, 90, 120)),
    think_s=st.sampled_from((0.1, 20.0)),
    error=st.sampled_from((0.5, 1.0, 2.0)),
)
def test_who_comes_back_when_told_finds_room(
    seed: int, number: int, think_s: float, error: float
) -> None:
    clients = Clients(seed, number, queue=20, window=4, think_s=think_s, error=error)
    clients.until(2000.0)
    if len(clients.back) >= 100:  # fewer in half the time: no steady state with a full queue
        assert clients.found_room >= 0.9
        assert clients.served_s > 0.95 * 4 * 2000.0, "no room is held that the worker would need"


def test_who_comes_back_every_five_seconds_mostly_does_not() -> None:
    clients = Clients(1, 120, queue=20, window=4, think_s=20.0, every_s=5.0)
    clients.until(1500.0)
    assert clients.found_room < 0.3


def test_calls_that_belong_to_no_run_cannot_be_known_again() -> None:
    """Room goes to whoever asks first; the worker is busy all the same."""
    clients = Clients(1, 120, queue=20, window=4, think_s=20.0, named=False)
    clients.until(1500.0)
    assert clients.served_s > 0.95 * 4 * 1500.0


def refused(core: Scheduler, event: Event, now: float) -> Reject:
    [command] = core.handle(event, now)
    assert isinstance(command, Reject)
    return command


def after_s(core: Scheduler, event: Event, now: float) -> float:
    seconds = refused(core, event, now).retry_after_s
    assert seconds is not None
    return seconds


def full(queue: int = 4, service_s: float = 10.0) -> Scheduler:
    """One call runs, `queue` are queued, more than that there may not be."""
    core = scheduler(worker(window=1), settings=Settings(max_queued=queue))
    for i in range(queue + 1):
        core.handle(arrival(f"c{i}", service_s=service_s), 0.0)
    return core


def test_a_burst_is_told_to_come_one_after_the_other() -> None:
    core = full()
    told = [after_s(core, arrival(f"x{i}", f"run{i}", service_s=10.0), 0.0) for i in range(3)]
    assert told == pytest.approx([20.0, 30.0, 40.0]), "half the queue, and one call more each"


def test_who_comes_too_early_is_told_the_same_time_again() -> None:
    core = full()
    assert after_s(core, arrival("x", "x-run"), 0.0) == pytest.approx(20.0)
    assert after_s(core, arrival("x2", "x-run"), 5.0) == pytest.approx(15.0)


def test_room_is_held_for_who_was_told_and_not_for_ever() -> None:
    core = full()
    assert after_s(core, arrival("x", "x-run"), 0.0) == pytest.approx(20.0)
    for i in range(2):
        core.handle(CallFinished(f"c{i}"), 10.0 * (i + 1))
    core.handle(arrival("new", "new-run"), 20.0)
    assert refused(core, arrival("newer", "newer-run"), 20.0)
    assert core.handle(arrival("x2", "x-run"), 20.0) == []
    core = full()
    after_s(core, arrival("x", "x-run"), 0.0)
    core.handle(CallFinished("c0"), 10.0)
    assert core.handle(arrival("new", "new-run"), 51.0) == [], "more than 30 seconds late"
    core = full()
    after_s(core, arrival("x", "x-run"), 0.0)
    core.handle(CallFinished("c0"), 10.0)
    assert refused(core, arrival("new", "new-run"), 50.0)


def test_the_time_told_follows_how_fast_the_work_gets_done() -> None:
    """Calls that take twice or half as long as predicted: half or twice the rate."""
    for real_s, expected_s in ((20.0, 40.0), (5.0, 10.0)):
        core = scheduler(worker(window=1), settings=Settings(max_queued=5))
        for i in range(5):
            core.handle(arrival(f"c{i}", service_s=10.0), 0.0)
        for i in range(40):
            core.handle(arrival(f"c{i + 5}", service_s=10.0), i * real_s)
            core.handle(CallFinished(f"c{i}"), (i + 1) * real_s)
        core.handle(arrival("last", service_s=10.0), 40 * real_s)
        told = after_s(core, arrival("x", "x-run"), 40 * real_s)
        assert told == pytest.approx(1.25 * expected_s, rel=0.02), "five are queued"
        later = after_s(core, arrival("y", "y-run"), 40 * real_s + 100.0)
        assert later > 1.5 * told, "nothing has ended for long"


# --- a bound on the work ------------------------------------------------------------------------


def loaded(seconds: float, settings: Settings, tenant: str = "t") -> Scheduler:
    """One call runs, and so much work is queued behind it, in calls of 10 seconds."""
    core = Scheduler(Maestro(), settings)
    core.handle(NodeJoined(node(worker(window=1))), 0.0)
    for name in ("batch", "standard", "interactive"):
        core.handle(RunStarted(f"{name}-run", slo=name), 0.0)
    for i in range(round(seconds / 10) + 1):
        event = arrival(f"c{i}", "interactive-run", service_s=10.0)
        core.handle(replace(event, tenant=tenant), 0.0)
    return core


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        (90, {"batch", "standard", "interactive"}),
        (100, {"standard", "interactive"}),
        (200, {"interactive"}),
        (400, set()),
    ],
)
def test_the_lowest_class_is_shed_first(seconds: float, taken: set[str]) -> None:
    for name in ("batch", "standard", "interactive"):
        core = loaded(seconds, Settings(max_queue_s=100.0))
        commands = core.handle(arrival("x", f"{name}-run"), 1.0)
        assert (commands == []) == (name in taken)
        for command in commands:
            assert isinstance(command, Reject) and command.reason is RejectReason.QUEUE_FULL
            assert f"{name!r}" in command.detail and f"{seconds} seconds" in command.detail
            assert command.retry_after_s is not None


def test_without_a_bound_no_work_is_too_much() -> None:
    assert loaded(4000, Settings()).handle(arrival("x", "batch-run"), 1.0) == []


def test_an_unknown_class_counts_as_standard() -> None:
    core = loaded(200, Settings(max_queue_s=100.0))
    core.handle(RunStarted("odd", slo="nightly"), 0.0)
    assert refused(core, arrival("x", "odd"), 1.0)
    core = loaded(190, Settings(max_queue_s=100.0))
    assert core.handle(arrival("x", "never-heard-of"), 1.0) == []


def test_room_held_for_a_lower_class_is_not_taken_from_a_higher_one() -> None:
    core = loaded(190, Settings(max_queue_s=50.0))
    for i in range(5):
        core.handle(RunStarted(f"batch{i}", slo="batch"), 1.0)
        assert refused(core, arrival(f"b{i}", f"batch{i}", service_s=20.0), 1.0)
    assert core.handle(arrival("x", "interactive-run"), 1.0) == []


def test_a_tenant_ahead_of_its_share_is_treated_as_one_class_lower() -> None:
    weights = {"greedy": 1.0, "modest": 1.0}
    settings = Settings(max_queue_s=100.0, fair_lag_s=5.0, tenant_weights=weights)
    core = loaded(150, settings, tenant="greedy")
    core.handle(replace(arrival("o0", "other", service_s=100.0), tenant="modest"), 0.0)
    [call] = dispatched(core.handle(CallFinished("c0"), 10.0))
    assert core.calls.by_id[call].request.tenant == "greedy"
    for tenant, goes in (("greedy", False), ("modest", True)):
        event = replace(arrival(f"x-{tenant}", "interactive-run"), tenant=tenant)
        commands = core.handle(event, 11.0)
        assert (commands == []) == goes
        for command in commands:
            assert isinstance(command, Reject) and "'greedy', which has had" in command.detail


def test_work_counts_until_it_starts() -> None:
    core = loaded(100, Settings(max_queue_s=100.0))
    assert refused(core, arrival("x", "batch-run"), 1.0)
    [started] = core.handle(CallFinished("c0"), 10.0)
    assert isinstance(started, Dispatch)
    assert core.handle(arrival("y", "batch-run"), 10.0) == []
