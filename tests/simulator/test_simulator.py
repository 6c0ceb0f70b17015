"""Known answers, by hand, and the replay of a recorded run."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from scheduler.scenes import ALIVE, FLOOR, MOST, RESIDUAL, WEIGHTS, node, suspended, tiered, worker

from maestro_agents.protocol import ConfigError
from maestro_backend.recording import Recorder, replay
from maestro_backend.scheduler import Length, Residency, Scheduler, WorkerState
from maestro_backend.scheduler.policies import policy
from maestro_backend.simulator import EngineModel, Result, SimCall, SimRun, Simulator

ENGINE = EngineModel(prefill_tokens_s=100, decode_tokens_s=10, activation_s=30)


def simulate(runs: list[SimRun], rule: str = "fcfs", **options: object) -> Result:
    info = worker("m", kv=10**6, **options)  # type: ignore[arg-type]  # options of worker()
    core = Scheduler(policy(rule))
    return Simulator(core, node(info), runs, {"m": ENGINE}, validate=True).run()


def chain(run: str, at: float, *outputs: int) -> SimRun:
    calls = tuple(
        SimCall(f"s{i}", "m", 100, tokens, after=(i - 1,) if i else ())
        for i, tokens in enumerate(outputs)
    )
    return SimRun(run, at, calls)


def test_a_chain_takes_the_sum_of_its_calls() -> None:
    run = chain("r", 2.0, 10, 20)
    result = simulate([run])
    assert result.makespan(run) == pytest.approx((1 + 1) + (1 + 2))


def test_one_place_serves_one_after_the_other() -> None:
    first, second = chain("a", 0.0, 10), chain("b", 0.0, 10)
    result = simulate([first, second], window=1)
    assert result.calls["a", 0].ended == pytest.approx(2)
    assert result.calls["b", 0].ended == pytest.approx(4)


def test_a_model_on_disk_is_brought_in_first() -> None:
    run = chain("r", 0.0, 10)
    result = simulate([run], state=WorkerState.STOPPED)
    assert result.makespan(run) == pytest.approx(30 + 2)


def test_a_fan_out_joins_at_the_slowest() -> None:
    calls = (
        SimCall("plan", "m", 100, 10),
        SimCall("quick", "m", 100, 10, after=(0,)),
        SimCall("slow", "m", 100, 50, after=(0,)),
        SimCall("write", "m", 100, 10, after=(1, 2)),
    )
    run = SimRun("r", 0.0, calls)
    assert simulate([run], window=4).makespan(run) == pytest.approx(2 + 6 + 2)


MODELS = ("a", "b", "c", "d")
FAST = EngineModel(prefill_tokens_s=100, decode_tokens_s=10, activation_s=30)


def four_on_room_for_two(number: int, announce: bool, seed: int) -> tuple[Result, Scheduler]:
    """Four models that all live, weights of two on the device; so many runs go from one model to
    another."""
    dice = random.Random(seed)
    workers = [tiered(m, state=WorkerState.SUSPENDED) for m in MODELS]
    cluster = node(*workers, capacity=2 * ALIVE + 2 * (FLOOR + RESIDUAL), host=4 * WEIGHTS)
    runs = []
    for at in range(number):
        order = [dice.choice(MODELS) for _ in range(12)]
        calls = tuple(
            SimCall(f"s{i}", m, dice.randint(10, 40), dice.randint(20, 60), after=(i - 1,)[:i])
            for i, m in enumerate(order)
        )
        runs.append(SimRun(f"r{at}", 5.0 * at, calls))
    core = Scheduler(policy("maestro"))
    engines = dict.fromkeys(MODELS, FAST)
    simulator = Simulator(core, cluster, runs, engines, validate=True, announce=announce)
    simulator.predict = lambda call: Length(call.output_tokens, call.output_tokens)
    return simulator.run(), core


def waited_s(result: Result) -> float:
    return sum(t.started - t.arrived for t in result.calls.values() if t.started is not None)


@pytest.mark.parametrize("seed", range(8))
def test_four_models_on_room_for_two_all_serve_and_never_overfill(seed: int) -> None:
    result, core = four_on_room_for_two(3, True, seed)
    assert len(result.calls) == 36
    assert all(t.ended is not None for t in result.calls.values())
    assert core.counts["suspend"] > 0 and core.counts["start"] == core.counts["stop"] == 0


def test_announced_prefetch_hides_switches() -> None:
    ahead = [four_on_room_for_two(1, True, seed)[0] for seed in range(8)]
    blind = [four_on_room_for_two(1, False, seed)[0] for seed in range(8)]
    activations_s = sum(sum(result.activations_s) for result in ahead)
    assert sum(map(waited_s, blind)) > activations_s
    assert 1 - sum(map(waited_s, ahead)) / activations_s > 0.8


def test_a_kv_limit_takes_its_time_to_grow() -> None:
    run = SimRun("r", 0.0, (SimCall("s", "a", 100, 10),))
    core = Scheduler(policy("fcfs"))
    engine = replace(FAST, kv_limit_s=3.0)
    simulator = Simulator(core, node(tiered("a", kv=FLOOR)), [run], {"a": engine}, validate=True)
    assert simulator.run().makespan(run) == pytest.approx(3 + 2)
    assert core.counts["kv_grow"] == 1


@pytest.mark.parametrize(
    ("start", "seconds"),
    [(Residency.HOST, 1.0), (Residency.PARKED, 1.5), (Residency.DISK, 30.0)],
)
def test_an_activation_takes_as_long_as_its_tier(start: Residency, seconds: float) -> None:
    run = SimRun("r", 0.0, (SimCall("s", "a", 100, 10),))
    asleep = tiered("a", kv=MOST, state=WorkerState.STOPPED)
    info = asleep if start is Residency.DISK else suspended(asleep, start)
    cluster = node(info, host=WEIGHTS)
    simulator = Simulator(Scheduler(policy("fcfs")), cluster, [run], {"a": FAST}, validate=True)
    assert simulator.run().makespan(run) == pytest.approx(seconds + 2)


def test_a_call_cannot_follow_a_later_one() -> None:
    with pytest.raises(ConfigError, match="earlier calls"):
        SimRun("r", 0.0, (SimCall("s", "m", 1, 1, after=(1,)), SimCall("t", "m", 1, 1)))


def record(path: Path, rule: str) -> Path:
    runs = [chain(f"r{i}", i * 0.7, 5 + i, 30 - i) for i in range(12)]
    core = Scheduler(policy(rule))
    log = Simulator(core, node(worker("m", kv=10**6)), runs, {"m": ENGINE}).run().log
    recorder = Recorder(path, core)
    for now, event, commands in log:
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
