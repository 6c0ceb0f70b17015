"""Tenants share a model by weight: in the long run exactly, in the short run within a bound."""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from maestro_backend.recording import Recorder, replay
from maestro_backend.scheduler import (
    Abort,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallPredicted,
    Command,
    Dispatch,
    Event,
    Length,
    NodeJoined,
    Scheduler,
    Settings,
)
from maestro_backend.scheduler.policies import Maestro, Policy, Sjf
from tests.scheduler.scenes import arrival, dispatched, node, scheduler, worker


class Shortest(Sjf):
    """Shortest call first, tenants sharing; bounded waiting as told."""

    shares = True

    def __init__(self, max_wait_s: float = float("inf")) -> None:
        self.max_wait_s = max_wait_s


def of(tenant: str, call: str, service_s: float = 1.0, **fields: Any) -> CallArrived:
    return replace(arrival(call, call, service_s=service_s, **fields), tenant=tenant)


def core_of(policy: Policy, settings: Settings, window: int = 1) -> Scheduler:
    core = Scheduler(policy, settings)
    core.handle(NodeJoined(node(worker(window=window, kv=10**9))), 0.0)
    return core


# --- a long backlog -----------------------------------------------------------------------------


@dataclass
class Tenant:
    """Calls of about `service_s` seconds, more of them than it gets served; real times are
    `error` times the predicted ones."""

    service_s: float
    per_s: float
    error: float = 1.0


@dataclass
class Play:
    """Tenants at one worker, in virtual time; `served`: real seconds by tenant."""

    core: Scheduler
    tenants: Mapping[str, Tenant]
    seed: int = 0
    served: Counter[str] = field(default_factory=Counter)

    def until(self, end: float) -> Counter[str]:
        draw = random.Random(self.seed)
        agenda: list[tuple[float, int, Event]] = []
        requests: dict[str, CallArrived] = {}
        for name, tenant in self.tenants.items():
            at = 0.0
            while (at := at + draw.expovariate(tenant.per_s)) < end:
                call = f"{name}{len(requests)}"
                requests[call] = of(name, call, tenant.service_s * draw.uniform(0.5, 1.5))
                agenda.append((at, len(requests), requests[call]))
        heapq.heapify(agenda)
        while agenda and agenda[0][0] < end:
            now, _, event = heapq.heappop(agenda)
            for command in self.core.handle(event, now):
                assert isinstance(command, Dispatch)
                request = requests[command.call]
                real_s = request.service_s * self.tenants[request.tenant].error
                self.served[request.tenant] += real_s
                number = len(requests) + command.id
                heapq.heappush(agenda, (now + real_s, number, CallFinished(command.call)))
        return self.served


def jain(shares: list[float]) -> float:
    return sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares))


TWO = {"a": Tenant(0.5, 8.0), "b": Tenant(20.0, 0.3, error=2.0)}
FIVE = {
    "a": Tenant(0.5, 4.0),
    "b": Tenant(1.0, 1.0, error=3.0),
    "c": Tenant(4.0, 1.0, error=0.5),
    "d": Tenant(15.0, 0.2),
    "e": Tenant(40.0, 0.1, error=0.8),
}
BACKLOG_S = 1500.0
NAMES = dict.fromkeys(("a", "b", "c", "d", "e"), 1.0)
NO_BOUND = Settings(max_queued=10**9, fair_lag_s=120.0, tenant_weights=NAMES)
EACH_ORDER = pytest.mark.parametrize("policy", [Shortest, Maestro, lambda: Shortest(30.0)])


@EACH_ORDER
@pytest.mark.parametrize("tenants", [TWO, FIVE])
def test_equal_tenants_get_equal_service(policy: Any, tenants: dict[str, Tenant]) -> None:
    play = Play(core_of(policy(), NO_BOUND, window=4), tenants)
    served = play.until(BACKLOG_S)
    assert sum(served.values()) > 0.95 * 4 * BACKLOG_S, "nobody's share is left unused"
    assert jain([served[name] for name in tenants]) >= 0.95


@EACH_ORDER
def test_service_goes_by_weight(policy: Any) -> None:
    settings = replace(NO_BOUND, tenant_weights={"a": 1.0, "b": 3.0}, fair_lag_s=20.0)
    tenants = {"a": Tenant(0.5, 5.0), "b": Tenant(5.0, 1.0)}
    served = Play(core_of(policy(), settings, window=4), tenants).until(BACKLOG_S)
    assert served["b"] / served["a"] == pytest.approx(3.0, rel=0.05)


def test_without_sharing_the_short_calls_take_all() -> None:
    """What the tests above would see if nothing were done."""
    served = Play(core_of(Sjf(), NO_BOUND, window=4), FIVE).until(BACKLOG_S)
    assert jain([served[name] for name in FIVE]) < 0.5


# --- the bound ----------------------------------------------------------------------------------


def order_of(core: Scheduler, *calls: CallArrived) -> list[str]:
    """Who goes, one at a time, where all came at once while the worker was busy."""
    core.handle(of("nobody", "first"), 1.0)
    for call in calls:
        core.handle(call, 1.0)
    by_name, done, now = {call.call: call for call in calls}, ["first"], 2.0
    while len(done) <= len(calls):
        [call] = dispatched(core.handle(CallFinished(done[-1]), now))
        done.append(call)
        now += by_name[call].service_s
        core.validate()
    return done[1:]


def test_within_the_bound_the_order_decides_and_beyond_it_the_tenant_furthest_behind() -> None:
    calls = [of("a", f"a{i}", 1.0) for i in range(8)] + [of("b", f"b{i}", 2.0) for i in range(4)]
    core = core_of(Shortest(), Settings(fair_lag_s=3.0, tenant_weights=NAMES))
    expected = ["a0", "a1", "a2", "a3", "b0", "a4", "a5", "b1", "a6", "a7", "b2", "b3"]
    assert order_of(core, *calls) == expected


def test_the_order_alone_decides_for_one_tenant_and_for_other_policies() -> None:
    mixed = [of("ab"[i % 2], f"c{i}", float(9 - i)) for i in range(6)]
    assert order_of(core_of(Sjf(), Settings(fair_lag_s=0.0, tenant_weights=NAMES)), *mixed) == [
        f"c{i}" for i in reversed(range(6))
    ]
    one = [replace(call, tenant="a") for call in mixed]
    assert order_of(core_of(Shortest(), Settings(fair_lag_s=0.0, tenant_weights=NAMES)), *one) == [
        f"c{i}" for i in reversed(range(6))
    ]


def serve(core: Scheduler, running: str, seconds: list[float]) -> list[str]:
    """One call after the other, each ending at its second: who went."""
    went = [running]
    for second in seconds:
        went += dispatched(core.handle(CallFinished(went[-1]), second))
    return went[1:]


def test_an_idle_tenant_saves_nothing_up() -> None:
    core = core_of(Shortest(), Settings(fair_lag_s=0.0, tenant_weights=NAMES))
    for i in range(20):
        core.handle(of("a", f"a{i}"), 1.0)
    core.handle(of("b", "b0"), 1.0)
    went = serve(core, "a0", [float(second) for second in range(2, 12)])
    assert Counter(call[0] for call in went) == {"a": 9, "b": 1}
    for i in range(1, 7):
        core.handle(of("b", f"b{i}"), 11.0)
    went = serve(core, went[-1], [float(second) for second in range(12, 20)])
    assert Counter(call[0] for call in went) == {"a": 4, "b": 4}


def test_a_tenant_with_one_call_at_a_time_is_charged_what_it_took() -> None:
    core = core_of(Shortest(), Settings(fair_lag_s=0.0, tenant_weights=NAMES))
    for i in range(20):
        core.handle(of("a", f"a{i}"), 1.0)
    core.handle(of("b", "b0", 0.5), 1.0)
    assert serve(core, "a0", [2.0, 12.0]) == ["b0", "a1"], "foreseen: half a second; it took ten"
    core.handle(of("b", "b1", 0.5), 12.0)
    went = serve(core, "a1", [float(second) for second in range(13, 24)])
    assert went.index("b1") == 9, "when the other has had as much"
    settings = Settings(fair_lag_s=0.0, tenant_weights={**NAMES, "b": 0.2})
    core = core_of(Shortest(), settings, window=2)
    for i in range(20):
        core.handle(of("a", f"a{i}"), 1.0)
    core.handle(of("b", "b0", 0.5), 1.0)
    assert serve(core, "a0", [2.0]) == ["b0"]
    went = serve(core, "a1", [float(second) for second in range(3, 8)])
    [beside] = dispatched(core.handle(CallFinished("b0"), 7.5))
    core.handle(of("b", "b1", 0.5), 7.5)
    assert "b1" not in serve(core, went[-1], [8.0, 9.0, 10.0]) + serve(core, beside, [8.5, 9.5])


def test_nothing_is_owed_once_nobody_waits() -> None:
    core = core_of(Shortest(), Settings(fair_lag_s=5.0, tenant_weights=NAMES))
    for i in range(4):
        core.handle(of("a", f"a{i}", 3.0), 1.0)
    core.handle(of("b", "b0", 20.0), 1.0)
    assert serve(core, "a0", [4.0, 7.0, 10.0, 40.0]) == ["a1", "a2", "b0", "a3"]
    core.handle(of("a", "a4", 2.0), 41.0)
    core.handle(of("b", "b1", 1.0), 41.0)
    assert serve(core, "a3", [43.0]) == ["b1"], "the order's choice, for all that b0 took"


def test_a_call_that_has_waited_too_long_goes_before_the_tenant_furthest_behind() -> None:
    core = core_of(Shortest(max_wait_s=10.0), Settings(fair_lag_s=0.0, tenant_weights=NAMES))
    core.handle(of("a", "a0"), 0.0)
    core.handle(of("a", "a1"), 1.0)
    core.handle(of("b", "b0", 1.0), 9.0)
    core.handle(of("a", "a2", 1.0), 9.0)
    assert dispatched(core.handle(CallFinished("a0"), 10.9)) == ["a1"]
    core = core_of(Shortest(max_wait_s=10.0), Settings(fair_lag_s=0.0, tenant_weights=NAMES))
    for i in range(3):
        core.handle(of("a", f"a{i}", 1.0), 0.0)
    core.handle(of("b", "b0", 2.0), 1.0)
    assert dispatched(core.handle(CallFinished("a0"), 1.0)) == ["a1"]
    assert dispatched(core.handle(CallFinished("a1"), 10.5)) == ["a2"], "b0 may wait a little more"
    assert dispatched(core.handle(CallFinished("a2"), 11.0)) == ["b0"]


def test_of_those_that_have_waited_too_long_the_tenant_furthest_behind_goes() -> None:
    core = core_of(Shortest(max_wait_s=10.0), Settings(fair_lag_s=0.0, tenant_weights=NAMES))
    for i in range(4):
        core.handle(of("a", f"a{i}", 1.0), 0.0)
    core.handle(of("b", "b0", 5.0), 0.5)
    went = dispatched(core.handle(CallFinished("a0"), 20.0))
    went += dispatched(core.handle(CallFinished(went[-1]), 21.0))
    assert went == ["a1", "b0"]


def test_who_is_not_named_shares_with_all_others_who_are_not() -> None:
    """Else a client would get more by inventing tenants."""
    calls = [of("p", f"p{i}", 1.0) for i in range(3)] + [of("q", "q0", 2.0)]
    core = core_of(Shortest(), Settings(fair_lag_s=0.0, tenant_weights={"a": 1.0}))
    assert order_of(core, *calls) == ["p0", "p1", "p2", "q0"]


def test_the_real_seconds_count_and_a_try_that_came_to_nothing_does_not() -> None:
    settings = Settings(fair_lag_s=5.0, tenant_weights=NAMES)
    calls = [of("a", f"a{i}", 1.0) for i in range(3)] + [of("b", "b0", 2.0)]
    core = core_of(Shortest(), settings)
    core.handle(of("nobody", "first"), 1.0)
    for call in calls:
        core.handle(call, 1.0)
    assert dispatched(core.handle(CallFinished("first"), 2.0)) == ["a0"]
    assert dispatched(core.handle(CallFailed("a0", "lost", retryable=True), 9.0)) == ["a0"]
    assert dispatched(core.handle(CallFinished("a0"), 10.0)) == ["a1"]
    assert dispatched(core.handle(CallFinished("a1"), 19.0)) == ["b0"], "it took nine"


# --- any order ----------------------------------------------------------------------------------

TENANTS = st.sampled_from(("a", "b", "c", "d"))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), TENANTS, st.sampled_from((0.5, 1.0, 7.0, 40.0))),
        st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from((0.1, 1.0, 9.0))),
        st.tuples(st.just("fail"), st.integers(0, 9), st.just(0.5)),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0.1)),
        st.tuples(st.just("foresee"), st.integers(0, 9), st.sampled_from((0.2, 3.0, 60.0))),
    ),
    max_size=120,
)


class Mirror:
    """What the scheduler should believe, counted anew."""

    def __init__(self, lag_s: float, policy: Policy, weights: dict[str, float]) -> None:
        settings = Settings(
            fair_lag_s=lag_s, tenant_weights=weights, max_error_attempts=10**6, suspect_s=0.0
        )
        self.core = core_of(policy, settings, window=3)
        self.live: dict[str, CallArrived] = {}
        self.running: list[str] = []
        self.went: Counter[str] = Counter()
        self.now, self.count = 1.0, 0

    def feed(self, event: Event) -> None:
        for command in self.core.handle(event, self.now):
            self.obey(command)
        self.core.validate()
        calls = self.core.calls
        for model, queue in calls.queues.items():
            assert calls.queued_work[model] == sum(call.work for call in queue.values())
        assert sorted(self.running) == sorted(calls.on_worker("n/m"))
        waiting = len(self.live) - len(self.running)
        assert calls.waiting == waiting and (len(self.running) == 3 or not waiting)

    def obey(self, command: Command) -> None:
        if isinstance(command, Dispatch):
            assert command.call in self.live and command.call not in self.running
            self.running.append(command.call)
        else:
            assert isinstance(command, Abort) and command.call not in self.live

    def step(self, kind: str, what: Any, much: float) -> None:
        self.now += much if kind in ("end", "fail", "cancel") else 0.1
        if kind == "come":
            event = of(what, f"{what}{self.count}", much)
            self.count += 1
            self.live[event.call] = event
            self.feed(event)
        elif kind in ("end", "fail") and self.running:
            call = self.running.pop(what % len(self.running))
            if kind == "end":
                del self.live[call]
            failed = CallFailed(call, "broken", retryable=True)
            self.feed(CallFinished(call) if kind == "end" else failed)
        elif kind in ("cancel", "foresee") and self.live:
            call = sorted(self.live)[what % len(self.live)]
            if kind == "foresee":
                self.feed(CallPredicted(call, Length(5, 9), 10, much))
                return
            del self.live[call]
            if call in self.running:
                self.running.remove(call)
            self.feed(CallCancelled(call))


@hypothesis(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    lag_s=st.sampled_from((0.0, 5.0, 120.0)),
    max_wait_s=st.sampled_from((5.0, float("inf"))),
    weights=st.dictionaries(TENANTS, st.sampled_from((0.5, 1.0, 3.0))),
)
def test_nothing_is_lost_whatever_happens(
    steps: list[tuple[str, Any, float]], lag_s: float, max_wait_s: float, weights: dict[str, float]
) -> None:
    mirror = Mirror(lag_s, Shortest(max_wait_s), weights)
    for i in range(12):
        mirror.step("come", "abcd"[i % 4], 1.0)
    for step in steps:
        mirror.step(*step)
    while mirror.live:
        assert mirror.running, "calls wait, and none of them goes"
        mirror.step("end", 0, 1.0)


@hypothesis(max_examples=100, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(TENANTS, st.sampled_from((0.5, 1.0, 7.0, 40.0))), min_size=2, max_size=60
    ),
    lag_s=st.sampled_from((0.0, 5.0, 50.0)),
)
def test_no_tenant_runs_ahead_of_one_that_waits_by_more_than_the_bound(
    sizes: list[tuple[str, float]], lag_s: float
) -> None:
    calls = [of(tenant, f"{tenant}{i}", size) for i, (tenant, size) in enumerate(sizes)]
    went = order_of(core_of(Shortest(), Settings(fair_lag_s=lag_s, tenant_weights=NAMES)), *calls)
    left: dict[str, dict[str, float]] = defaultdict(dict)
    for call in calls:
        left[call.tenant][call.call] = call.service_s
    served: Counter[str] = Counter()
    for name in went:
        others = [served[tenant] for tenant, waiting in left.items() if waiting]
        assert served[name[0]] - min(others) <= lag_s
        served[name[0]] += left[name[0]].pop(name)


# --- around it ----------------------------------------------------------------------------------


def test_a_recording_with_tenants_replays(tmp_path: Path) -> None:
    core = Scheduler(Maestro(), Settings(tenant_weights={**NAMES, "b": 3.0}, fair_lag_s=2.0))
    recorder = Recorder(tmp_path / "r.jsonl", core)
    events: list[Event] = [NodeJoined(node(worker(window=1)))]
    events += [of("ab"[i % 2], f"c{i}", 1.0 + i % 3) for i in range(20)]
    running: list[str] = []
    while events or running:
        event = events.pop(0) if events else CallFinished(running.pop(0))
        now = float(core.calls.waiting + 100 * (not events))
        commands = core.handle(event, now := max(now, getattr(core, "_at", 0.0)))
        core._at = now + 0.5  # type: ignore[attr-defined]
        recorder.record(now, event, commands)
        running += dispatched(commands)
    recorder.close()
    count, divergence = replay(tmp_path / "r.jsonl")
    assert count == 41 and divergence is None


def test_the_default_policy_shares_and_its_peers_do_not() -> None:
    assert Maestro.shares and scheduler(worker(), rule="maestro").policy.shares
    assert not Policy.shares and not Sjf.shares
