"""Known answers, by hand, and the replay of a recorded run."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
from simulator.worlds import (
    FCFS,
    MIB,
    STEP_S,
    TRUE,
    WEIGHTS,
    Story,
    chain,
    cluster,
    play,
    run,
)

from maestro_agents.protocol import ConfigError
from maestro_backend.recording import Recorder, replay
from maestro_backend.scheduler import (
    CallArrived,
    CallFinished,
    Dispatch,
    NodeJoined,
    Residency,
    RunPaused,
    RunResumed,
    Scheduler,
)
from maestro_backend.scheduler.policies import policy
from maestro_backend.simulator import SimCall, Template, system
from maestro_backend.simulator._layout import node_infos, places
from maestro_backend.simulator._simulator import settings_of

LIMIT_S = 0.05
"""The KV of the model that is there shrinks first."""


def test_a_chain_takes_the_sum_of_its_calls() -> None:
    made = chain("r", 2.0, 10, 20)
    assert play(cluster(), [made]).makespan(made) == pytest.approx(30 * STEP_S)


def test_one_place_serves_one_after_the_other() -> None:
    first, second = chain("a", 0.0, 10), chain("b", 0.0, 10)
    story = play(cluster(seqs=1), [first, second])
    assert story.makespan(first) == pytest.approx(1.0)
    assert story.makespan(second) == pytest.approx(2.0)
    assert story.outcome.max_wait_s == pytest.approx(1.0)


def test_two_places_serve_both_at_once() -> None:
    first, second = chain("a", 0.0, 10), chain("b", 0.0, 10)
    story = play(cluster(seqs=2), [first, second])
    assert story.makespan(second) == pytest.approx(1.0)


def test_a_model_in_host_memory_is_brought_in_first() -> None:
    made = chain("r", 0.0, 10, models=("b",))
    story = play(cluster("a", "b"), [made])
    assert story.makespan(made) == pytest.approx(LIMIT_S + 3.0 + 1.0)
    outcome = story.outcome
    assert outcome.activations == {Residency.HOST: 1}
    assert outcome.activation_s == outcome.exposed_s == pytest.approx(3.0)
    assert outcome.cold_starts == 1


def test_weights_that_host_memory_cannot_hold_come_from_the_disk() -> None:
    made = chain("r", 0.0, 10, models=("b",))
    story = play(cluster("a", "b", host=0), [made])
    wake_s, read_s, serve_s = 1.0, 10.0, 1.0
    assert story.makespan(made) == pytest.approx(LIMIT_S + wake_s + read_s + serve_s)
    assert story.outcome.activations == {Residency.PARKED: 1}


def test_one_goes_before_another_comes_where_there_is_no_room_for_both() -> None:
    made = chain("r", 0.0, 10, 10, models=("a", "b"))
    story = play(cluster("a", "b", capacity=WEIGHTS + 80 * MIB), [made])
    out_s, in_s = 1.0 + 0.5, 1.0 + 2.0
    assert story.makespan(made) == pytest.approx(1.0 + out_s + in_s + 1.0)


def test_a_fan_out_joins_at_the_slowest() -> None:
    made = run(
        "r",
        0.0,
        SimCall("plan", "m", 100, 10),
        SimCall("quick", "m", 100, 10, after=(0,)),
        SimCall("slow", "m", 100, 50, after=(0,)),
        SimCall("write", "m", 100, 10, after=(1, 2)),
    )
    assert play(cluster(), [made]).makespan(made) == pytest.approx(1 + 5 + 1)


def test_a_gap_is_waited_for_and_a_person_stops_the_clock() -> None:
    made = run(
        "r",
        0.0,
        SimCall("a", "m", 100, 10),
        SimCall("b", "m", 100, 10, after=(0,), gap_s=5.0),
        SimCall("c", "m", 100, 10, after=(1,), gap_s=7.0, human=True),
        deadline_s=60.0,
    )
    story = play(cluster(), [made])
    assert story.makespan(made) == pytest.approx(3 + 12)
    pauses = [at for at, event, _ in story.log if isinstance(event, RunPaused | RunResumed)]
    assert pauses == pytest.approx([7.0, 14.0])


def test_a_node_far_away_costs_its_round_trip() -> None:
    made = chain("r", 0.0, 10)
    assert play(cluster(rtt_s=0.5), [made]).makespan(made) == pytest.approx(1.5)


def test_closed_so_many_runs_are_in_progress_at_any_time() -> None:
    runs = [chain(f"r{i}", 0.0, 10) for i in range(9)]
    story = play(cluster(), runs, closed=3)
    ends = sorted(one.finish for one in story.outcome.runs)
    assert ends == pytest.approx([1.0] * 3 + [2.0] * 3 + [3.0] * 3)


def test_only_what_is_to_be_measured_is_and_the_end_is_its_end() -> None:
    runs = [chain(f"r{i}", float(i), 10) for i in range(10)]
    runs = [replace(one, measured=3 <= i < 6) for i, one in enumerate(runs)]
    story = play(cluster(), runs)
    assert [one.run.run for one in story.outcome.runs] == ["r3", "r4", "r5"]
    assert story.outcome.simulated_s == pytest.approx(6.0)


MODELS = ("a", "b", "c", "d")


def four_on_room_for_two(number: int, seed: int, *, lru: bool = False) -> Story:
    """Four models that all live, weights of two on the device; runs go from one to another."""
    dice = random.Random(seed)
    runs = []
    for at in range(number):
        order = [dice.choice(MODELS) for _ in range(12)]
        calls = tuple(
            SimCall(f"s{i}", m, dice.randint(10, 400), dice.randint(40, 90), after=(i - 1,)[:i])
            for i, m in enumerate(order)
        )
        runs.append(run(f"r{at}", 5.0 * at, *calls))
    rules = replace(TRUE, weights="lru") if lru else TRUE
    return play(cluster(*MODELS, capacity=2 * WEIGHTS + 150 * MIB), runs, rules)


@pytest.mark.parametrize("seed", range(6))
def test_four_models_on_room_for_two_all_serve_and_never_overfill(seed: int) -> None:
    outcome = four_on_room_for_two(3, seed).outcome
    assert outcome.calls_ended == outcome.calls_arrived == 36
    assert sum(outcome.activations.values()) > 0


def test_a_future_that_is_known_hides_switches() -> None:
    ahead = [four_on_room_for_two(1, seed).outcome for seed in range(6)]
    blind = [four_on_room_for_two(1, seed, lru=True).outcome for seed in range(6)]
    assert all(one.exposed_s == pytest.approx(one.activation_s) for one in blind)
    hidden = 1 - sum(o.exposed_s for o in ahead) / sum(o.activation_s for o in ahead)
    assert hidden > 0.6


def test_a_reservation_grows_before_memory_runs_out() -> None:
    """The class default foretells 512 tokens at most; the call writes 2,000."""
    made = chain("r", 0.0, 2000)
    story = play(cluster(), [made])
    reserved = story.outcome.kv_reserved_byte_s
    held_s = 2000 * STEP_S
    assert reserved > held_s * (100 + 512) * 2**9  # it is not what was reserved at first
    assert story.makespan(made) == pytest.approx(held_s)


def test_kv_reserved_and_used_by_hand() -> None:
    outcome = play(cluster(), [chain("r", 0.0, 10)]).outcome
    per_token = 2 * 1 * 1 * 256 * 2
    blocks = -(-(100 + 512) // 16) * 16
    assert outcome.kv_reserved_byte_s == pytest.approx(blocks * per_token * 1.0)
    assert outcome.kv_used_byte_s == pytest.approx(7 * 16 * per_token * 1.0)  # 100 to 109 tokens


def test_the_same_again_is_the_same_again() -> None:
    first, second = (four_on_room_for_two(3, 7) for _ in range(2))
    assert [(at, e, c) for at, e, c in first.log] == second.log


def test_a_call_cannot_follow_a_later_one() -> None:
    calls = (SimCall("s", "m", 1, 1, after=(1,)), SimCall("t", "m", 1, 1))
    with pytest.raises(ConfigError, match="earlier calls"):
        Template("test", "r", calls)


def test_an_unknown_system_names_a_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'maestro'"):
        system("maestr")
    with pytest.raises(ConfigError, match="did you mean 'no-elastic'"):
        system("maestro:no-elastik")
    assert system("edf:belady").ranked is False


def record(path: Path, rule: str) -> Path:
    runs = [chain(f"r{i}", i * 0.7, 5 + i, 30 - i) for i in range(12)]
    rules = replace(FCFS, order=rule, future="announced")
    core = Scheduler(policy(rule), settings_of(rules))
    recorder = Recorder(path, core)
    for now, event, commands in play(cluster(), runs, rules).log:
        recorder.record(now, event, commands)
    recorder.close()
    return path


@pytest.mark.parametrize("rule", ["fcfs", "maestro"])
def test_a_recording_replays_to_identical_decisions(tmp_path: Path, rule: str) -> None:
    path = record(tmp_path / "run.jsonl", rule)
    count, divergence = replay(path)
    assert divergence is None
    assert count == len(path.read_text().splitlines()) - 1 > 24


def test_replay_finds_the_first_line_that_differs(tmp_path: Path) -> None:
    path = record(tmp_path / "run.jsonl", "fcfs")
    lines = path.read_text().splitlines()
    number = next(i for i, text in enumerate(lines) if '"Dispatch"' in text)
    changed = json.loads(lines[number])
    changed["commands"][0]["priority"] = 99
    lines[number] = json.dumps(changed)
    path.write_text("\n".join(lines) + "\n")
    _, divergence = replay(path)
    assert divergence is not None and divergence.line == number + 1


def test_replay_of_something_else_says_so(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"hello": 1}\n')
    with pytest.raises(ConfigError, match="no Maestro recording"):
        replay(path)


def test_a_line_cut_off_by_a_crash_is_the_end(tmp_path: Path) -> None:
    path = record(tmp_path / "run.jsonl", "fcfs")
    text = path.read_text()
    path.write_text(text[:-7])
    count, divergence = replay(path)
    assert divergence is None and count == len(text.splitlines()) - 2


def test_the_gateway_could_have_driven_it() -> None:
    """The events of a simulation, given to a scheduler of one's own, lead to the same commands."""
    runs = [chain(f"r{i}", i * 0.5, 5 + i, 30 - i) for i in range(6)]
    story = play(cluster(), runs)
    core = Scheduler(policy("fcfs"), settings_of(FCFS))
    for at, event, commands in story.log:
        assert tuple(core.handle(event, at)) == commands
    kinds = {type(event) for _, event, _ in story.log}
    assert {NodeJoined, CallArrived, CallFinished} <= kinds
    assert story.first(Dispatch, "r0#0") == pytest.approx(0.0)


def test_every_device_starts_with_its_static_model() -> None:
    made = places(cluster("a", "b", devices=2), FCFS)
    [info] = node_infos(cluster("a", "b", devices=2), made)
    at = {w.worker: w.residency for w in info.workers}
    assert at["n/d0/a"] is at["n/d1/a"] is Residency.DEVICE
    assert at["n/d0/b"] is at["n/d1/b"] is Residency.HOST


def test_a_model_that_nobody_has_is_refused_and_its_run_does_not_end() -> None:
    """One model per device, and a device too few."""
    made = chain("r", 0.0, 10, 10, models=("a", "b"))
    static = replace(FCFS, weights="static", elastic=False)
    outcome = play(cluster("a", "b"), [made], static).outcome
    assert outcome.calls_rejected == 1
    assert isnan(outcome.runs[0].finish)
