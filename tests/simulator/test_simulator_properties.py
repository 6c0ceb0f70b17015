"""Whatever happens, in whatever order: no call lost or doubled, memory right, nobody starves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.worlds import FCFS, MIB, STEP_S, TRUE, WEIGHTS, chain, cluster, play, run

from maestro_backend.scheduler import CallArrived, CallFinished, Dispatch, Preempt, Settings
from maestro_backend.scheduler.policies import POLICIES
from maestro_backend.simulator import SYSTEMS, SimCall, SimRun, System, Template

MODELS = ("a", "b", "c")
_SIGHTED = [one for one in SYSTEMS.values() if one.future != "true"]


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
                    human=draw(st.booleans()),
                    prefix_of=max(after) if after and draw(st.booleans()) else None,
                    prefix_tokens=draw(st.integers(0, 200)),
                )
            )
        at = draw(st.floats(0, 100, allow_nan=False))
        deadline_s = draw(st.sampled_from((None, 20.0, 200.0)))
        runs.append(run(f"r{number}", at, *calls, deadline_s=deadline_s))
    return runs


def systems(known: Sequence[System]) -> st.SearchStrategy[System]:
    return st.sampled_from(sorted(known, key=lambda one: one.name))


@settings(max_examples=80, deadline=None)
@given(
    runs=sim_runs(),
    under=systems([*SYSTEMS.values()]),
    rule=st.sampled_from(sorted(POLICIES)),
    fitting=st.integers(1, 3),
    seqs=st.integers(1, 3),
)
def test_every_call_of_every_run_is_served_once_and_after_its_join(
    runs: list[SimRun], under: System, rule: str, fitting: int, seqs: int
) -> None:
    under = replace(under, order=rule)
    names = ("a",) if under.weights == "static" else MODELS
    runs = [only(one, names) for one in runs]
    room = fitting * (WEIGHTS + 66 * MIB)
    story = play(cluster(*names, capacity=room, seqs=seqs), runs, under)

    commands = [c for _, _, cs in story.log for c in cs]
    starts = Counter(c.call for c in commands if isinstance(c, Dispatch))
    taken_off = Counter(c.call for c in commands if isinstance(c, Preempt))
    assert starts == Counter(starts.keys()) + taken_off
    assert all(times <= Settings().max_preemptions for times in taken_off.values())
    assert story.outcome.calls_rejected == 0
    for one in runs:
        for index, call in enumerate(one.template.calls):
            arrived = story.first(CallArrived, f"{one.run}#{index}")
            for before in call.after:
                assert story.first(CallFinished, f"{one.run}#{before}") + call.gap_s <= (
                    arrived + 1e-9
                )
            assert story.first(CallFinished, f"{one.run}#{index}") >= arrived
    assert story.outcome.calls_ended == sum(len(one.template.calls) for one in runs)


def only(of: SimRun, names: Sequence[str]) -> SimRun:
    """The same run on these models."""
    calls = (replace(c, model=c.model if c.model in names else names[0]) for c in of.template.calls)
    return replace(of, template=Template("test", of.run, tuple(calls)))


@settings(max_examples=12, deadline=None)
@given(seqs=st.integers(1, 2), gap=st.floats(0.5, 1.5))
def test_a_long_call_does_not_starve_under_a_flood_of_short_ones(seqs: int, gap: float) -> None:
    """Offered load above capacity for ten minutes; the long call, due five times its 30 seconds
    after its start, waits only for what is due before that."""
    flood = [chain(f"short{i}", i * gap, 30) for i in range(int(600 / gap))]
    long = chain("long", 5.0, 300)
    rules = replace(TRUE, order="maestro")
    story = play(cluster(seqs=seqs), [*flood, long], rules, validate=False)
    started = story.first(Dispatch, "long#0")
    earlier = sum(1 for one in flood if one.at + 5 * 3.0 <= 5.0 + 5 * 30.0 + 1.0)
    assert started <= (earlier / seqs + 1) * 30 * STEP_S + 1.0
    assert started < 0.8 * len(flood) / seqs * 30 * STEP_S, "not last"


@settings(max_examples=30, deadline=None)
@given(runs=sim_runs(), under=systems(_SIGHTED))
def test_a_run_that_is_still_to_come_changes_no_decision(runs: list[SimRun], under: System) -> None:
    """Cut the last run away: until it would start, everything is decided the same."""
    if under.weights == "static":
        runs = [only(one, ("a",)) for one in runs]
    latest = max(runs, key=lambda one: one.at)
    decisions = []
    for chosen in (runs, [one for one in runs if one is not latest]):
        log = play(cluster(*MODELS), chosen, under, validate=False).log
        decisions.append([(t, e, c) for t, e, c in log if t < latest.at])
    cut = min(map(len, decisions))
    assert decisions[0][:cut] == decisions[1][:cut]


@settings(max_examples=30, deadline=None)
@given(
    runs=sim_runs(),
    under=systems(_SIGHTED),
    model=st.sampled_from(MODELS),
    tokens=st.integers(1, 4000),
)
def test_the_same_prefix_with_a_different_future_leads_to_the_same_decisions(
    runs: list[SimRun], under: System, model: str, tokens: int
) -> None:
    """Append two calls to a run: until the first has ended, what the second is shows nowhere."""
    if under.weights == "static":
        runs, model = [only(one, ("a",)) for one in runs], "a"
    longest = max(runs, key=lambda one: len(one.template.calls))
    last = len(longest.template.calls) - 1
    bridge = SimCall("bridge", "a", 10, 10, after=(last,))
    before = []
    for end in (
        SimCall("end", "a", 1, 1, after=(last + 1,)),
        SimCall("end", model, 300, tokens, after=(last + 1,), gap_s=3),
    ):
        calls = (*longest.template.calls, bridge, end)
        changed = replace(longest, template=Template("test", longest.run, calls))
        chosen = [changed if one is longest else one for one in runs]
        story = play(cluster(*MODELS), chosen, under, validate=False)
        shown = story.first(CallFinished, f"{longest.run}#{last + 1}")
        before.append([(t, e, c) for t, e, c in story.log if t < shown])
    assert before[0] == before[1]


def test_no_policy_is_left_out() -> None:
    assert {one.order for one in SYSTEMS.values()} <= {*POLICIES}
    assert FCFS.order in POLICIES
