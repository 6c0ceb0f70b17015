"""`maestro train` and `maestro evaluate`: what they write, what they refuse, and that no call is
predicted from what came later."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightgbm")
pytest.importorskip("pyarrow")

from predictor import recorded
from predictor.recorded import team_run, team_runs, with_tokens
from pyarrow import Table, parquet

from maestro_backend.cli import main
from maestro_backend.evaluation import (
    BASELINES,
    Predicted,
    Trained,
    interleaved,
    intervals,
    load_trained,
    predict,
    report,
    save_trained,
    shortened,
    train,
)
from maestro_backend.predictor import RunExamples, read_traces
from maestro_backend.scheduler import Rest
from maestro_backend.workflows import RestMix

SHARED = Path(__file__).parents[3] / "shared" / "data"
RECIPES = shortened(8)
KV = {"p99_output_saving", "p99_under_reservation", "p99_output_saving_bytetime"}
FIGURES = {"n", "mae", "median_ape", "kendall_tau", "coverage", "kv"}
REPORT = (FIGURES - {"mae"}) | {
    "mae",
    "kendall_tau_macro",
    "baselines",
    "by_source",
    "prediction_ms",
    "branch",
    "t_rem",
    "online",
}
BRANCH = {"top1_accuracy", "log_loss", "uniform_log_loss", "last_seen_log_loss"}
T_REM = {"mae_tokens", "kendall_tau", "p90_coverage", "paper_mae_tokens", "paper_kendall_tau"}
ARRAYS = ("p50", "p90", "p95", "p99", "rest_p50", "rest_p90", "paper_rest")


def apps(count: int) -> list[RunExamples]:
    """Two sources that write differently, one of them large enough for the macro means."""
    return [*team_runs(count), *team_runs(4, source="other", app="small", scale=3.0)]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(apps(24), recipes=RECIPES)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    write_traces(apps(24), folder / "made_up.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "model"
    assert main(train_command(traces, out)) == 0
    return out


def train_command(traces: Path, out: Path, *more: str) -> list[str]:
    fast = ("--rounds", "8", "--threads", "1")
    return ["train", "--traces", str(traces), "--out", str(out), *fast, *more]


def write_traces(runs: list[RunExamples], path: Path, first: int = 0, step: int = 1) -> None:
    """As the shared traces are written; `call_idx` counts from `first` in steps."""
    parquet.write_table(Table.from_pylist(list(_rows(runs, first, step))), path)


def _rows(runs: list[RunExamples], first: int, step: int) -> Iterator[dict[str, Any]]:
    for run in runs:
        for call in run.calls:
            shape = call.shape
            yield {
                "source": run.source,
                "app": shape.workflow,
                "workflow_id": run.run,
                "task_id": call.task,
                "call_idx": first + step * call.index,
                "stage": shape.stage,
                "role": shape.role,
                "parents": [first + step * parent for parent in call.parents],
                "model": shape.model,
                "out_format": "chat",
                "n_tools": 0,
                "n_msgs": shape.messages,
                "prompt_chars": shape.prompt_chars,
                "prompt_lines": shape.prompt_lines,
                "prompt_code_chars": shape.code_chars,
                "prompt_tokens": shape.prompt_tokens,
                "cached_prefix_tokens": -1,
                "output_tokens": call.outcome.output_tokens,
                "finish": "stop",
                "t_start_s": math.nan,
                "llm_s": math.nan,
                "gap_s": math.nan,
            }


def numbers(value: Any) -> Iterator[float | None]:
    if isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    else:
        yield value


# --- no call is predicted from what came later ---------------------------------------------------


def said(predicted: Predicted, run: RunExamples, before: int) -> np.ndarray[Any, Any]:
    """All that was said of a run's first calls, and of what would follow them."""
    mine = (predicted.runs == run.run) & (predicted.index < before)
    rows = [getattr(predicted, name)[mine] for name in ARRAYS]
    return np.array([*rows, *(values[mine] for values in predicted.baselines.values())])


@pytest.mark.parametrize("online", [False, True])
def test_a_later_output_changes_nothing_that_was_said(trained: Trained, online: bool) -> None:
    runs = interleaved(apps(8))
    changed = [*runs]
    at, cut = 5, 3
    for index in range(cut, 7):
        changed[at] = with_tokens(changed[at], index, 9000 + index)
    for later in range(at + 1, len(runs)):
        changed[later] = with_tokens(changed[later], 0, 7000)
    first = predict(trained, runs, online=online)
    second = predict(trained, changed, online=online)
    assert np.array_equal(said(first, runs[at], cut + 1), said(second, runs[at], cut + 1))
    assert not np.array_equal(said(first, runs[at], 7), said(second, runs[at], 7))
    for run in runs[:at]:
        assert np.array_equal(said(first, run, 7), said(second, run, 7))


@pytest.mark.parametrize("online", [False, True])
def test_a_call_beside_changes_nothing_that_was_said(trained: Trained, online: bool) -> None:
    """0, then 1 and 2 side by side, then 3 after both."""
    parents = ((), (0,), (0,), (1, 2))
    calls = [
        recorded.call("fork", at, 100, parents=after, app="team")
        for at, after in enumerate(parents)
    ]
    run = RunExamples("made_up", "fork", tuple(calls))
    first = predict(trained, [run], online=online)
    second = predict(trained, [with_tokens(run, 1, 6000)], online=online)
    assert np.array_equal(said(first, run, 3), said(second, run, 3))
    assert not np.array_equal(said(first, run, 4), said(second, run, 4))


def test_online_learns_from_earlier_runs_and_frozen_does_not(trained: Trained) -> None:
    runs = [team_run(number, app="stranger", source="strange", scale=20.0) for number in range(12)]
    changed = [with_tokens(runs[0], 0, 3), *runs[1:]]
    last = runs[-1]
    for online in (False, True):
        first, second = (predict(trained, way, online=online) for way in (runs, changed))
        assert np.array_equal(said(first, last, 7), said(second, last, 7)) is not online
    frozen, learned = (predict(trained, runs, online=online) for online in (False, True))
    late = frozen.runs == last.run
    errors = [np.abs(p.point - p.actual)[late].mean() for p in (frozen, learned)]
    assert errors[1] < errors[0] / 2


def test_judging_changes_neither_model_nor_forecasts(trained: Trained) -> None:
    runs = apps(6)
    before = predict(trained, runs)
    predict(trained, runs, online=True)
    after = predict(trained, runs)
    assert all(np.array_equal(getattr(before, name), getattr(after, name)) for name in ARRAYS)
    assert before.foreseen == after.foreseen


def test_every_call_is_predicted_once_with_sources_taking_turns(trained: Trained) -> None:
    runs = apps(8)
    turns = [run.source for run in interleaved(runs)]
    assert turns[:3] == ["made_up", "other", "made_up"] or turns[:2].count("made_up") == 2
    assert [r for r in interleaved(runs) if r.source == "made_up"] == runs[:8]
    predicted = predict(trained, runs, online=True)
    calls = zip(predicted.sources, predicted.runs, predicted.index, strict=True)
    assert len({*calls}) == len(predicted)
    assert len(predicted) == sum(len(run.calls) for run in runs)


# --- figures -------------------------------------------------------------------------------------


def test_figures_of_predictions_that_are_known_by_hand() -> None:
    actual = np.array([10.0, 20.0, 30.0, 5000.0])
    point = np.array([10.0, 30.0, 60.0, 4000.0])
    names = np.array(["a", "a", "a", "b"])
    predicted = Predicted(
        sources=names,
        runs=names,
        roles=names,
        index=np.arange(4),
        actual=actual,
        p50=point,
        p90=np.array([10.0, 30.0, 20.0, 5000.0]),
        p95=np.array([10.0, 40.0, 80.0, 9000.0]),
        p99=np.array([2048.0, 1024.0, 1024.0, 9000.0]),
        rest=np.array([5060.0, 5050.0, 5030.0, 5000.0]),
        rest_p50=np.array([4.0, 3.0, 2.0, 1.0]),
        rest_p90=np.array([6000.0, 0.0, 0.0, 0.0]),
        paper_rest=np.full(4, np.nan),
        baselines={"role_median": np.zeros(4)},
        foreseen=(),
    )
    found = report(predicted, online=False)
    assert found["mae"] == {"macro": None, "micro": 260.0}
    assert found["median_ape"] == pytest.approx(0.35)
    assert found["kendall_tau"] == pytest.approx(1.0)
    assert found["coverage"] == {"p90": 0.75, "p95": 1.0, "p99": 1.0}
    assert found["kv"]["p99_output_saving"] == pytest.approx(1 - (2048 + 1024 * 2 + 4096) / 16384)
    assert found["kv"]["p99_under_reservation"] == 0.25
    held = (2048 * 10 + 1024 * 20 + 1024 * 30 + 4096 * 5000) / (4096 * 5060)
    assert found["kv"]["p99_output_saving_bytetime"] == pytest.approx(1 - held)
    assert found["baselines"]["role_median"]["micro"] == 1265.0
    assert found["baselines"]["two_phase"] == {"macro": None, "micro": None}
    assert found["t_rem"]["kendall_tau"] == pytest.approx(1.0)
    assert found["t_rem"]["p90_coverage"] == 0.25
    assert found["t_rem"]["paper_mae_tokens"] is None
    assert found["by_source"]["b"]["kendall_tau"] is None
    assert found["branch"] == dict.fromkeys(BRANCH)


def test_macro_is_over_large_sources_only(trained: Trained) -> None:
    predicted = predict(trained, apps(12))
    found = report(predicted, online=False)
    assert found["by_source"]["other"]["n"] < 80 <= found["by_source"]["made_up"]["n"]
    assert found["mae"]["macro"] == found["by_source"]["made_up"]["mae"] != found["mae"]["micro"]


def test_intervals_hold_what_they_are_about(trained: Trained) -> None:
    predicted = predict(trained, apps(24))
    found = intervals(predicted, resamples=200)
    low, high = found["micro"]["mae"]
    assert low < np.abs(predicted.point - predicted.actual).mean() < high
    low, high = found["macro"]["gain over role_median"]
    assert -1.0 < low <= high < 1.0
    assert intervals(predicted, resamples=200) == found


def test_the_rest_of_a_run_leans_on_whoever_was_right_about_the_app() -> None:
    mix, trees, journeys = RestMix(), Rest(1000.0, 2000.0), Rest(100.0, 400.0)
    before = mix.of("app", trees, journeys)
    assert journeys.p50 < before.p50 < trees.p50
    assert journeys.p90 < before.p90 < trees.p90
    mix.learn("app", [(trees, journeys)] * 50, [100.0] * 50)
    assert mix.of("app", trees, journeys).p50 == pytest.approx(100.0, rel=0.05)
    assert mix.of("another", trees, journeys) == before
    mix.learn("app", [(trees, journeys)] * 400, [1000.0] * 400)
    assert mix.of("app", trees, journeys).p50 == pytest.approx(1000.0, rel=0.05)


# --- the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [False, True])
def test_evaluate_prints_every_figure_as_json(
    folder: Path, traces: Path, online: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--online"] if online else []
    capsys.readouterr()
    assert main(["evaluate", "--model", str(folder), "--traces", str(traces), "--json", *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert found.keys() == REPORT
    assert found["online"] is online
    assert found["mae"].keys() == {"macro", "micro"}
    assert found["coverage"].keys() == {"p90", "p95", "p99"}
    assert found["kv"].keys() == KV
    assert tuple(found["baselines"]) == BASELINES
    assert found["baselines"]["oracle"] == {"macro": 0.0, "micro": 0.0}
    assert found["by_source"].keys() == {"made_up", "other"}
    assert all(part.keys() == FIGURES for part in found["by_source"].values())
    assert found["branch"].keys() == BRANCH
    assert found["t_rem"].keys() == T_REM
    assert found["prediction_ms"].keys() == {"p50", "p99"}
    assert all(value is None or math.isfinite(value) for value in numbers(found))
    assert sum(value is None for value in numbers(found)) == 0
    assert found["n"] == 28 * 7


def test_evaluate_prints_a_table_for_people(
    folder: Path, traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--model", str(folder), "--traces", str(traces)]) == 0
    text = capsys.readouterr().out
    for word in ("made_up", "other", "all calls", "two_phase", "t_rem", "prediction_ms"):
        assert word in text


def test_the_dump_numbers_calls_as_the_trace_does(folder: Path, tmp_path: Path) -> None:
    runs = apps(3)
    trace, dump = tmp_path / "gaps.parquet", tmp_path / "calls.parquet"
    write_traces(runs, trace, first=10, step=5)
    command = ["evaluate", "--model", str(folder), "--traces", str(trace), "--dump", str(dump)]
    assert main(command) == 0
    rows = parquet.read_table(dump).to_pylist()
    assert tuple(rows[0]) == (
        "source",
        "workflow_id",
        "call_idx",
        "actual",
        "point",
        "p50",
        "p90",
        "p95",
        "p99",
        "t_rem_predicted",
        "t_rem_actual",
    )
    assert [row["call_idx"] for row in rows[:7]] == [10, 15, 20, 25, 30, 35, 40]
    assert [row["actual"] for row in rows] == [call.length for run in runs for call in run.calls]
    assert rows[0]["t_rem_actual"] == sum(call.length for call in runs[0].calls)
    assert all(row["p50"] <= row["p90"] <= row["p95"] <= row["p99"] for row in rows)
    assert all(row["point"] == row["p50"] for row in rows)


def test_what_is_trained_is_what_is_read(trained: Trained, tmp_path: Path) -> None:
    save_trained(trained, tmp_path / "model")
    again = load_trained(tmp_path / "model")
    runs = team_runs(6, app="new prompts")  # what is known of one very prompt is not saved
    for online in (False, True):
        first, second = (predict(one, runs, online=online) for one in (trained, again))
        for name in ARRAYS:
            assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-3)


def test_the_same_seed_gives_the_same_files(folder: Path, traces: Path, tmp_path: Path) -> None:
    def files(root: Path) -> dict[str, bytes]:
        found = [path for path in root.rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): path.read_bytes() for path in found}

    assert main(train_command(traces, tmp_path / "same")) == 0
    assert main(train_command(traces, tmp_path / "other", "--seed", "7")) == 0
    assert files(tmp_path / "same") == files(folder)
    assert files(tmp_path / "other") != files(folder)


def test_a_model_is_replaced_as_a_whole(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main(train_command(traces, out)) == 0
    (out / "left_over.txt").write_text("old", encoding="utf-8")
    assert main(train_command(traces, out, "--seed", "3")) == 0
    assert not (out / "left_over.txt").exists()
    assert json.loads((out / "model.json").read_text(encoding="utf-8"))["about"]["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2
    assert "196 calls of 28 runs, 2 sources, seed 3" in told.out
    assert "training" in told.err


def test_a_file_named_twice_counts_once(
    folder: Path, traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [str(traces), str(traces / "made_up.parquet")]
    assert main(["evaluate", "--model", str(folder), "--traces", *both, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 28 * 7


def test_a_model_without_baselines_leaves_their_figures_out(
    trained: Trained, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trained(Trained(trained.model), tmp_path / "bare")
    command = ["evaluate", "--model", str(tmp_path / "bare"), "--traces", str(traces), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["baselines"]["two_phase"] == {"macro": None, "micro": None}
    assert found["branch"] == dict.fromkeys(BRANCH)
    assert found["t_rem"]["paper_mae_tokens"] is None
    assert found["t_rem"]["mae_tokens"] is not None


# --- mistakes ------------------------------------------------------------------------------------


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says what is wrong."""
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr()
    assert told.out == ""
    line = told.err.splitlines()[-1]
    assert line.startswith("maestro: error: ")
    return line


def test_traces_that_cannot_be_read_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", str(folder), "--traces"]
    absent = tmp_path / "absent.parquet"
    assert str(absent) in refused([*command, str(absent)], capsys)
    wrong = tmp_path / "wrong.parquet"
    parquet.write_table(Table.from_pydict({"source": ["a"]}), wrong)
    assert "no column 'app'" in refused([*command, str(wrong)], capsys)
    text = tmp_path / "text.parquet"
    text.write_text("no parquet", encoding="utf-8")
    assert str(text) in refused([*command, str(text)], capsys)
    (tmp_path / "empty").mkdir()
    assert "no .parquet" in refused([*command, str(tmp_path / "empty")], capsys)
    hollow = tmp_path / "hollow.parquet"
    parquet.write_table(Table.from_pylist(list(_rows(apps(1), 0, 1))).slice(0, 0), hollow)
    assert "no calls" in refused([*command, str(hollow)], capsys)


def test_a_folder_without_a_model_is_refused(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--traces", str(traces), "--model"]
    assert "maestro train" in refused([*command, str(tmp_path)], capsys)
    assert "maestro train" in refused([*command, str(tmp_path / "absent")], capsys)


def test_a_broken_part_of_a_model_is_named(
    trained: Trained, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trained(trained, tmp_path / "model")
    command = ["evaluate", "--traces", str(traces), "--model", str(tmp_path / "model")]
    for text in ("{", "[]", '{"version": 99}'):
        (tmp_path / "model" / "journeys.json").write_text(text, encoding="utf-8")
        assert "journeys.json" in refused(command, capsys)


def test_training_writes_over_nothing_but_a_model(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert "no model" in refused(train_command(traces, tmp_path), capsys)
    assert "is a file" in refused(train_command(traces, tmp_path / "notes.txt"), capsys)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_too_little_to_train_on_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, same = tmp_path / "few.parquet", tmp_path / "same.parquet"
    write_traces(apps(1)[:2], few)
    assert "too few" in refused(train_command(few, tmp_path / "model"), capsys)
    write_traces([_with_task(run, "one") for run in team_runs(10)], same)
    assert "too few" in refused(train_command(same, tmp_path / "model"), capsys)
    assert not (tmp_path / "model").exists()


def _with_task(run: RunExamples, task: str) -> RunExamples:
    return replace(run, calls=tuple(replace(call, task=task) for call in run.calls))


def test_options_out_of_range_are_named(
    folder: Path, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--threads" in refused(
        ["train", "--traces", str(traces), "--out", str(tmp_path / "m"), "--threads", "0"], capsys
    )
    dump = tmp_path / "absent" / "calls.parquet"
    command = ["evaluate", "--model", str(folder), "--traces", str(traces), "--dump", str(dump)]
    assert str(dump) in refused(command, capsys)


# --- recorded traces -----------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no recorded traces in {SHARED}")
def test_recorded_runs_are_predicted_better_than_by_medians() -> None:
    runs = read_traces([SHARED / "tradingagents.parquet", SHARED / "whowhen_magentic.parquet"])
    learned, judged = runs[::2], runs[1::2]
    found = report(predict(train(learned, recipes=shortened(60)), judged), online=False)
    baselines = found["baselines"]
    assert found["mae"]["macro"] < baselines["role_median"]["macro"]
    assert baselines["role_median"]["macro"] < baselines["global_median"]["macro"]
    assert 0.75 < found["coverage"]["p90"] < 1.0
    assert found["kv"]["p99_under_reservation"] < 0.1
    assert found["branch"]["log_loss"] < found["branch"]["uniform_log_loss"]
