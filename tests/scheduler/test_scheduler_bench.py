"""`maestro bench scheduler`: that its figures are there and agree, not how good they are."""

from __future__ import annotations

import gc
import json

import pytest

from maestro_backend.bench._scheduler import Grid, bench_scheduler, scheduler_table
from maestro_backend.bench._scheduler_load import FILL_S, WINDOW, Load, Size
from maestro_backend.cli import main
from maestro_backend.scheduler import (
    Command,
    CommandApplied,
    CommandFailed,
    Dispatch,
    Event,
    Scheduler,
    Settings,
)
from maestro_backend.scheduler.policies import POLICIES, policy

KINDS = {
    "CallArrived",
    "CallFinished",
    "CallPredicted",
    "CallProgress",
    "ForecastChanged",
    "Tick",
}
SMALL = Grid((60, 120), (3, 6), models=3, events=800)


def test_the_figures_agree() -> None:
    result = bench_scheduler(SMALL)
    cells = result["cells"]
    assert [(c["calls"], c["workers"]) for c in cells] == [(60, 3), (120, 3), (60, 6), (120, 6)]
    for cell in cells:
        assert set(cell["kinds"]) >= KINDS
        assert sum(kind["events"] for kind in cell["kinds"].values()) == cell["events"] >= 800
        assert cell["queued"] == [cell["calls"]] * 2
        assert cell["running"] == WINDOW * cell["workers"]
        ticks = cell["kinds"]["Tick"]["events"]
        assert abs(ticks - cell["simulated_s"]) <= 1
        for row in (cell, *cell["kinds"].values()):
            assert 0 < row["p50_us"] <= row["p99_us"] <= row["max_us"]
            assert 0 < row["cpu_p99_us"] <= row["cpu_max_us"]
            assert row["decisions_per_s"] >= 1e6 / row["max_us"] - 1
        assert cell["max_us"] == max(kind["max_us"] for kind in cell["kinds"].values())
    for row, (few, many) in zip(result["growth"], (cells[:2], cells[2:]), strict=True):
        assert row["p50"] == round(many["p50_us"] / few["p50_us"], 2)
    lines = list(scheduler_table(result))
    assert sum(" all " in line for line in lines) == 4
    assert len(lines) == 1 + sum(1 + len(c["kinds"]) for c in cells) + 2 + 1


def test_the_same_seed_brings_the_same_decisions() -> None:
    def decisions(seed: int) -> list[tuple[str, int]]:
        cells = bench_scheduler(Grid((60,), (3,), models=3, events=800, seed=seed))["cells"]
        return [(cell["decisions_sha256"], cell["commands"]) for cell in cells]

    assert decisions(1) == decisions(1) != decisions(2)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_under_each_policy_the_load_is_lawful(name: str) -> None:
    """No invariant breaks, every order is answered, and the queues keep their length."""
    core = Scheduler(policy(name), Settings(max_queued=200))
    under_way: dict[int, float] = {}
    running: set[str] = set()

    def tell(event: Event, now: float) -> list[Command]:
        if isinstance(event, CommandApplied | CommandFailed):
            under_way.pop(event.command)
        commands = core.handle(event, now)
        core.validate()
        for command in commands:
            if isinstance(command, Dispatch):
                running.add(command.call)
            else:
                under_way[command.id] = now
        return commands

    load = Load(Size(60, 4, 2), seed=3, tell=tell)
    load.fill()
    assert (core.calls.waiting, len(running)) == (60, WINDOW * 4)
    while load.now < FILL_S + 60:
        load.step()
    assert len(running) > 2 * WINDOW * 4
    assert core.calls.waiting == 60
    assert all(load.now - since < 1 for since in under_way.values())


def test_each_model_has_a_worker() -> None:
    cells = bench_scheduler(Grid((20,), (2,), models=50, events=100))["cells"]
    assert [cell["models"] for cell in cells] == [2]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--calls", "20,40", "--workers", "2", "--events", "200", "--policy", "edf"]
    assert main(["bench", "scheduler", "--json", *arguments]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert told.out.count("\n") == 1
    assert (result["policy"], result["seed"]) == ("edf", 0)
    assert {"python", "implementation", "garbage_collector", "window"} <= set(result)
    assert "40 calls, 2 workers" in told.err
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert main(["bench", "scheduler", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["calls", "workers", "event"]


@pytest.mark.parametrize("counts", ["0", "10,", "ten", "-1"])
def test_counts_are_numbers(counts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["bench", "scheduler", f"--calls={counts}"])
    assert refused.value.code == 2
    assert "numbers of at least 1" in capsys.readouterr().err


def test_no_event_at_all_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scheduler", "--events", "0"]) == 2
    assert "--events must be at least 1" in capsys.readouterr().err
