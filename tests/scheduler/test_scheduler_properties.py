"""Whatever happens, in whatever order: no call lost or doubled, memory right, nobody starves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler.scenes import GIB, node, worker

from maestro_backend.scheduler import (
    Dispatch,
    Length,
    Preempt,
    Scheduler,
    WorkerState,
)
from maestro_backend.scheduler.policies import POLICIES, policy
from maestro_backend.simulator import EngineModel, SimCall, SimRun, Simulator

MODELS = ("a", "b", "c")


@st.composite
def sim_runs(draw: st.DrawFn) -> list[SimRun]:
    """Up to 8 runs, each a random DAG of up to 6 calls over three models."""
    runs = []
    for number in range(draw(st.integers(1, 8))):
        calls = []
        for index in range(draw(st.integers(1, 6))):
            after = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
            calls.append(
                SimCall(
                    stage=f"s{index}",
                    model=draw(st.sampled_from(MODELS)),
                    prompt_tokens=draw(st.integers(1, 400)),
                    output_tokens=draw(st.integers(1, 400)),
                    after=tuple(sorted(after)),
                    gap_s=draw(st.sampled_from((0.0, 0.5, 30.0))),
                )
            )
        at = draw(st.floats(0, 100, allow_nan=False))
        runs.append(SimRun(f"r{number}", at, tuple(calls)))
    return runs


@settings(max_examples=150, deadline=None)
@given(
    runs=sim_runs(),
    rule=st.sampled_from(sorted(POLICIES)),
    fitting=st.integers(1, 3),
    window=st.integers(1, 3),
)
def test_every_call_of_every_run_is_served_once_and_after_its_join(
    runs: list[SimRun], rule: str, fitting: int, window: int
) -> None:
    workers = [worker(m, state=WorkerState.STOPPED, window=window) for m in MODELS]
    cluster = node(*workers, capacity=fitting * (GIB + 1000))
    engines = {m: EngineModel(activation_s=5) for m in MODELS}
    core = Scheduler(policy(rule))
    result = Simulator(core, cluster, runs, engines, validate=True).run()

    commands = [c for _, _, cs in result.log for c in cs]
    starts = Counter(c.call for c in commands if isinstance(c, Dispatch))
    taken_off = Counter(c.call for c in commands if isinstance(c, Preempt))
    assert starts == Counter(starts.keys()) + taken_off
    assert all(times <= core.settings.max_preemptions for times in taken_off.values())
    for run in runs:
        for index, call in enumerate(run.calls):
            times = result.calls[run.run, index]
            assert times.started is not None and times.ended is not None
            for before in call.after:
                ended = result.calls[run.run, before].ended
                assert ended is not None and ended <= times.started
    assert core.calls.by_id == {} and core.runs.by_id == {}
    assert all(not claim.reservations for claim in core.ledger.claims.values())


@settings(max_examples=40, deadline=None)
@given(window=st.integers(1, 2), gap=st.floats(0.5, 2.0))
def test_a_long_call_does_not_starve_under_a_flood_of_short_ones(window: int, gap: float) -> None:
    """Offered load above capacity for ten minutes; the long call starts within its bound."""
    short = SimCall("s", "a", 1, 30)
    flood = [SimRun(f"short{i}", i * gap, (short,)) for i in range(int(600 / gap))]
    long = SimRun("long", 5.0, (SimCall("s", "a", 1, 300),))
    engine = EngineModel(activation_s=0)
    core = Scheduler(policy("maestro"))
    cluster = node(worker("a", window=window, kv=10**6), capacity=8 * GIB)
    simulator = Simulator(core, cluster, [*flood, long], {"a": engine})
    simulator.predict = lambda call: Length(call.output_tokens, call.output_tokens)
    times = simulator.run().calls["long", 0]
    assert times.started is not None
    # Bound: the waiting limit, plus what had arrived before the call and ages before it.
    service_s = engine.service_s(1, 30)
    earlier = sum(1 for run in flood if run.at <= 5.0)
    assert times.started - 5.0 <= 60.0 + (earlier / window + 1) * service_s + 1e-6


@settings(max_examples=60, deadline=None)
@given(runs=sim_runs(), rule=st.sampled_from(sorted(POLICIES)))
def test_a_different_future_changes_no_decision_before_it_shows(
    runs: list[SimRun], rule: str
) -> None:
    """Cut the last run away: until it would start, everything is decided the same."""
    latest = max(runs, key=lambda run: run.at)
    decisions = []
    for chosen in (runs, [run for run in runs if run is not latest]):
        cluster = node(*(worker(m) for m in MODELS))
        engines = {m: EngineModel() for m in MODELS}
        log = Simulator(Scheduler(policy(rule)), cluster, chosen, engines).run().log
        decisions.append([(t, e, c) for t, e, c in log if t < latest.at])
    assert decisions[0] == decisions[1]


@settings(max_examples=60, deadline=None)
@given(
    runs=sim_runs(),
    rule=st.sampled_from(sorted(POLICIES)),
    model=st.sampled_from(MODELS),
    tokens=st.integers(1, 4000),
)
def test_what_follows_a_call_changes_nothing_before_it_is_announced(
    runs: list[SimRun], rule: str, model: str, tokens: int
) -> None:
    """Append two calls to the end of a run: until the first arrives, the second is unknown."""
    run = max(runs, key=lambda r: len(r.calls))
    last = len(run.calls) - 1
    bridge = SimCall("bridge", "a", 10, 10, after=(last,))
    decisions, shown = [], []
    for end in (
        SimCall("end", "a", 1, 1, after=(last + 1,)),
        SimCall("end", model, 300, tokens, after=(last + 1,), gap_s=3),
    ):
        changed = replace(run, calls=(*run.calls, bridge, end))
        chosen = [changed if r is run else r for r in runs]
        cluster = node(*(worker(m) for m in MODELS))
        engines = {m: EngineModel() for m in MODELS}
        result = Simulator(Scheduler(policy(rule)), cluster, chosen, engines).run()
        decisions.append(result.log)
        shown.append(result.calls[run.run, last + 1].arrived)
    assert shown[0] == shown[1]
    before = [[(t, e, c) for t, e, c in log if t < shown[0]] for log in decisions]
    assert before[0] == before[1]
