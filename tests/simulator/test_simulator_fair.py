"""That nobody gets what he should not: compute, memory, knowledge, good figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.worlds import FCFS, MIB, PROFILE, TRUE, WEIGHTS, chain, cluster, model, play, run

from maestro_backend.scheduler import CallArrived, CallFinished, RunEnded
from maestro_backend.simulator import SYSTEMS, Cluster, SimCall, SimDevice, SimNode, Template

READ_S = 0.1
"""An engine step: reading the weights, and nothing else."""


def reading(*devices: tuple[str, ...]) -> Cluster:
    """Devices that hold these models, all of them ready or in host memory."""
    profile = replace(PROFILE, step_s=0.0, bandwidth=WEIGHTS / READ_S)
    where = tuple(SimDevice(f"d{i}", profile, held, held[0]) for i, held in enumerate(devices))
    names = {name for held in devices for name in held}
    return Cluster(
        "toy",
        (SimNode("n", where, 10**12, 1e9),),
        {name: model(name) for name in names},
        dict.fromkeys(names, 64 * MIB),
        4,
        100_000,
    )


def test_engines_that_share_a_device_take_turns() -> None:
    """Both wait for b to come; then a computes beside it for a while, at half the pace."""
    first, second = chain("x", 10.0, 20, models=("a",)), chain("y", 0.0, 100, models=("b",))
    alone = play(reading(("a",), ("b",)), [first, second])
    assert alone.makespan(first) == pytest.approx(20 * READ_S, rel=0.01)
    assert alone.makespan(second) == pytest.approx(100 * READ_S, rel=0.01)
    together = play(reading(("a", "b")), [first, second])
    assert together.makespan(first) == pytest.approx(2 * 20 * READ_S, abs=2 * READ_S)
    b_came_s = together.outcome.activation_s + 0.05
    assert together.makespan(second) == pytest.approx(
        b_came_s + (100 + 20) * READ_S, abs=2 * READ_S
    )


def test_calls_that_end_in_one_step_are_not_taken_off_for_each_other() -> None:
    """The third is more urgent and short of memory when the first two end together."""
    profile = replace(PROFILE, step_s=0.125, capacity_bytes=WEIGHTS + 2 * MIB)
    where = (SimNode("n", (SimDevice("d0", profile, ("m",), "m"),), 10**12, 1e9),)
    small = Cluster("toy", where, {"m": model("m")}, {}, 8, 100_000)
    runs = [
        run("A", 0.0, SimCall("s", "m", 300, 160)),
        run("B", 0.0, SimCall("s", "m", 300, 160)),
        run("C", 10.0, SimCall("s", "m", 640, 40)),
    ]
    assert play(small, runs, TRUE).outcome.calls_ended == 3


def test_closed_the_next_run_comes_for_one_that_was_refused() -> None:
    static = replace(FCFS, weights="static", elastic=False)
    refused = chain("x", 0.0, 10, models=("b",))
    others = [chain(f"r{i}", 0.0, 10, models=("a",)) for i in range(3)]
    outcome = play(cluster("a", "b"), [refused, *others], static, closed=1).outcome
    assert (outcome.calls_rejected, outcome.calls_ended) == (1, 3)


def test_every_call_of_a_fan_out_has_its_own_lead_time() -> None:
    """Four calls of a stage are known for ten seconds before they come."""
    work = [SimCall("work", "m", 10, 10, after=(0,), gap_s=10.0) for _ in range(4)]
    made = run("r", 0.0, SimCall("plan", "m", 10, 10), *work)
    announced = replace(FCFS, future="announced")
    outcome = play(cluster(seqs=8), [made], announced).outcome
    assert (outcome.lead_s, outcome.lead_calls) == (pytest.approx(40.0), 5)


def test_a_stage_that_comes_again_is_not_known_from_its_first_time_on() -> None:
    calls = (
        SimCall("a", "m", 10, 10, after=(i - 1,)[:i], gap_s=1.0 if i else 0.0) for i in range(5)
    )
    made = run("r", 0.0, *calls)
    outcome = play(cluster(), [made], replace(FCFS, future="announced")).outcome
    assert outcome.lead_s == pytest.approx(4 * (1.0 + 1.0))  # each since the one before came


def test_kept_prefixes_count_as_reserved() -> None:
    """The run's next call is told 20 s ahead: its prefix is kept for so long."""
    later = SimCall("b", "m", 200, 10, after=(0,), gap_s=20.0)
    made = run("r", 0.0, SimCall("a", "m", 100, 10), later)
    kept = play(cluster(), [made], replace(FCFS, future="announced")).outcome
    dropped = play(cluster(), [made], FCFS).outcome
    blocks = 6 * 16 * 1024  # of the 109 tokens that the first call leaves, in whole blocks
    more = kept.kv_reserved_byte_s - dropped.kv_reserved_byte_s
    assert more == pytest.approx(20 * blocks, rel=0.15)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    inner=st.integers(0, 3),
    name=st.sampled_from(
        [one.name for one in SYSTEMS.values() if one.future in ("none", "learned")]
    ),
)
def test_without_announcements_nobody_knows_how_many_calls_follow(
    outputs: list[int], inner: int, name: str
) -> None:
    """One more call follows an inner call, but much later: nothing is decided otherwise until it
    comes, or the run would have ended."""
    inner = min(inner, len(outputs) - 2)
    plain = chain("r", 20.0, *outputs, models=("a", "b"))
    extra = SimCall("extra", "c", 50, 10, after=(inner,), gap_s=300.0)
    longer = replace(
        plain, template=Template("test", "r", (*plain.template.calls, extra), tenant="default")
    )
    others = [chain(f"o{i}", 7.0 * i, 20, 30, models=("c", "b", "a")) for i in range(6)]
    if name == "static":
        return
    before = []
    for chosen in (plain, longer):
        story = play(
            cluster("a", "b", "c", capacity=2 * WEIGHTS + 110 * MIB),
            [*others, chosen],
            SYSTEMS[name],
        )
        ends = [at for at, event, _ in story.log if event == RunEnded("r")]
        came = [at for at, e, _ in story.log if isinstance(e, CallArrived) and e.stage == "extra"]
        before.append((min(ends + came), story.log))
    until = min(at for at, _ in before)
    cut = [[entry for entry in log if entry[0] < until] for _, log in before]
    assert cut[0] == cut[1]
    assert any(isinstance(event, CallFinished) for _, event, _ in cut[0])
