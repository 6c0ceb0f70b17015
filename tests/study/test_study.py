"""Known outcomes give known figures; results are the same however they are made."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightgbm")
pytest.importorskip("pyarrow")

from pyarrow import parquet
from study.small_world import due, plan, play, play_and_die, play_badly, scene

from maestro_backend.simulator import SYSTEMS, Outcome
from maestro_backend.study import (
    COLUMNS,
    CellError,
    Progress,
    RunRow,
    draw_plots,
    estimate,
    jain,
    markdown,
    run_figures,
    run_job,
    run_study,
    summary,
    t975,
    value,
)

nan = math.nan


def row(
    arrival: float, deadline: float, finish: float, slo: str = "a", source: str = "s"
) -> RunRow:
    return RunRow(slo, source, "w", arrival, deadline, finish, idle_s=10.0)


# --- figures of one cell ------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    rows = [
        row(0.0, 30.0, 20.0),
        row(10.0, 40.0, 40.0, slo="b"),
        row(20.0, 50.0, 50.5),
        row(40.0, 70.0, nan, slo="b", source="t"),
    ]
    found = run_figures(rows)
    assert found["slo_attainment"] == 0.5
    assert found["slo_attainment_by_class"] == {"a": 0.5, "b": 0.5}
    assert (found["runs"], found["unfinished"]) == (4, 1)
    assert found["goodput"] == pytest.approx(2 / 40)
    assert found["latency_s"]["mean"] == pytest.approx((20 + 30 + 30.5) / 3)
    assert found["latency_s"]["p50"] == 30.0
    assert found["slowdown"]["p50"] == 3.0
    # Source s has (1/2 + 1/3 + 1/3.05) / 3, source t nothing at all.
    assert found["jain"] == pytest.approx(0.5)


def test_no_runs_have_no_figures() -> None:
    found = run_figures([])
    assert found["runs"] == 0
    assert all(math.isnan(found[name]) for name in ("slo_attainment", "goodput", "jain"))


def test_jains_index() -> None:
    assert jain([2.0, 2.0]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert math.isnan(jain([0.0]))


def test_a_cell_has_the_totals_of_its_simulation() -> None:
    found, _ = run_study(plan("fcfs"), scene(), jobs=1, play=play)
    cell = found["cells"][0]
    assert cell["throughput"] == {"calls_s": 0.4, "output_tokens_s": 4.0}
    assert cell["activations"] == {"host": 3}
    assert cell["switch_time_hidden"] == 0.75
    assert cell["lead_time_s"] is None
    assert cell["kv_reserved_byte_s"] == 2.0**40


def test_nothing_activated_hides_nothing() -> None:
    found, _ = run_study(plan("fcfs"), scene(), jobs=1, play=lambda *a, **k: Outcome())
    assert found["cells"][0]["switch_time_hidden"] is None
    assert found["cells"][0]["slo_attainment"] is None
    json.dumps(found, allow_nan=False)


def test_what_people_take_is_not_counted() -> None:
    tight, loose = scene(due={"d": due(2.0)}), scene(due={"d": due(2.0, 500.0)})
    missed, _ = run_study(plan("fcfs", deadlines=("d",)), tight, jobs=1, play=play)
    met, _ = run_study(plan("fcfs", deadlines=("d",)), loose, jobs=1, play=play)
    assert {cell["slo_attainment"] for cell in missed["cells"]} == {0.0}
    assert {cell["slo_attainment"] for cell in met["cells"]} == {0.8}


# --- which simulations are run ------------------------------------------------------------------


def test_who_reads_no_deadline_is_simulated_once_for_all() -> None:
    jobs = list(plan("fcfs", "edf").jobs())
    assert [len(job.cells) for job in jobs if job.system.name == "fcfs"] == [2] * 6
    assert [len(job.cells) for job in jobs if job.system.name == "edf"] == [1] * 12
    found, _ = run_study(plan("fcfs", "edf"), scene(), jobs=1, play=play)
    named = [(c["policy"], c["load"], c["deadline"], c["seed"]) for c in found["cells"]]
    assert len(named) == len(set(named)) == 2 * 2 * 2 * 3


def test_runs_carry_the_deadline_that_they_are_judged_by() -> None:
    seen: list[tuple[str, set[float]]] = []

    def watch(cluster: Any, system: Any, runs: Any, *rest: Any, **options: Any) -> Outcome:
        runs = list(runs)
        seen.append((system.name, {run.deadline_s for run in runs}))
        return play(cluster, system, runs, *rest, **options)

    asked = plan("edf", loads=(1.0,), seeds=1)
    for job in asked.jobs():
        run_job(job, asked, scene(), watch)
    assert seen == [("edf", {20.0, 80.0}), ("edf", {40.0, 160.0})]


def test_all_policies_stop_at_the_same_time_and_after_every_deadline() -> None:
    horizons: list[tuple[float, float]] = []

    def watch(cluster: Any, system: Any, runs: Any, *rest: Any, **options: Any) -> Outcome:
        runs = list(runs)
        latest = max(run.at + 4 * 40.0 for run in runs if run.measured)
        horizons.append((options["horizon_s"], latest))
        return play(cluster, system, runs, *rest, **options)

    asked = plan(loads=(1.0,), seeds=1)
    for job in asked.jobs():
        run_job(job, asked, scene(), watch)
    assert len(horizons) == 5
    assert len({horizon for horizon, _ in horizons}) == 1
    assert all(horizon > latest for horizon, latest in horizons)


# --- the same however it is made ----------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    texts, rows = [], []
    for jobs in (1, 3):
        dump = tmp_path / f"{jobs}.parquet"
        found, _ = run_study(plan(), scene(), jobs=jobs, dump=dump, play=play)
        texts.append(json.dumps(found, allow_nan=False))
        rows.append(str(parquet.read_table(dump).to_pylist()))
    assert texts[0] == texts[1]
    assert rows[0] == rows[1]


def test_the_dump_says_what_the_cells_say(tmp_path: Path) -> None:
    dump = tmp_path / "runs.parquet"
    found, _ = run_study(plan(), scene(), jobs=2, dump=dump, play=play)
    table = parquet.read_table(dump)
    assert tuple(table.column_names) == COLUMNS
    rows = table.to_pylist()
    for cell in found["cells"]:
        mine = [
            r
            for r in rows
            if (r["policy"], r["load"], r["deadline_kind"], r["seed"])
            == (cell["policy"], cell["load"], cell["deadline"], cell["seed"])
        ]
        assert sum(r["finish"] <= r["deadline"] for r in mine) / len(mine) == cell["slo_attainment"]
        assert sum(math.isnan(r["finish"]) for r in mine) == cell["unfinished"] == 2
    drawn = {}
    for r in rows:
        key = r["load"], r["deadline_kind"], r["seed"], r["policy"]
        drawn.setdefault(key, []).append(
            (r["class"], r["source"], r["workflow_id"], r["arrival"], r["deadline"])
        )
    for load, kind, seed, policy in drawn:
        assert drawn[load, kind, seed, policy] == drawn[load, kind, seed, "fcfs"]


@pytest.mark.parametrize(
    ("bad", "why"),
    [(play_badly, "KeyError: 'lost'"), (play_and_die, "its process ended with status 9")],
)
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_cell_that_fails_is_named_and_leaves_no_dump(
    bad: Callable[..., Outcome], why: str, jobs: int, tmp_path: Path
) -> None:
    named = rf"^the simulation of edf, load [\d.]+, proportional:\d, seed \d failed: {why}$"
    with pytest.raises(CellError, match=named):
        run_study(plan(), scene(), jobs=jobs, dump=tmp_path / "runs.parquet", play=bad)
    assert list(tmp_path.iterdir()) == []


# --- summary ------------------------------------------------------------------------------------


def test_an_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    half = 4.303 * 1.0 / math.sqrt(3)  # t for two degrees of freedom, sd 1
    assert (found.mean, found.n) == (2.0, 3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert found.half == pytest.approx(half)


def test_too_few_values_have_no_interval() -> None:
    assert estimate([]).n == 0
    one = estimate([5.0, None, math.inf])
    assert (one.mean, one.n) == (5.0, 1)
    assert math.isnan(one.low)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 29, 30])
def test_students_t(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)


def cells(policy: str, shares: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {"policy": policy, "load": 1.0, "deadline": "d", "seed": seed, "slo_attainment": share}
        for seed, share in shares.items()
    ]


def systems(*names: str) -> list[Any]:
    return [SYSTEMS[name] for name in names]


def test_differences_are_paired_by_seed() -> None:
    mine = cells("maestro", {0: 0.9, 1: 0.5, 2: 0.1})
    theirs = cells("edf", {2: 0.0, 0: 0.8, 1: 0.4, 7: 0.99})
    entry = summary([*mine, *theirs], systems("maestro", "edf"))[1]
    against = entry["minus_edf"]["slo_attainment"]
    assert entry["policy"] == "maestro"
    assert against["n"] == 3  # seed 7 has no partner
    assert against["mean"] == pytest.approx(0.1)
    assert against["high"] - against["low"] == pytest.approx(0.0, abs=1e-9)


def test_without_the_reference_there_is_no_difference() -> None:
    (entry,) = summary(cells("fcfs", {0: 0.5}), systems("fcfs"))
    assert entry["minus_edf"] is None


def test_bounds_come_last_and_have_no_rank() -> None:
    found = [*cells("oracle", {0: 1.0}), *cells("fcfs", {0: 0.2}), *cells("edf", {0: 0.6})]
    entries = summary(found, systems("oracle", "fcfs", "edf"))
    assert [(e["policy"], e["rank"]) for e in entries] == [
        ("edf", 1),
        ("fcfs", 2),
        ("oracle", None),
    ]


def test_the_table_says_it_all() -> None:
    found, _ = run_study(plan(), scene(), jobs=1, play=play)
    lines = markdown(found["summary"]).splitlines()
    assert sum(line.startswith("### ") for line in lines) == 4
    bars = {line.count("|") for line in lines if line.startswith("|")}
    assert len(bars) == 1
    first = lines.index("### Deadline proportional:2, load 0.5")
    # 8 of 10 in time, fcfs none: 80 points behind. 2^40 byte seconds are 1024 / 3600 GiB h.
    assert "| 1 | edf | 80.0 ± 0.0 | - |" in lines[first + 4]
    assert "| 2 | fcfs | 0.0 ± 0.0 | -80.0 ± 0.0 |" in lines[first + 5]
    assert "| bound | oracle | 80.0 ± 0.0 | +0.0 ± 0.0 |" in lines[first + 6]
    assert " 0.28 |" in lines[first + 4]


def test_a_figure_by_its_path() -> None:
    assert value({"latency_s": {"p95": 3}}, "latency_s.p95") == 3.0
    assert value({"latency_s": None}, "latency_s.p95") is None
    assert value({}, "jain") is None


# --- progress, pictures -------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_file_is_a_line_for_each_tenth() -> None:
    out = io.StringIO()
    shown = Progress(40, out)
    for _ in range(40):
        shown.step()
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("maestro: 4 of 40 simulations, ")
    assert lines[-1] == "maestro: 40 of 40 simulations, 0:00:00 left"


def test_progress_on_a_terminal_is_a_bar() -> None:
    out = Terminal()
    shown = Progress(2, out)
    shown.step()
    assert f"[{'#' * 15}{'.' * 15}] 1 of 2" in out.getvalue()
    shown.step()
    assert out.getvalue().endswith("\n")


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found, drawn = run_study(plan(), scene(), jobs=1, pictures=True, play=play)
    made = draw_plots(tmp_path, found, drawn)
    assert sorted(path.name for path in made) == [
        "attainment-proportional-2.png",
        "attainment-proportional-4.png",
        "latency.png",
        "memory.png",
        "run.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
